"""What LCM, PCM and DCM compute; tests/hosts holds it against their authors' code."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from pydantic import ValidationError
from torch import Tensor

from avd_core import NonFiniteError, shift_timesteps
from avd_trainer.data.batches import Batch
from avd_trainer.methods.base import Setting, Turn
from avd_trainer.methods.consistency import Consistency
from avd_trainer.methods.consistency_pair import Pair, mean_distance
from avd_trainer.methods.dcm import DCMMethodConfig
from avd_trainer.methods.lcm import LCMMethodConfig
from avd_trainer.methods.pcm import PCMMethodConfig
from avd_trainer.methods.registry import load_method
from avd_trainer.models.condition import Condition
from avd_trainer.models.roles import Average, trained_parameters
from avd_trainer.models.samplers import FewStepSampler
from avd_trainer.runtime.draws import Draws
from avd_trainer.training.trainer import Trainer
from runs import MakeTrainer, first_step

SHAPE = (2, 5, 2, 2)
STUDENT = Turn("student", ("clips",))


class Towards:
    """A model whose trajectories are straight lines to a clip; its answers can be off."""

    def __init__(self, clip: Tensor, off: float = 0.0) -> None:
        self.clip, self.off = clip, torch.tensor(off, requires_grad=True)
        self.times: list[Tensor] = []

    def __call__(self, x_t: Tensor, timesteps: Tensor, condition: Condition) -> Tensor:
        self.times.append(timesteps)
        frames = torch.arange(x_t.shape[2]).view(-1, 1, 1)
        velocity = (x_t - self.clip) / (timesteps / 1000).clamp(min=1e-6).view(-1, 1, 1, 1, 1)
        return velocity + self.off * (1 + frames**2)


def method_of(kind: str, models: dict[str, Any], **options: Any) -> Consistency:
    method: Any = load_method(kind)
    setting = Setting(SHAPE, torch.empty(0), torch.device("cpu"))
    alone = {"detail": None} if kind == "dcm" else {}
    found: Consistency = method(method.Config(**{"guidance_scale": 1.0, **alone, **options}), models, setting)
    return found


def batch_and_draws(count: int = 64) -> tuple[dict[str, Batch], Draws]:
    clips = torch.randn(count, *SHAPE, generator=torch.Generator().manual_seed(0))
    return {"clips": Batch(clips, Condition(torch.zeros(count, 1, 1)))}, Draws((0,), range(count), torch.device("cpu"))


def pair_of(kind: str, above: int = 0, upto: int | None = None, **options: Any) -> tuple[Pair, dict[str, Towards]]:
    off = {"student": 0.3, "ema": 0.2, "teacher": 0.0}
    models = {name: Towards(torch.zeros(SHAPE), by) for name, by in off.items()}
    method = method_of(kind, models, **options)
    upto = method.config.points if upto is None else upto
    return method.pair(*batch_and_draws(), above=above, upto=upto), models


# --- Points, phases, ends


def test_points_are_even_before_the_shift() -> None:
    config = LCMMethodConfig(points=4, shift=3.0, lowest=10.0, few_steps=(1000,))
    even = torch.tensor([10.0, 250.0, 500.0, 750.0, 1000.0])
    torch.testing.assert_close(config.trajectory(), shift_timesteps(even, 3.0))


def test_the_teacher_steps_from_a_point_to_the_one_below() -> None:
    for kind, who in (("lcm", "ema"), ("pcm", "student")):
        _, models = pair_of(kind)
        points = method_of(kind, models).config.trajectory()
        upper, lower = models["teacher"].times[0], models[who].times[0]
        assert torch.equal(models["student"].times[-1], upper)
        place = torch.searchsorted(points, upper)
        assert torch.equal(points[place], upper)
        assert torch.equal(points[place - 1], lower)
        assert len(set(place.tolist())) > 20
        assert 1 <= place.min() <= 3
        assert place.max() >= len(points) - 3


def test_phases_end_where_the_next_step_begins() -> None:
    """Each prediction goes on along the student's velocity to the greatest of the few steps below, or to the lowest."""
    few_steps = [1000.0, 900.0, 750.0, 500.0]
    pair, models = pair_of("pcm", few_steps=few_steps)
    lowest = PCMMethodConfig().trajectory()[0].item()
    for row, t in enumerate(models["student"].times[-1].tolist()):
        end = max(edge for edge in (*few_steps, lowest) if edge < t - 0.1)
        along = (end - t) / 1000 * pair.rollout.velocity[row]
        torch.testing.assert_close(pair.prediction[row], pair.rollout.x_t[row] + along)


def test_at_the_lowest_point_of_a_phase_the_target_is_the_teachers() -> None:
    pair, models = pair_of("dcm", above=35, upto=36)
    t, end = DCMMethodConfig().trajectory()[[36, 35]].tolist()
    assert set(models["student"].times[-1].tolist()) == {t}
    teacher = models["teacher"](pair.rollout.x_t, models["student"].times[-1], Condition(torch.empty(0)))
    torch.testing.assert_close(pair.target, (pair.rollout.x_t + (end - t) / 1000 * teacher).detach())


def test_lcm_predicts_the_clean_clip() -> None:
    pair, _ = pair_of("lcm")
    torch.testing.assert_close(pair.prediction, pair.x_0)
    pair, _ = pair_of("pcm")
    assert (pair.prediction - pair.x_0).abs().max() > 0.1


@pytest.mark.parametrize("kind", ["lcm", "pcm", "dcm"])
def test_on_straight_lines_there_is_nothing_to_learn(kind: str) -> None:
    clip = torch.randn(SHAPE)
    for off, most in ((0.0, 1e-5), (0.5, None)):
        models = {"student": Towards(clip, off), "ema": Towards(clip), "teacher": Towards(clip)}
        method = method_of(kind, models)
        (loss,) = method.losses(STUDENT, *batch_and_draws())
        assert loss.value < most if most else loss.value > 1e-4


@pytest.mark.parametrize("kind", ["lcm", "pcm", "dcm"])
def test_added_terms_are_given_the_clean_clip_and_not_the_end_of_a_phase(kind: str) -> None:
    """On straight lines to a clip that is the clip itself, from any point."""
    clip = torch.randn(SHAPE)
    models = {name: Towards(clip) for name in ("student", "ema", "teacher")}
    (loss,) = method_of(kind, models).losses(STUDENT, *batch_and_draws())
    assert loss.samples is not None
    torch.testing.assert_close(loss.samples, clip.expand(64, *SHAPE), rtol=0, atol=1e-4)
    assert loss.cut is not None
    assert torch.autograd.grad(loss.samples.sum(), loss.cut.output)[0].abs().min() > 0


def test_who_is_sampled_where_nothing_is_trained_is_warned() -> None:
    """And not refused: there are students of such steps."""
    (warning,) = LCMMethodConfig(few_steps=(1000.0, 900.0)).warnings(1, None)
    assert "few_steps must be points of the trajectory" in warning
    assert "[1000.0, 904.76]" in warning
    assert DCMMethodConfig(few_steps=(1000.0, 16.7)).warnings(1001, None)  # where the trajectory ends
    for config in (LCMMethodConfig(), PCMMethodConfig(), DCMMethodConfig()):
        assert not config.warnings(1001, None)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            lambda: PCMMethodConfig(few_steps=(1000.0, 898.0, 750.0)),
            "few_steps must be points.* nearest are .*900.0",
        ),
        (lambda: PCMMethodConfig(few_steps=(900.0, 750.0)), "few_steps must begin at 1000"),
        (lambda: LCMMethodConfig(lowest=20.0), "lowest must be below the first of 50 points, 20, got 20"),
        (lambda: DCMMethodConfig(boundary=50), "boundary must be below points, 50, got 50"),
    ],
)
def test_what_does_not_fit_is_refused(config: Any, message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        config()


# --- Losses


def test_the_distance_is_pseudo_huber_or_squared() -> None:
    prediction, target = torch.tensor([3.0, 0.0, -4.0]), torch.zeros(3)
    assert mean_distance(prediction, target).item() == pytest.approx(25 / 3)
    by_hand = sum((d * d + 0.04) ** 0.5 - 0.2 for d in (3.0, 0.0, -4.0)) / 3
    assert mean_distance(prediction, target, huber=0.2).item() == pytest.approx(by_hand)


def test_the_semantic_expert_learns_at_high_noise_how_frames_change() -> None:
    pair, models = pair_of("dcm", above=35)
    method = method_of("dcm", models, coherence_weight=2.0)
    (loss,) = method.losses(STUDENT, *batch_and_draws())
    assert (models["student"].times[-1] > DCMMethodConfig().trajectory()[35]).all()
    changes = [x[:, :, 3:] - x[:, :, :-3] for x in (pair.prediction, pair.target)]
    expected = mean_distance(pair.prediction, pair.target, huber=0.001) + 2.0 * F.mse_loss(*changes)
    torch.testing.assert_close(loss.value, expected)
    assert loss.metrics["coherence/loss"] > 0
    (loss,) = method_of("dcm", models, coherence_stride=5).losses(STUDENT, *batch_and_draws())
    assert loss.metrics["coherence/loss"] == 0


def test_lcm_follows_its_average_and_the_others_themselves() -> None:
    assert LCMMethodConfig().roles()["ema"] == Average("student", 0.95, asked=True, warmup=False)
    assert PCMMethodConfig().roles()["ema"] == Average("student", 0.99, asked=False, warmup=True)


# --- In a run


def test_phased_students_are_sampled_straight_on(make_trainer: MakeTrainer) -> None:
    for kind, sampler in (("lcm", "re-noise"), ("pcm", "ode"), ("dcm", "ode")):
        trainer = make_trainer(kind, max_steps=1)
        assert trainer.method.sampler == FewStepSampler(trainer.config.few_steps, sampler)  # type: ignore[arg-type]
        assert trainer.config.sampled_by == sampler


@pytest.mark.parametrize("kind", ["pcm", "regression"])
def test_the_monitors_see_samples_of_the_students_own(make_trainer: MakeTrainer, kind: str) -> None:
    trainer = make_trainer(kind, max_steps=4, method={"watch_every": 2})
    assert [turn.watched for step in range(1, 5) for turn in trainer.method.turns(step)] == [False, True] * 2
    seen: list[Tensor] = []
    monitor: Any = trainer.monitor
    signals = monitor._signals
    monitor._signals = lambda metrics: (seen.append(metrics.get("x_0")), signals(metrics))[1]
    assert all("x_0" not in metrics for metrics in trainer.run())
    assert [x_0 is None for x_0 in seen] == [True, False, True, False]
    assert seen[1].shape == (2, *trainer.latent_shape)


def turns(trainer: Trainer, step: int) -> list[tuple[str, str]]:
    return [(turn.role, turn.part) for turn in trainer.method.turns(step)]


def test_details_are_trained_after_the_semantic_part_which_goes_on(make_trainer: MakeTrainer) -> None:
    trainer = make_trainer("dcm", max_steps=3, method={"detail": {"after": 1}})
    assert turns(trainer, 1) == [("student", "")]
    assert turns(trainer, 2) == [("student", "detail"), ("discriminator", ""), ("student", "")]
    metrics = list(trainer.run())
    assert [("detail/loss" in step, "discriminator/loss" in step) for step in metrics] == [
        (False, False), (True, True), (True, True),
    ]  # fmt: skip
    pair, own, added = (float(metrics[1][f"detail/{name}"]) for name in ("consistency/loss", "adversarial", "feature"))
    assert float(metrics[1]["detail/loss"]) == pytest.approx(pair + 0.5 * own + 1.0 * added)
    assert metrics[1]["detail/gradient_norm"] > 0
    semantic = (float(metrics[1][f"{name}/loss"]) for name in ("consistency", "coherence"))
    assert float(metrics[1]["loss"]) == pytest.approx(sum(semantic))
    assert 0 < metrics[1]["discriminator/loss"] < 4


def semantic_moves(trainer: Trainer, details_by: float) -> list[float]:
    """How far the semantic turn of each step moves the student, where the details' loss is multiplied."""
    losses, moves, seen = trainer.method.losses, [], []

    def multiplied(turn: Turn, batch: Any, draws: Draws) -> Any:
        for loss in losses(turn, batch, draws):
            yield loss._replace(value=details_by * loss.value) if turn.part == "detail" else loss

    def weights(*_: Any) -> Tensor:
        return torch.cat(
            [p.detach().full_tensor().flatten() for p in trained_parameters(trainer.models["student"]).values()]
        )

    trainer.method.losses = multiplied  # type: ignore[method-assign]
    optimizer = trainer.optimizers["student", ""]
    optimizer.register_step_pre_hook(lambda *_: seen.append(weights()))
    optimizer.register_step_post_hook(lambda *_: moves.append(float((weights() - seen.pop()).norm())))
    list(trainer.run())
    return moves


def test_layout_is_learned_as_fast_beside_details_whose_gradients_are_large(make_trainer: MakeTrainer) -> None:
    options = {"max_steps": 8, "max_gradient_norm": None, "method": {"detail": {"after": 4}}}
    small, large = (semantic_moves(make_trainer("dcm", **options), by) for by in (1.0, 1e4))
    assert len(small) == len(large) == 8
    assert large == pytest.approx(small, rel=0.05)
    assert min(large[4:]) > 0.3 * max(large[1:4])


def with_bad_turns(trainer: Trainer, part: str) -> Trainer:
    """Whose student's turns of this part have a loss that is not finite."""
    losses = trainer.method.losses

    def spoiled(turn: Turn, batch: Any, draws: Draws) -> Any:
        for loss in losses(turn, batch, draws):
            bad = turn.role == "student" and turn.part == part
            yield loss._replace(value=loss.value * torch.nan) if bad else loss

    trainer.method.losses = spoiled  # type: ignore[method-assign]
    return trainer


@pytest.mark.parametrize(("part", "told"), [("detail", "student's part detail"), ("", "student")])
def test_turns_of_one_part_that_stay_non_finite_stop_the_run(part: str, told: str, make_trainer: MakeTrainer) -> None:
    options = {"max_steps": 5, "max_skipped_steps": 2, "method": {"detail": {"after": 1}}}
    run = with_bad_turns(make_trainer("dcm", **options), part).run()
    skipped = [float(next(run)["skipped"])]
    with pytest.raises(NonFiniteError, match=f"of the {told} is not finite.*2 in a row"):
        skipped.extend(float(metrics["skipped"]) for metrics in run)
    assert skipped == ([0.0, 1.0] if part else [1.0])


def test_a_step_of_two_turns_is_one_to_the_monitors(make_trainer: MakeTrainer) -> None:
    trainer = make_trainer("dcm", max_steps=2, method={"detail": {"after": 0}})
    looked: list[int] = []
    monitor: Any = trainer.monitor
    monitor.after_step = lambda step, metrics: looked.append(step)
    list(trainer.run())
    assert looked == [1, 2]
    assert trainer.averages["ema"].state_dict()["num_updates"] == 4  # each optimizer step


def test_without_details_nobody_judges(make_trainer: MakeTrainer) -> None:
    trainer = make_trainer("dcm", max_steps=1, method={"detail": None})
    assert "discriminator" not in trainer.models
    assert turns(trainer, 5000) == [("student", "")]
    assert "coherence/loss" in first_step(trainer)
