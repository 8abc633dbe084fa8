import io
import math
import weakref
from collections.abc import Iterator

import pytest
import torch
from rich.console import Console
from torch import Tensor

from avd_core import ClippedTemporalVarianceLoss, derive_floor
from avd_trainer.evaluation.calibration import Calibration, calibrate, render
from avd_trainer.runtime.errors import UserError

SHAPE = (4, 5, 6, 8)


def clips(count: int, *, motion: float = 1.0, spread: float = 1.0) -> Tensor:
    """Latents ``[N, 4, 5, 6, 8]``, of unit standard deviation if ``motion`` and ``spread`` are 1."""
    still = torch.randn(count, SHAPE[0], 1, *SHAPE[2:])
    moving = torch.randn(count, *SHAPE)
    return spread * (math.sqrt(max(0.0, 1 - motion**2)) * still + motion * moving)


def shown(calibration: Calibration) -> str:
    output = io.StringIO()
    Console(file=output, width=100).print(render(calibration))
    return " ".join(output.getvalue().split())


def test_numbers_are_those_of_all_clips_however_they_are_batched() -> None:
    teacher, real = clips(24) * torch.linspace(0.5, 2, 24).view(-1, 1, 1, 1, 1) + 0.3, clips(10, motion=0.5)
    calibration = calibrate(teacher.split([1, 7, 16]), real.split(3))
    assert calibration.floor == pytest.approx(derive_floor(teacher), abs=1e-5)
    assert calibration.paper_floor == pytest.approx(calibration.floor - 0.9)
    assert (calibration.teacher.samples, calibration.real.samples) == (24, 10)
    variances = teacher.var(dim=2, correction=0).mean(dim=(1, 2, 3))
    losses = -torch.log(variances + 1e-6)
    assert calibration.floor == calibration.teacher.clip_mean == pytest.approx(float(losses.mean()), abs=1e-5)
    assert calibration.teacher.temporal_loss == pytest.approx(-math.log(variances.mean()), abs=1e-5)
    assert calibration.teacher.clip_std == pytest.approx(float(losses.std(correction=0)), abs=1e-5)
    assert calibration.teacher.channel_std == pytest.approx(teacher.std(dim=(0, 2, 3, 4)).tolist(), rel=1e-3)
    assert calibration.teacher.clip_mean > calibration.teacher.temporal_loss


def test_the_term_stops_acting_at_the_floor() -> None:
    """A student that moves as the teacher has no gradient, one that moves less has."""
    teacher = clips(64, motion=0.7)
    calibration = calibrate([teacher], [clips(8)])
    motion = ClippedTemporalVarianceLoss(floor=calibration.floor + 1e-3)
    for samples, acts in ((teacher, False), (0.9 * teacher, True)):
        x_0 = samples.clone().requires_grad_()
        motion(x_0).loss.backward()
        assert bool(x_0.grad.any()) == acts  # type: ignore[union-attr]
    # The paper's margin: 2.5 times the variance.
    motion = ClippedTemporalVarianceLoss(floor=calibration.paper_floor)
    for factor, acts in ((2.4, True), (2.5, False)):
        x_0 = (math.sqrt(factor) * teacher).requires_grad_()
        motion(x_0).loss.backward()
        assert bool(x_0.grad.any()) == acts  # type: ignore[union-attr]


def test_batches_are_not_kept() -> None:
    alive: list[weakref.ref[Tensor]] = []

    def batches() -> Iterator[Tensor]:
        for _ in range(6):
            assert sum(batch() is not None for batch in alive) <= 1  # the one before is let go when the next is there
            batch = clips(2)
            alive.append(weakref.ref(batch))
            yield batch
            del batch

    assert calibrate(batches(), batches()).teacher.samples == 12


def test_half_precision_is_measured_in_full() -> None:
    teacher = 50 + clips(8)  # bfloat16 sums would be lost on the offset
    calibration = calibrate([teacher.bfloat16()], [teacher])
    assert calibration.teacher.std == pytest.approx(calibration.real.std, rel=0.01)
    assert calibration.teacher.temporal_loss == pytest.approx(calibration.real.temporal_loss, abs=0.02)


def test_still_clips_among_others_hardly_move_the_floor_and_are_told() -> None:
    moving = clips(24)
    some_still = moving.clone()
    some_still[:2] = torch.tensor([0.5, -0.5]).view(2, 1, 1, 1, 1)
    some_still[1] += 1e-5 * torch.randn(SHAPE)  # of rounding
    before, after = calibrate([moving], [moving]), calibrate([some_still], [some_still])
    assert after.floor == pytest.approx(before.floor, abs=0.05)
    assert after.floor == pytest.approx(derive_floor(some_still), abs=1e-5)
    assert after.real.clip_mean == after.floor
    assert after.real.clip_std < 0.5
    assert (before.real.still, after.real.still, after.real.samples) == (0, 2, 24)
    assert [remark.split(",")[0] for remark in after.remarks] == [
        "2 of 24 samples of the teacher stand still",
        "2 of 24 real clips stand still",
    ]


@pytest.mark.parametrize(
    ("teacher", "real", "expected"),
    [
        ({}, {}, []),
        ({}, {"spread": 1.5}, ["real clips spread 1.50 times"]),
        ({"spread": 2.0}, {"spread": 2.0}, []),
        ({"spread": 1.2}, {"spread": 0.9}, ["real clips spread 0.75 times"]),
        ({}, {"motion": 0.5}, ["move far less"]),
        ({"motion": 0.5}, {}, []),
    ],
)
def test_what_does_not_fit_together_is_said(
    teacher: dict[str, float], real: dict[str, float], expected: list[str]
) -> None:
    calibration = calibrate([clips(64, **teacher)], [clips(64, **real)])
    assert len(calibration.remarks) == len(expected)
    for remark, words in zip(calibration.remarks, expected, strict=True):
        assert words in remark
        assert words in shown(calibration)


def test_it_can_be_read_on_a_terminal_and_by_a_program() -> None:
    calibration = calibrate([clips(4)], [clips(6, motion=0.8)])
    text = shown(calibration)
    for scale in (calibration.teacher, calibration.real):
        assert f"{scale.clip_mean:.3f} ± {scale.clip_std:.3f}" in text
    assert f"{calibration.teacher.temporal_loss:.3f} │ {calibration.real.temporal_loss:.3f}" in text
    assert f"as the teacher │ {calibration.floor:.2f}" in text
    assert f"as the paper's │ {calibration.floor - 0.9:.2f}" in text
    assert "lower means more motion" in text
    assert "channel 3" in text
    assert Calibration.model_validate_json(calibration.model_dump_json()) == calibration


@pytest.mark.parametrize(
    ("teacher", "real", "message"),
    [
        ([], [clips(2)], "There are no teacher's samples to measure"),
        ([clips(2)], [], "There are no real clips to measure"),
        ([clips(2)[:, :, :1]], [clips(2)], r"at least 2 frames, got \[2, 4, 1, 6, 8\]"),
        ([clips(2)[0]], [clips(2)], r"must be latents \[B, C, F, H, W\]"),
        ([clips(2) * math.nan], [clips(2)], "teacher's samples hold values that are not finite"),
        ([clips(2)], [torch.ones(2, *SHAPE)], "real clips do not move"),
        ([clips(2)], [clips(2)[:, :3]], "teacher's latents have 4 channels, the real clips' 3"),
        ([clips(2), clips(2)[:, :3]], [clips(2)], "4 channels in one batch and 3 in another"),
    ],
)
def test_what_cannot_be_measured_is_named(teacher: list[Tensor], real: list[Tensor], message: str) -> None:
    with pytest.raises(UserError, match=message):
        calibrate(teacher, real)
