"""The weight as it would come out, on clips and models whose losses are known."""

import io
import math
import re
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console
from torch import Tensor

from avd_core import RegressionConfig
from avd_trainer.evaluation.sharpness import (
    ClipBatch,
    SharpnessCalibration,
    calibrate_sharpness,
    render_sharpness,
)
from avd_trainer.models.condition import Condition
from avd_trainer.runtime.draws import Draws
from avd_trainer.runtime.errors import UserError

SHAPE = (2, 3, 4, 4)
FEW_STEPS = (1000.0, 500.0)


class Errs:
    """A model whose prediction is off by what the text says, at every timestep, for clips of one value each."""

    def __init__(self, place: int) -> None:
        self.place = place

    def __call__(self, x_t: Tensor, timesteps: Tensor, condition: Condition) -> Tensor:
        def wide(values: Tensor) -> Tensor:
            return values.view(-1, 1, 1, 1, 1)

        said = condition.text[:, 0]
        clip, error, sigma = wide(said[:, 0]), wide(said[:, self.place]), wide(timesteps / 1000)
        noise = (x_t - (1 - sigma) * clip) / sigma
        return noise - clip + error


STUDENT, TEACHER = Errs(1), Errs(2)


def batches(values: Any, losses: Any, teacher_losses: Any = None, size: int = 7) -> list[ClipBatch]:
    """Clips that are ``values`` throughout, with the losses that the two models have on them."""
    columns = [np.asarray(values), np.sqrt(losses), np.sqrt(losses if teacher_losses is None else teacher_losses)]
    text = torch.tensor(np.stack(columns, axis=1), dtype=torch.float32).unsqueeze(1)
    clips = text[:, :, 0].reshape(-1, 1, 1, 1, 1).expand(-1, *SHAPE)
    rows = [range(start, min(start + size, len(clips))) for start in range(0, len(clips), size)]
    return [
        ClipBatch(
            clips[own.start : own.stop], Condition(text[own.start : own.stop]), Draws((0,), own, torch.device("cpu"))
        )
        for own in rows
    ]


def calibrated(clips: list[ClipBatch], student: Any = STUDENT, **options: Any) -> SharpnessCalibration:
    return calibrate_sharpness(student, TEACHER, clips, FEW_STEPS, RegressionConfig(**options))


def made_up(count: int = 200, spread: float = 0.3) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Values of clips, losses of the student and of the teacher, all independent."""
    draws = np.random.default_rng(0)
    losses = 5.0 + spread * draws.standard_normal(count)
    return 1.0 + draws.random(count), losses, 0.5 + draws.random(count)


@pytest.mark.parametrize("deviation", ["absolute", "standardized"])
@pytest.mark.parametrize("judged", ["loss", "relative", "excess"])
def test_numbers_are_those_of_plain_code(judged: str, deviation: str) -> None:
    values, losses, teacher_losses = made_up()
    found = calibrated(batches(values, losses, teacher_losses), judged=judged, deviation=deviation, sharpness=2.0)
    number = {"loss": losses, "relative": losses / values**2, "excess": losses - teacher_losses}[judged]
    deviations = number - number.mean()
    if deviation == "standardized":
        deviations = 0.3 * deviations / number.std()
    weights = 1 / (1 + np.exp(2.0 * deviations))
    assert found.samples == 200
    assert [step.timestep for step in found.steps] == list(FEW_STEPS)
    for step in found.steps:
        assert (step.mean, step.spread) == pytest.approx((number.mean(), number.std()), rel=1e-3)
        assert step.steepness == pytest.approx(2.0 * deviations.std(), rel=1e-3)
        assert step.weights == pytest.approx(np.quantile(weights, [0.05, 0.5, 0.95]), abs=1e-3)
        assert step.at_the_ends == pytest.approx(np.mean((weights < 0.1) | (weights > 0.9)), abs=0.011)
        assert step.energy_correlation == pytest.approx(np.corrcoef(number, values**2)[0, 1], abs=1e-3)
    assert found.paper_sharpness == pytest.approx(0.9 / deviations.std(), rel=1e-3)


def test_the_papers_spread_needs_no_remark() -> None:
    values, losses, _ = made_up()
    found = calibrated(batches(values, losses))
    assert found.remarks == ()
    assert found.paper_sharpness == pytest.approx(3.0, rel=0.1)


@pytest.mark.parametrize(
    ("spread", "options", "expected"),
    [
        (1.4, {}, [r"at t = 1000, 500 the weight is a switch.*60% .* with a sharpness of 3, or .*sharpness=0\.6\d,"]),
        (1.4, {"deviation": "standardized"}, []),
        (1.4, {"sharpness": 0.65}, []),
        (
            0.3,
            {"sharpness": 60.0, "deviation": "standardized"},
            [r"is a switch.* right where losses fall into two groups.* set method\.regression\.sharpness=3,"],
        ),
        (0.02, {}, []),  # narrow, and still told apart
        (0.005, {}, [r"a constant.*off by 0\.73 more than the mean.*deviation=standardized with a sharpness of 3"]),
        (0.3, {"sharpness": 0.05, "deviation": "standardized"}, [r"fit their captions\. .*regression\.sharpness=3,"]),
        (0.02, {"deviation": "standardized"}, []),
        (0.02, {"sharpness": 0.0}, []),  # a constant is what was asked for
    ],
)
def test_a_switch_and_a_constant_are_named_with_the_remedy(
    spread: float, options: dict[str, Any], expected: list[str]
) -> None:
    values, losses, _ = made_up(spread=spread)
    found = calibrated(batches(values, losses), **options)
    assert len(found.remarks) == len(expected)
    for remark, words in zip(found.remarks, expected, strict=True):
        assert re.search(words, remark), remark


def test_the_remedy_helps() -> None:
    values, losses, _ = made_up(spread=1.4)
    clips = batches(values, losses)
    before = calibrated(clips)
    assert before.steps[0].is_switch
    after = calibrated(clips, sharpness=before.paper_sharpness)
    assert after.steps[0].steepness == pytest.approx(0.9)
    assert after.remarks == ()


@pytest.mark.parametrize("judged", ["loss", "excess"])
@pytest.mark.parametrize("other", [{"deviation": "standardized"}, {"sharpness": 0.2}])
def test_other_weights_of_the_same_losses_are_those_of_another_look(judged: str, other: dict[str, Any]) -> None:
    clips = batches(*made_up(spread=1.4))
    found, again = calibrated(clips, judged=judged), calibrated(clips, judged=judged, **other)
    assert found.reweighed(found.options) == found
    told = found.reweighed(again.options)
    assert (told.options, told.samples, told.remarks) == (again.options, again.samples, again.remarks)
    for step, expected in zip(told.steps, again.steps, strict=True):
        assert step.model_dump() == {
            # In float32 two looks agree to rounding.
            name: value if value is None else pytest.approx(value, rel=1e-4, abs=1e-6)
            for name, value in expected.model_dump().items()
        }


def test_a_weight_that_would_judge_energy_is_named() -> None:
    values, _, teacher_losses = made_up()
    energetic = batches(values, 0.2 * values**2 + 0.1 * teacher_losses, teacher_losses)
    found = calibrated(energetic)
    assert found.steps[0].energy_correlation > 0.9  # type: ignore[operator]
    assert ["judged=relative" in remark for remark in found.remarks] == [True]
    assert not calibrated(energetic[:1], deviation="standardized").remarks  # 7 clips are too few to say so
    assert not calibrated(energetic, sharpness=0.5).remarks  # no clip loses much
    assert not calibrated(energetic, judged="relative", deviation="standardized").remarks


@pytest.mark.parametrize(("sign", "contrast"), [(1, "high"), (-1, "low")])
def test_the_sign_says_which_clips_would_be_turned_off(sign: int, contrast: str) -> None:
    values, _, _ = made_up()
    (remark,) = calibrated(batches(values, 2 + sign * 0.2 * values**2)).remarks
    assert f"(correlation {sign}.00): it would turn off clips of {contrast} contrast" in remark


def test_a_student_that_starts_as_its_teacher_has_no_excess() -> None:
    values, losses, _ = made_up()
    found = calibrated(batches(values, losses), judged="excess")
    assert {step.spread for step in found.steps} == {0.0}
    assert found.paper_sharpness is None
    (remark,) = found.remarks
    assert "Set method.regression.deviation=standardized" in remark
    assert calibrated(batches(values, losses), judged="excess", deviation="standardized").remarks == ()


def test_noise_belongs_to_a_clip() -> None:
    def still(x_t: Tensor, timesteps: Tensor, condition: Condition) -> Tensor:
        return torch.zeros_like(x_t)

    values, losses, _ = made_up(count=12)
    one, other = (calibrated(batches(values, losses, size=size), still) for size in (1, 5))
    for step, again in zip(one.steps, other.steps, strict=True):
        assert (step.mean, step.spread) == pytest.approx((again.mean, again.spread), rel=1e-5)
    assert one.steps[0].mean != one.steps[1].mean  # each step has noise of its own


def test_it_can_be_read_on_a_terminal_and_by_a_program() -> None:
    values, losses, _ = made_up(spread=1.4)
    found = calibrated(batches(values, losses))
    output = io.StringIO()
    Console(file=output, width=120).print(render_sharpness(found))
    text = " ".join(output.getvalue().split())
    step = found.steps[0]
    assert f"1000 │ {step.mean:.3g} │ {step.spread:.3g} │ {step.steepness:.2f} │" in text
    assert "the weight is a switch" in text
    assert SharpnessCalibration.model_validate_json(found.model_dump_json()) == found


def test_what_cannot_be_measured_is_named() -> None:
    with pytest.raises(UserError, match=r"there are 0 of them\. Give at least two"):
        calibrated([])
    with pytest.raises(UserError, match="there are 1 of them"):
        calibrated(batches([1.0], [1.0]))
    with pytest.raises(UserError, match="Losses of real clips at t = 1000 are not finite"):
        calibrated(batches([1.0, 2.0], [1.0, math.nan]))
