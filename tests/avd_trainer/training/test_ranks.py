"""A run does not depend on how many ranks it has, nor on how they share it out."""

import copy
import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch

from avd_core import NonFiniteError
from avd_trainer.data.in_memory import CaptionedLatents, InMemoryData
from avd_trainer.data.order import ShuffledOrder
from avd_trainer.data.sources import TrainingData
from avd_trainer.models.roles import load_models
from avd_trainer.models.text_encoders.hashed import HashTextEmbedding
from avd_trainer.models.transformer import VelocityModel
from avd_trainer.runtime.errors import UserError
from avd_trainer.runtime.ranks import Ranks, join_ranks
from avd_trainer.training.config import TrainConfig
from avd_trainer.training.trainer import Trainer
from launches import on_ranks

MakeConfig = Callable[..., TrainConfig]

CURVE = (
    "loss", "matching/loss", "regression/loss", "motion/loss", "online/loss", "gradient_norm",
    "online/gradient_norm", "sample/std", "regression/timesteps", "regression/sample_losses", "regression/means",
)  # fmt: skip

LORA = {"rank": 2, "alpha": 2.0}
# The first with both kinds of term that look at more than one sample: the motion's variance and the loss means.
PLAIN = {"objective": {"motion": {"sync_ranks": True}}, "parallel": {"activation_checkpointing": False}}
LAYOUTS = {
    "plain": PLAIN,
    "micro batches": {"micro_batch_size": 1, "objective": {"motion": {"sync_ranks": False}}},
    "adapters": {**PLAIN, "student_lora": LORA, "online_lora": LORA, "parallel": {"activation_checkpointing": True}},
}


@pytest.fixture
def data(clips: CaptionedLatents) -> InMemoryData:
    return InMemoryData(clips, HashTextEmbedding(4, 6))


@dataclasses.dataclass
class Skipped:
    """A run with steps that are not finite, seen from one rank."""

    skipped: list[float]  # by step, as logged
    counted: tuple[int, int]  # by the guards of student and online model
    weights: list[torch.Tensor]  # of the student, after each step
    error: str  # that ended it


def build(config: TrainConfig, data: InMemoryData, ranks: Ranks) -> Trainer:
    return Trainer(config, load_models(config, ranks), TrainingData(data, data), ranks)


@dataclasses.dataclass
class Seen:
    """A run, seen from one rank."""

    curve: list[dict[str, Any]]  # what each step logged
    norms: list[float]  # of all gradients of student and online model, which Adam would forgive a wrong scale
    weights: torch.Tensor  # of both, at the end


def run(config: TrainConfig, data: InMemoryData) -> Seen:
    with join_ranks(config.parallel.replicate) as ranks:
        trainer = build(config, data, ranks)
        norms, clip = [], trainer._clip_gradients

        def clip_and_note(model: VelocityModel) -> torch.Tensor:
            norms.append(norm := clip(model))
            return norm

        trainer._clip_gradients = clip_and_note  # type: ignore[method-assign]
        curve = [{name: metrics[name].tolist() for name in CURVE} for metrics in trainer.run()]
        weights = [p.full_tensor().flatten() for role in (trainer.student, trainer.online) for p in role.parameters()]
        return Seen(curve, torch.stack(norms).tolist(), torch.cat(weights).detach())


def assert_same(actual: Seen, expected: Seen) -> None:
    for step, reference in zip(actual.curve, expected.curve, strict=True):
        for name in CURVE:
            assert step[name] == pytest.approx(reference[name], rel=1e-3, abs=1e-6), name
    assert actual.norms == pytest.approx(expected.norms, rel=1e-3)
    torch.testing.assert_close(actual.weights, expected.weights, rtol=0, atol=1e-3)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_curve_is_that_of_one_rank(make_config: MakeConfig, data: InMemoryData, layout: str) -> None:
    config = make_config(max_steps=4, batch_size=4, online_updates=2, **LAYOUTS[layout])
    expected = run(config, data)
    for size in (2, 4):
        for rank in on_ranks(size, run, config, data):
            assert_same(rank, expected)


def test_the_curve_is_that_of_one_rank_with_hybrid_sharding(make_config: MakeConfig, data: InMemoryData) -> None:
    changes = {"max_steps": 4, "batch_size": 4, "online_updates": 2, **PLAIN}
    expected = run(make_config(**changes), data)
    for rank in on_ranks(4, run, make_config(**changes | {"parallel": {"replicate": 2}}), data):
        assert_same(rank, expected)


def run_with_bad_clips(config: TrainConfig, data: InMemoryData, bad: list[int]) -> Skipped:
    with join_ranks() as ranks:
        trainer = build(config, data, ranks)
        data.clips.latents[bad] = torch.nan
        guard = trainer.callbacks.callbacks["guard"]
        seen = Skipped([], (0, 0), [], "")
        try:
            for metrics in trainer.run():
                seen.skipped.append(metrics["skipped"].item())
                parameters = [parameter.full_tensor().flatten() for parameter in trainer.student.parameters()]
                seen.weights.append(torch.cat(parameters).detach())
        except NonFiniteError as error:
            seen.error = str(error)
        seen.counted = guard.skipped, trainer.online_guard.skipped  # type: ignore[attr-defined]
    return seen


def test_a_bad_gradient_on_one_rank_skips_the_step_on_all(make_config: MakeConfig, data: InMemoryData) -> None:
    config = make_config(max_steps=3, batch_size=2, online_updates=1, **PLAIN)
    # The clip that the last rank reads in the second step, and nobody in the others.
    bad = [ShuffledOrder(len(data), seed=1)[3]]
    alone = run_with_bad_clips(config, copy.deepcopy(data), bad)
    for rank in on_ranks(2, run_with_bad_clips, config, data, bad):
        assert rank.skipped == alone.skipped == [0, 1, 0]
        assert rank.counted == (1, 0)
        assert torch.equal(rank.weights[1], rank.weights[0])
        assert not torch.equal(rank.weights[2], rank.weights[1])
        torch.testing.assert_close(rank.weights[2], alone.weights[2], rtol=0, atol=1e-4)
        assert rank.error == ""


def test_a_run_that_stays_bad_on_one_rank_ends_on_all(make_config: MakeConfig, data: InMemoryData) -> None:
    config = make_config(max_steps=5, batch_size=2, online_updates=1, max_skipped_steps=2, **PLAIN)
    bad = ShuffledOrder(len(data), seed=1).batch(3, 3)[::2]
    for rank in on_ranks(2, run_with_bad_clips, config, data, bad):
        assert rank.skipped == [0, 1]  # the third step is not over
        assert "Step 3 of the student is not finite" in rank.error
        assert "2 in a row" in rank.error


@pytest.mark.parametrize(
    ("size", "changes", "message"),
    [
        (2, {"batch_size": 3}, r"batch_size 3 cannot be shared out equally among 2 ranks\. Choose a multiple"),
        (
            2,
            {"batch_size": 8, "micro_batch_size": 3},
            "micro_batch_size 3 does not divide a rank's share of 4 samples",
        ),
        (1, {"batch_size": 2, "micro_batch_size": 4}, r"micro_batch_size 4 .* share of 2 samples .*Choose a divisor"),
    ],
)
def test_a_batch_that_cannot_be_shared_out_is_refused(
    make_config: MakeConfig, data: InMemoryData, ranks: Ranks, size: int, changes: dict[str, int], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        build(make_config(**changes), data, dataclasses.replace(ranks, size=size))


def test_copies_that_do_not_divide_the_ranks_are_refused() -> None:
    with pytest.raises(UserError, match=r"parallel\.replicate is 2, which does not divide the 1 rank"), join_ranks(2):
        pass
