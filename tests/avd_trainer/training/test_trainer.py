import json
import os
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from avd_core import AVDObjective, DistributionMatchingLoss, NonFiniteError
from avd_trainer.config.loading import load_config
from avd_trainer.data.in_memory import CaptionedLatents
from avd_trainer.data.order import ShuffledOrder
from avd_trainer.data.sources import load_data
from avd_trainer.models.roles import load_models
from avd_trainer.models.transformer import VelocityModel, load_transformer
from avd_trainer.runtime.draws import SampleDraws
from avd_trainer.runtime.ranks import Ranks
from avd_trainer.training.config import TrainConfig
from avd_trainer.training.trainer import Trainer

MakeTrainer = Callable[..., Trainer]
CXX = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")

DMD_ALONE = {"regression": None, "motion": None}


def weights(model: VelocityModel) -> Tensor:
    """All weights of a model, adapters included."""
    return torch.cat([parameter.detach().full_tensor().flatten() for parameter in model.module.parameters()])


def count_forwards(trainer: Trainer) -> Counter[tuple[str, bool]]:
    """Counts samples run forward, by role and by whether a graph is kept."""
    counts: Counter[tuple[str, bool]] = Counter()
    for name in ("student", "teacher", "online"):
        model: VelocityModel = getattr(trainer, name)

        def counted(
            x_t: Tensor, timesteps: Tensor, text: Tensor, name: str = name, model: VelocityModel = model
        ) -> Tensor:
            velocity = model(x_t, timesteps, text)
            counts[name, velocity.requires_grad] += len(x_t)
            return velocity

        setattr(trainer, name, Counted(model, counted))
    return counts


class Counted:
    """A model whose calls go through a function."""

    def __init__(self, model: VelocityModel, call: Callable[..., Tensor]) -> None:
        self.model, self.call = model, call

    def __call__(self, *inputs: Tensor) -> Tensor:
        return self.call(*inputs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.model, name)


def step_gradients(trainer: Trainer, metrics: dict[str, Tensor] | None = None) -> Tensor:
    """What the student's optimizer is given in the first step, whose metrics are added to ``metrics``."""
    seen: list[Tensor] = []

    def look(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        (group,) = optimizer.param_groups
        seen.append(torch.cat([p.grad.full_tensor().flatten() for p in group["params"]]))

    trainer.student_optimizer.register_step_pre_hook(look)
    (metrics if metrics is not None else {}).update(first_step(trainer))
    return seen[0]


def first_step(trainer: Trainer) -> dict[str, Tensor]:
    return next(trainer.run())


def test_student_and_online_model_learn_and_the_teacher_does_not(make_trainer: MakeTrainer) -> None:
    trainer = make_trainer()
    before = {name: weights(getattr(trainer, name)).clone() for name in ("student", "teacher", "online")}
    first_step(trainer)
    assert torch.equal(weights(trainer.teacher), before["teacher"])
    assert not torch.equal(weights(trainer.student), before["student"])
    assert not torch.equal(weights(trainer.online), before["online"])


def test_all_models_start_from_the_teacher(make_trainer: MakeTrainer) -> None:
    trainer = make_trainer()
    assert torch.equal(weights(trainer.student), weights(trainer.teacher))
    assert torch.equal(weights(trainer.online), weights(trainer.teacher))


@pytest.mark.parametrize("online_updates", [1, 3])
def test_no_forward_is_run_whose_output_nobody_uses(make_trainer: MakeTrainer, online_updates: int) -> None:
    trainer = make_trainer(online_updates=online_updates, objective={"timesteps": [1000]})
    counts = count_forwards(trainer)
    first_step(trainer)
    # One few-step grid entry: each rollout is one forward. The generator's own sample serves the first online update.
    batch = trainer.config.batch_size
    assert counts["student", True] == (1 + 1) * batch  # generated samples, real clips
    assert counts["student", False] == (online_updates - 1) * batch
    assert counts["teacher", False] == 2 * batch  # both sides of the guidance
    assert counts["online", False] == batch
    assert counts["online", True] == online_updates * batch
    assert counts["teacher", True] == 0


def test_an_update_costs_thirty_five_and_a_half_forwards(make_trainer: MakeTrainer) -> None:
    """Forward equivalents per sample, a backward pass counted as two, averaged over the steps a rollout may stop at.

    At five online updates and four few steps. docs/method.md compares them with the released code's 47, part by part.
    """
    costs = []
    for last in range(4):
        trainer = make_trainer(online_updates=5)
        trainer._last_step = lambda *_, last=last: last  # type: ignore[method-assign]
        counts = count_forwards(trainer)
        first_step(trainer)
        costs.append(sum(count * (3 if graph else 1) for (_, graph), count in counts.items()) / 2)
    assert sum(costs) / 4 == 35.5


def test_without_regression_no_real_clip_is_run(make_trainer: MakeTrainer) -> None:
    trainer = make_trainer(objective={"timesteps": [1000], **DMD_ALONE})
    counts = count_forwards(trainer)
    metrics = first_step(trainer)
    assert counts["student", True] == trainer.config.batch_size
    assert not any(name.startswith(("regression", "motion", "balance")) for name in metrics)


def test_runs_with_and_without_our_terms_see_the_same_prompts_and_noise(make_trainer: MakeTrainer) -> None:
    first = {
        name: first_step(make_trainer(objective=objective)) for name, objective in (("avd", {}), ("dmd", DMD_ALONE))
    }
    assert torch.equal(first["avd"]["matching/loss"], first["dmd"]["matching/loss"])
    assert not torch.equal(first["avd"]["gradient_norm"], first["dmd"]["gradient_norm"])


def test_a_seed_makes_a_run_reproducible(make_trainer: MakeTrainer) -> None:
    losses = {
        name: [metrics["loss"].item() for metrics in make_trainer(seed=seed).run()]
        for name, seed in (("first", 1), ("again", 1), ("other", 2))
    }
    assert losses["first"] == losses["again"]
    assert losses["first"] != losses["other"]


def test_a_step_is_that_of_the_plain_algorithm(make_trainer: MakeTrainer, clips: CaptionedLatents) -> None:
    """Eq. 9 with one graph and one backward pass, over models that are neither sharded nor shared."""
    trainer = make_trainer(max_gradient_norm=1e6, online_updates=1)
    trainer._last_step = lambda *_: 1  # type: ignore[method-assign]
    config = trainer.config
    folder = config.teacher
    student, teacher, online = (VelocityModel(load_transformer(folder)) for _ in range(3))
    student.module.requires_grad_(True)
    order = {name: ShuffledOrder(10, seed).batch(0, 2) for name, seed in (("prompts", 0), ("clips", 1))}
    text = {name: torch.stack([trainer.data.clips[i].text for i in index]) for name, index in order.items()}
    draws = {name: SampleDraws((0, name, 1, 0), range(2), torch.device("cpu")) for name in ("generator", "regression")}
    shape = clips.latents.shape[1:]

    x_1000 = draws["generator"].normal(shape)
    with torch.no_grad():
        early = x_1000 - student(x_1000, torch.full((2,), 1000.0), text["prompts"])
    x_900 = 0.1 * early + 0.9 * draws["generator"].normal(shape)
    velocity = student(x_900, torch.full((2,), 900.0), text["prompts"])
    x_0 = x_900 - 0.9 * velocity
    uniform = draws["generator"].uniform()
    timesteps = (1000 * 5 * uniform / (1 + 4 * uniform)).clamp(20, 980)
    sigma = (timesteps / 1000).view(2, 1, 1, 1, 1)
    x_t = (1 - sigma) * x_0.detach() + sigma * draws["generator"].normal(shape)
    with torch.no_grad():
        conditional, without = teacher(x_t, timesteps, text["prompts"]), teacher(x_t, timesteps, text["prompts"] * 0)
        real = x_t - sigma * (without + config.guidance_scale * (conditional - without))
        online_x_0 = x_t - sigma * online(x_t, timesteps, text["prompts"])
    matching, _ = DistributionMatchingLoss()(x_0, real, online_x_0)
    chosen = torch.tensor(config.objective.timesteps)[(4 * draws["regression"].uniform()).long()]
    noise = draws["regression"].normal(shape)
    level = (chosen / 1000).view(2, 1, 1, 1, 1)
    real_clips = clips.latents[order["clips"]]
    prediction = student((1 - level) * real_clips + level * noise, chosen, text["clips"])
    added, metrics = AVDObjective(config.objective)(x_0, prediction, noise - real_clips, chosen)
    (matching + added).backward()
    metrics |= {"loss": (matching + added).detach(), "matching/loss": matching.detach()}

    expected = torch.cat([parameter.grad.flatten() for parameter in student.module.parameters()])
    step = {}
    torch.testing.assert_close(step_gradients(trainer, step), expected, rtol=1e-4, atol=1e-7)
    for name, value in metrics.items():
        torch.testing.assert_close(step[name], value, rtol=1e-4, atol=1e-6)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")  # of the compiler's own making
@pytest.mark.skipif(not CXX, reason="needs a C++ compiler: torch.compile's default backend writes and builds C++")
def test_compiled_blocks_compute_the_same(make_trainer: MakeTrainer) -> None:
    torch.compiler.reset()
    results = []
    for compiled in (False, True):
        student = make_trainer(parallel={"compile": compiled, "activation_checkpointing": False}).student
        draws = SampleDraws((0,), range(2), torch.device("cpu"))
        velocity = student(draws.normal((16, 3, 4, 4)), torch.tensor([1000.0, 522.0]), draws.normal((4, 6)))
        velocity.square().mean().backward()
        results.append((velocity, [parameter.grad.full_tensor() for parameter in student.parameters()]))
    torch.compiler.reset()
    torch.testing.assert_close(results[1], results[0], rtol=1e-4, atol=1e-6)


def test_a_held_gradient_ratio_reaches_the_update(make_trainer: MakeTrainer) -> None:
    """The held run's first gradient is that of a run whose constant weight is scaled by hand."""

    def make(**objective: Any) -> Trainer:
        return make_trainer(objective={"motion": None, **objective}, max_gradient_norm=1e6)

    scale = first_step(make(gradient_ratio=0.5))["balance/scale"].item()
    assert scale != pytest.approx(1.0, rel=0.05)
    held, by_hand = make(gradient_ratio=0.5), make(regression={"weight": 2.0 * scale})
    torch.testing.assert_close(step_gradients(held), step_gradients(by_hand), rtol=1e-3, atol=1e-6)


def test_the_monitor_names_a_student_that_jitters(make_trainer: MakeTrainer, clips: CaptionedLatents) -> None:
    clips.latents.mul_(0.1)  # beside these, the samples of an untrained student are wild
    trainer = make_trainer(max_steps=120, online_updates=1, objective=DMD_ALONE)
    list(trainer.run())
    assert {"jitter", "oversaturated"} <= {finding.kind for finding in trainer.monitor.findings}


def test_a_cache_that_waits_for_its_update_gets_one_per_step(make_trainer: MakeTrainer) -> None:
    trainer = make_trainer(objective={"regression": {"auto_update": False}})
    first_step(trainer)
    assert trainer.objective.regression is not None
    assert trainer.objective.regression.cache.seen.any()


def test_a_step_with_a_bad_clip_is_skipped_and_nothing_is_poisoned(
    make_trainer: MakeTrainer, clips: CaptionedLatents
) -> None:
    trainer = make_trainer(max_steps=10)
    clips.latents.fill_(torch.nan)
    before = weights(trainer.student).clone()
    assert first_step(trainer)["skipped"] == 1
    assert torch.equal(weights(trainer.student), before)
    assert trainer.objective.regression is not None
    assert not trainer.objective.regression.cache.seen.any()
    with trainer.ema.average_parameters():
        assert weights(trainer.student).isfinite().all()


def test_a_run_that_stays_non_finite_stops(make_trainer: MakeTrainer, clips: CaptionedLatents) -> None:
    trainer = make_trainer(max_steps=10, max_skipped_steps=3)
    clips.latents.fill_(torch.nan)
    with pytest.raises(NonFiniteError, match=r"of the student is not finite.*3 in a row"):
        list(trainer.run())
    assert trainer.step == 3


def test_gradients_are_clipped(make_trainer: MakeTrainer) -> None:
    clipped, free = (step_gradients(make_trainer(max_gradient_norm=norm)).norm() for norm in (1e-3, 1e6))
    assert clipped <= 1.01e-3 < free


def test_the_first_steps_of_the_tiny_preset_follow_the_golden_curve(ranks: Ranks) -> None:
    """If these numbers change, so has the method: understand why, then rewrite the file from what is printed."""
    config = load_config(TrainConfig, "tiny", ["max_steps=4", "data.clips=16"])
    trainer = Trainer(config, load_models(config, ranks), load_data(config, 32, 16), ranks)
    names = ("loss", "matching/loss", "regression/loss", "motion/loss", "online/loss", "gradient_norm")
    curve = [{name: metrics[name].item() for name in names} for metrics in trainer.run()]
    print(json.dumps(curve, indent=1))
    golden = json.loads((Path(__file__).parents[2] / "assets" / "golden_tiny_first_steps.json").read_text())
    assert len(curve) == len(golden)
    for step, expected in zip(curve, golden, strict=True):
        assert step == pytest.approx(expected, rel=2e-3, abs=1e-5)
