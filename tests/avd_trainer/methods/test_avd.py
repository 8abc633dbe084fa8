"""AVD, and DMD, which it is without its two terms."""

import json
from collections import Counter
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from avd_core import AVDObjective, DistributionMatchingLoss
from avd_trainer.config.loading import load_config
from avd_trainer.data.examples import condition_of
from avd_trainer.data.in_memory import CaptionedLatents
from avd_trainer.models.condition import Condition
from avd_trainer.models.transformer import VelocityModel, build_transformer, load_transformer
from avd_trainer.runtime.draws import Draws
from avd_trainer.runtime.ranks import Ranks
from avd_trainer.training.config import TrainConfig
from avd_trainer.training.trainer import Trainer
from runs import ARCHITECTURE, LORA, MakeTrainer, first_step, load_data_of, order_of, step_gradients

StopAt = Callable[[int], None]


@pytest.fixture
def stop_at(monkeypatch: pytest.MonkeyPatch) -> StopAt:
    """Lets every rollout stop at the few step of an index."""

    def stop(index: int) -> None:
        monkeypatch.setattr(Draws, "shared_integer", lambda *_: index)

    return stop


def count_forwards(trainer: Trainer) -> Counter[tuple[str, bool]]:
    """Counts samples run forward, by role and by whether a graph is kept."""
    counts: Counter[tuple[str, bool]] = Counter()
    for name in ("student", "teacher", "online"):
        setattr(trainer.method, name, Counted(trainer.models[name], name, counts))
    return counts


class Counted:
    """A model whose samples are counted."""

    def __init__(self, model: Any, name: str, counts: Counter[tuple[str, bool]]) -> None:
        self.model, self.name, self.counts = model, name, counts

    def __call__(self, x_t: Tensor, timesteps: Tensor, condition: Condition) -> Tensor:
        velocity: Tensor = self.model(x_t, timesteps, condition)
        self.counts[self.name, velocity.requires_grad] += len(x_t)
        return velocity


@pytest.mark.parametrize("online_updates", [1, 3])
def test_no_forward_is_run_whose_output_nobody_uses(make_trainer: MakeTrainer, online_updates: int) -> None:
    trainer = make_trainer(method={"online_updates": online_updates, "few_steps": [1000]})
    counts = count_forwards(trainer)
    first_step(trainer)
    # One few-step grid entry: each rollout is one forward. The student's own sample serves the first online update.
    batch = trainer.config.batch_size
    assert counts["student", True] == (1 + 1) * batch  # generated samples, real clips
    assert counts["student", False] == (online_updates - 1) * batch
    assert counts["teacher", False] == 2 * batch  # both sides of the guidance
    assert counts["online", False] == batch
    assert counts["online", True] == online_updates * batch
    assert counts["teacher", True] == 0


def test_an_update_costs_thirty_five_and_a_half_forwards(make_trainer: MakeTrainer, stop_at: StopAt) -> None:
    """Forward equivalents per sample, a backward pass counted as two, averaged over the steps a rollout may stop at.

    At five online updates and four few steps. docs/method.md compares them with the released code's 47, part by part.
    """
    costs = []
    for last in range(4):
        trainer = make_trainer(method={"online_updates": 5})
        stop_at(last)
        counts = count_forwards(trainer)
        first_step(trainer)
        costs.append(sum(count * (3 if graph else 1) for (_, graph), count in counts.items()) / 2)
    assert sum(costs) / 4 == 35.5


@pytest.mark.parametrize(
    ("kind", "method", "left_out"),
    [("dmd", {}, ("regression", "motion", "balance")), ("avd", {"regression": None}, ("regression", "balance"))],
)
def test_without_regression_no_real_clip_is_run(
    make_trainer: MakeTrainer, kind: str, method: dict[str, Any], left_out: tuple[str, ...]
) -> None:
    trainer = make_trainer(kind, method={"few_steps": [1000], **method})
    counts = count_forwards(trainer)
    metrics = first_step(trainer)
    assert counts["student", True] == trainer.config.batch_size
    assert not any(name.startswith(left_out) for name in metrics)
    assert all("clips" not in turn.data for turn in trainer.method.turns(1))


def test_runs_with_and_without_our_terms_see_the_same_prompts_and_noise(make_trainer: MakeTrainer) -> None:
    first = {kind: first_step(make_trainer(kind)) for kind in ("avd", "dmd")}
    assert torch.equal(first["avd"]["matching/loss"], first["dmd"]["matching/loss"])
    assert not torch.equal(first["avd"]["gradient_norm"], first["dmd"]["gradient_norm"])


@pytest.mark.parametrize("judged", ["loss", "relative", "excess"])
def test_a_step_is_that_of_the_plain_algorithm(
    make_trainer: MakeTrainer, clips: CaptionedLatents, stop_at: StopAt, judged: str, tmp_path: Path
) -> None:
    """Eq. 9 with one graph and one backward pass, over models that are neither sharded nor shared."""
    weights = tmp_path / "student"  # another model than the teacher, whose excess would be 0
    torch.manual_seed(7)
    build_transformer(ARCHITECTURE).save_pretrained(weights)
    trainer = make_trainer(
        method={"online_updates": 1, "regression": {"judged": judged}},
        max_gradient_norm=1e6,
        student_weights=str(weights),
    )
    stop_at(1)
    method: Any = trainer.config.method
    student, teacher, online = (
        VelocityModel(load_transformer(str(path))) for path in (weights, *2 * [trainer.config.teacher])
    )
    student.module.requires_grad_(True)
    order = {name: order_of(name).batch(0, 2) for name in ("prompts", "clips")}
    told = {name: condition_of([trainer.data.clips[i] for i in index]) for name, index in order.items()}
    nothing = told["prompts"].with_text(torch.zeros_like(told["prompts"].text))
    draws = Draws((0, "student", 1, 0), range(2), torch.device("cpu"))
    shape = clips.latents.shape[1:]

    x_1000 = draws.normal("trajectory", shape)
    with torch.no_grad():
        early = x_1000 - student(x_1000, torch.full((2,), 1000.0), told["prompts"])
    x_900 = 0.1 * early + 0.9 * draws.normal("trajectory", shape)
    velocity = student(x_900, torch.full((2,), 900.0), told["prompts"])
    x_0 = x_900 - 0.9 * velocity
    uniform = draws.uniform("score_timesteps")
    timesteps = (1000 * 5 * uniform / (1 + 4 * uniform)).clamp(20, 980)
    sigma = (timesteps / 1000).view(2, 1, 1, 1, 1)
    x_t = (1 - sigma) * x_0.detach() + sigma * draws.normal("score_noise", shape)
    with torch.no_grad():
        conditional, without = teacher(x_t, timesteps, told["prompts"]), teacher(x_t, timesteps, nothing)
        real = x_t - sigma * (without + method.guidance_scale * (conditional - without))
        online_x_0 = x_t - sigma * online(x_t, timesteps, told["prompts"])
    matching, _ = DistributionMatchingLoss()(x_0, real, online_x_0)
    chosen = torch.tensor(method.few_steps)[(4 * draws.uniform("regression_timesteps")).long()]
    noise = draws.normal("regression_noise", shape)
    level = (chosen / 1000).view(2, 1, 1, 1, 1)
    real_clips = clips.latents[order["clips"]]
    noised = (1 - level) * real_clips + level * noise
    prediction = student(noised, chosen, told["clips"])
    with torch.no_grad():
        judged_by = {
            "loss": {},
            "relative": {"clips": real_clips},
            "excess": {"teacher_prediction": teacher(noised, chosen, told["clips"])},
        }[judged]
    added, metrics = AVDObjective(method.objective)(x_0, prediction, noise - real_clips, chosen, **judged_by)
    assert ("regression/judged" in metrics) == (judged != "loss")
    (matching + added).backward()
    metrics |= {"loss": (matching + added).detach(), "matching/loss": matching.detach()}

    expected = torch.cat([p.grad.flatten() for p in student.module.parameters() if p.grad is not None])
    step: dict[str, Tensor] = {}
    torch.testing.assert_close(step_gradients(trainer, step), expected, rtol=1e-4, atol=1e-7)
    for name, value in metrics.items():
        torch.testing.assert_close(step[name], value, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("lora", [None, LORA], ids=["full", "adapters"])
def test_the_excess_of_a_student_over_its_teacher_starts_at_zero(
    make_trainer: MakeTrainer, lora: dict[str, Any] | None
) -> None:
    """Adapters and teacher share a base: the teacher must be asked without them."""
    roles = {role: {"lora": lora, "optimizer": {"lr": 1e-2}} for role in ("student", "online")}
    trainer = make_trainer(method={"regression": {"judged": "excess"}, **roles})
    first, second = (step["regression/judged"] for step in islice(trainer.run(), 2))
    torch.testing.assert_close(first, torch.zeros(2), rtol=0, atol=1e-6)
    assert second.abs().min() > 1e-5


def test_the_teachers_own_error_is_one_forward_without_guidance_or_gradient(make_trainer: MakeTrainer) -> None:
    trainer = make_trainer(method={"online_updates": 1, "few_steps": [1000], "regression": {"judged": "excess"}})
    counts = count_forwards(trainer)
    first_step(trainer)
    batch = trainer.config.batch_size
    assert counts["teacher", False] == (2 + 1) * batch  # both sides of the matching term's guidance; real clips
    assert counts["teacher", True] == 0


def test_what_is_judged_does_not_depend_on_micro_batches(make_trainer: MakeTrainer) -> None:
    def curve(size: int | None) -> list[dict[str, Tensor]]:
        method = {"regression": {"judged": "excess", "deviation": "standardized"}}
        return list(make_trainer(method=method, batch_size=4, micro_batch_size=size).run())

    for whole, parts in zip(curve(None), curve(1), strict=True):
        for name in ("judged", "deviations", "weights", "loss"):
            torch.testing.assert_close(
                parts[f"regression/{name}"], whole[f"regression/{name}"], rtol=2e-3, atol=1e-5, msg=name
            )


@pytest.mark.parametrize("last", [0, 3])
def test_the_monitor_is_shown_finished_samples_only(make_trainer: MakeTrainer, stop_at: StopAt, last: int) -> None:
    trainer = make_trainer()
    shown: list[dict[str, Tensor]] = []
    assert trainer.monitor is not None
    trainer.monitor.after_step = lambda step, metrics: shown.append(dict(metrics))  # type: ignore[method-assign]
    stop_at(last)
    logged = first_step(trainer)
    assert ("x_0" in shown[0]) == (last == 3)
    assert "x_0" not in logged
    if last == 3:
        assert shown[0]["x_0"].shape == (trainer.config.batch_size, *trainer.latent_shape)


@pytest.mark.parametrize(
    ("kind", "method", "weight"),
    [
        ("dmd", {}, None),
        ("avd", {"regression": {"weight": 0.5}}, 0.5),
        ("avd", {"regression": {"sharpness": 0.0}}, None),
        ("avd", {"regression": None}, None),
    ],
)
def test_the_monitor_judges_the_weights_of_an_adaptive_regression_only(
    make_trainer: MakeTrainer, kind: str, method: dict[str, Any], weight: float | None
) -> None:
    monitor = make_trainer(kind, method=method).monitor
    assert monitor is not None
    assert monitor.regression_weight == weight


def test_a_held_gradient_ratio_reaches_the_update(make_trainer: MakeTrainer) -> None:
    """The held run's first gradient is that of a run whose constant weight is scaled by hand."""

    def make(**method: Any) -> Trainer:
        return make_trainer(method={"motion": None, **method}, max_gradient_norm=1e6)

    scale = first_step(make(gradient_ratio=0.5))["balance/scale"].item()
    assert scale != pytest.approx(1.0, rel=0.05)
    held, by_hand = make(gradient_ratio=0.5), make(regression={"weight": 2.0 * scale})
    torch.testing.assert_close(step_gradients(held), step_gradients(by_hand), rtol=1e-3, atol=1e-6)


def test_a_cache_that_waits_for_its_update_gets_one_per_step(make_trainer: MakeTrainer) -> None:
    trainer = make_trainer(method={"regression": {"auto_update": False}})
    first_step(trainer)
    assert trainer.method.objective.regression.cache.seen.any()  # type: ignore[attr-defined]


def test_the_first_steps_of_the_tiny_preset_follow_the_golden_curve(ranks: Ranks) -> None:
    """If these numbers change, so has the method: understand why, then rewrite the file from what is printed."""
    config = load_config(TrainConfig, "tiny", ["max_steps=4", "data.clips=16"])
    data = load_data_of(config)
    names = ("loss", "matching/loss", "regression/loss", "motion/loss", "online/loss", "gradient_norm")
    curve = [{name: metrics[name].item() for name in names} for metrics in Trainer(config, data, ranks).run()]
    print(json.dumps(curve, indent=1))
    golden = json.loads((Path(__file__).parents[2] / "assets" / "golden_tiny_first_steps.json").read_text())
    assert len(curve) == len(golden)
    for step, expected in zip(curve, golden, strict=True):
        assert step == pytest.approx(expected, rel=2e-3, abs=1e-5)
