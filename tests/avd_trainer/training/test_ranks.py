"""A run does not depend on how many ranks it has, nor on how they share it out."""

import copy
import dataclasses
import os
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from avd_core import NonFiniteError
from avd_trainer.data.sources import TrainingData
from avd_trainer.runtime.errors import UserError
from avd_trainer.runtime.ranks import Ranks, join_ranks
from avd_trainer.training.config import TrainConfig
from avd_trainer.training.trainer import Trainer
from launches import StandingRanks
from runs import LORA, MakeConfig, order_of, weights

CURVE = (
    "loss", "matching/loss", "regression/loss", "motion/loss", "online/loss", "gradient_norm",
    "online/gradient_norm", "sample/std", "regression/timesteps", "regression/sample_losses", "regression/means",
)  # fmt: skip

PLAIN: dict[str, Any] = {"parallel": {"activation_checkpointing": False}}
# The first with both kinds of term that look at more than one sample: the motion's variance and the loss means.
LAYOUTS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "plain": ({"motion": {"sync_ranks": True}}, PLAIN),
    "micro batches": ({"motion": {"sync_ranks": False}}, {"micro_batch_size": 1}),
    "adapters": (
        {"student": {"lora": LORA}, "online": {"lora": LORA}},
        {"parallel": {"activation_checkpointing": True}},
    ),
}


@dataclasses.dataclass
class Skipped:
    """A run with steps that are not finite, seen from one rank."""

    skipped: list[float]  # by step, as logged
    counted: tuple[int, int]  # by the guards of student and online model
    weights: list[torch.Tensor]  # of the student, after each step
    error: str  # that ended it


@dataclasses.dataclass
class Seen:
    """A run, seen from one rank."""

    curve: list[dict[str, Any]]  # what each step logged
    norms: list[float]  # of all gradients of student and online model, which Adam would forgive a wrong scale
    weights: torch.Tensor  # of both, at the end


def run(config: TrainConfig, data: TrainingData) -> Seen:
    with join_ranks(config.parallel.replicate) as ranks:
        trainer = Trainer(config, data, ranks)
        norms, clip = [], trainer._clip_gradients

        def clip_and_note(role: str) -> torch.Tensor:
            norms.append(norm := clip(role))
            return norm

        trainer._clip_gradients = clip_and_note  # type: ignore[method-assign]
        curve = [{name: metrics[name].tolist() for name in CURVE} for metrics in trainer.run()]
        trained = [weights(trainer.models[role]) for role in ("student", "online")]
        return Seen(curve, torch.stack(norms).tolist(), torch.cat(trained))


def assert_same(actual: Seen, expected: Seen) -> None:
    for step, reference in zip(actual.curve, expected.curve, strict=True):
        for name in CURVE:
            assert step[name] == pytest.approx(reference[name], rel=1e-3, abs=1e-6), name
    assert actual.norms == pytest.approx(expected.norms, rel=1e-3)
    torch.testing.assert_close(actual.weights, expected.weights, rtol=0, atol=1e-3)


@pytest.fixture(scope="module")
def on_four_ranks() -> Iterator[StandingRanks]:
    with StandingRanks(4) as ranks:
        yield ranks


def process_and_size(fails_on: int | None = None) -> tuple[int, int]:
    with join_ranks() as ranks:
        if ranks.rank == fails_on:
            raise ValueError("the data ended")
        ranks.barrier()
        return os.getpid(), ranks.size


def test_ranks_stay_from_call_to_call_and_one_that_raises_fails_its_call_alone(on_two_ranks: StandingRanks) -> None:
    """What the tests of this suite that run on several ranks rest on."""
    (first, size), (second, _) = on_two_ranks(process_and_size)
    assert size == 2
    assert len({os.getpid(), first, second}) == 3
    assert on_two_ranks(process_and_size) == [(first, 2), (second, 2)]
    # The other one, whose peer is gone, may have ended first.
    with pytest.raises(RuntimeError, match=r"(?s)ended with exit code 1.*ValueError: the data ended"):
        on_two_ranks(process_and_size, 1)
    assert not {first, second} & {process for process, _ in on_two_ranks(process_and_size)}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_curve_is_that_of_one_rank(
    make_config: MakeConfig,
    data: TrainingData,
    on_two_ranks: StandingRanks,
    on_four_ranks: StandingRanks,
    layout: str,
) -> None:
    method, changes = LAYOUTS[layout]
    config = make_config(method={"online_updates": 2, **method}, max_steps=4, batch_size=4, **changes)
    expected = run(config, data)
    for on_ranks in (on_two_ranks, on_four_ranks):
        for rank in on_ranks(run, config, data):
            assert_same(rank, expected)


def test_the_curve_is_that_of_one_rank_with_hybrid_sharding(
    make_config: MakeConfig, data: TrainingData, on_four_ranks: StandingRanks
) -> None:
    changes = {"max_steps": 4, "batch_size": 4, "method": {"online_updates": 2, "motion": {"sync_ranks": True}}}
    expected = run(make_config(**changes, **PLAIN), data)
    for rank in on_four_ranks(run, make_config(**changes, parallel={"replicate": 2}), data):
        assert_same(rank, expected)


def run_with_bad_clips(config: TrainConfig, data: TrainingData, bad: list[int]) -> Skipped:
    with join_ranks() as ranks:
        trainer = Trainer(config, data, ranks)
        data.clips.clips.latents[bad] = torch.nan  # type: ignore[attr-defined]
        seen = Skipped([], (0, 0), [], "")
        try:
            for metrics in trainer.run():
                seen.skipped.append(metrics["skipped"].item())
                seen.weights.append(weights(trainer.models["student"]))
        except NonFiniteError as error:
            seen.error = str(error)
        guards = [trainer.callbacks[role].callbacks["guard"] for role in ("student", "online")]
        seen.counted = guards[0].skipped, guards[1].skipped  # type: ignore[attr-defined]
    return seen


def test_a_bad_gradient_on_one_rank_skips_the_step_on_all(
    make_config: MakeConfig, data: TrainingData, on_two_ranks: StandingRanks
) -> None:
    config = make_config(method={"online_updates": 1}, max_steps=3, **PLAIN)
    # The clip that the last rank reads in the second step, and nobody in the others.
    bad = [order_of("clips")[3]]
    alone = run_with_bad_clips(config, copy.deepcopy(data), bad)
    for rank in on_two_ranks(run_with_bad_clips, config, data, bad):
        assert rank.skipped == alone.skipped == [0, 1, 0]
        assert rank.counted == (1, 0)
        assert torch.equal(rank.weights[1], rank.weights[0])
        assert not torch.equal(rank.weights[2], rank.weights[1])
        torch.testing.assert_close(rank.weights[2], alone.weights[2], rtol=0, atol=1e-4)
        assert rank.error == ""


def test_a_run_that_stays_bad_on_one_rank_ends_on_all(
    make_config: MakeConfig, data: TrainingData, on_two_ranks: StandingRanks
) -> None:
    config = make_config(method={"online_updates": 1}, max_steps=5, max_skipped_steps=2, **PLAIN)
    bad = order_of("clips").batch(3, 3)[::2]
    for rank in on_two_ranks(run_with_bad_clips, config, data, bad):
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
            "micro_batch_size 3 does not divide a rank's share of 4 examples",
        ),
        (1, {"batch_size": 2, "micro_batch_size": 4}, r"micro_batch_size 4 .* share of 2 examples .*Choose a divisor"),
    ],
)
def test_a_batch_that_cannot_be_shared_out_is_refused(
    make_config: MakeConfig, data: TrainingData, ranks: Ranks, size: int, changes: dict[str, int], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        Trainer(make_config(**changes), data, dataclasses.replace(ranks, size=size))


def test_copies_that_do_not_divide_the_ranks_are_refused() -> None:
    with pytest.raises(UserError, match=r"parallel\.replicate is 2, which does not divide the 1 rank"), join_ranks(2):
        pass
