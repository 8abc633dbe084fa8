import logging
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from avd_core import SpectralRolloffMonitor, SpectralStatistics, spectral_rolloff, temporal_rolloff
from tensors import randn

SHAPE = (4, 8, 8, 8)  # [C, F, H, W]


def blur(x_BCFHW: Tensor) -> Tensor:
    maps = x_BCFHW.flatten(0, 2).unsqueeze(1)
    return F.avg_pool2d(F.pad(maps, (1, 1, 1, 1), mode="circular"), 3, 1).view_as(x_BCFHW)


def slow(x_BCFHW: Tensor) -> Tensor:
    return (x_BCFHW + x_BCFHW.roll(1, 2) + x_BCFHW.roll(2, 2)) / 3


def clips(seed: int, count: int = 64) -> Tensor:
    """Clips that differ in how smooth they are, in space and in time."""
    noise = randn(seed, count, *SHAPE).float()
    share = torch.rand(2, count, 1, 1, 1, 1, generator=torch.Generator().manual_seed(seed))
    return slow(blur(noise)) + share[0] * slow(noise) / 2 + share[1] * blur(noise) / 2


REAL = clips(0, 256)
REFERENCE = SpectralStatistics.measure(REAL)


def monitor_of(reference: SpectralStatistics = REFERENCE, **options: Any) -> SpectralRolloffMonitor:
    """Judges every step."""
    return SpectralRolloffMonitor(reference, **{"every": 1, "grace": 0} | options)


def watch(monitor: SpectralRolloffMonitor, *x_0: Tensor) -> list[str]:
    """Feed samples; returns the kinds found, in order."""
    for step, samples in enumerate(x_0):
        monitor.after_step(step, {"x_0": samples})
    return [finding.kind for finding in monitor.findings]


# --- The reference


def test_statistics_are_those_of_single_clips() -> None:
    spatial = [torch.stack([spectral_rolloff(c, pool_dim=0) for c in clip]).mean() for clip in REAL]
    temporal = [temporal_rolloff(clip).mean() for clip in REAL]
    for values, found in ((spatial, REFERENCE.spatial), (temporal, REFERENCE.temporal)):
        expected = torch.stack(values)
        assert found == pytest.approx((expected.mean().item(), expected.std(correction=0).item()), rel=1e-4)
    assert REFERENCE.channels == (0, 1, 2, 3)


def test_the_layout_of_frames_can_be_the_other_one() -> None:
    assert SpectralStatistics.measure(REAL.transpose(1, 2), frame_dim=1) == REFERENCE
    one, other = monitor_of(), monitor_of(frame_dim=1)
    watch(one, clips(1))
    watch(other, clips(1).transpose(1, 2))
    assert one.signals() == other.signals() != {}


@pytest.mark.parametrize("small", [0.0, 1e-4])
def test_a_channel_that_holds_next_to_nothing_does_not_count(small: float) -> None:
    """Grey clips have colour channels of rounding errors; a student's are another noise."""
    scale = torch.tensor([1.0, small, 0.5, 1.0]).view(1, 4, 1, 1, 1)
    reference = SpectralStatistics.measure(scale * REAL)
    assert reference.channels == (0, 2, 3)
    samples = scale * clips(1)
    samples[:, 1] = 1e-3 * randn(2, 64, *SHAPE[1:])
    assert watch(monitor_of(reference), samples) == []
    assert reference.spatial == SpectralStatistics.measure(REAL[:, [0, 2, 3]]).spatial


# --- Findings


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_other_real_clips_are_not_found_fault_with(seed: int) -> None:
    monitor = monitor_of()
    assert watch(monitor, *clips(seed, 128).split(8)) == []
    assert monitor.signals() == {"spatial": pytest.approx(0, abs=0.4), "temporal": pytest.approx(0, abs=0.4)}


@pytest.mark.parametrize(
    ("kind", "spoil"),
    [
        ("blurred", blur),
        ("noisy", lambda x: x + 0.5 * x.std() * slow(slow(randn(9, *x.shape).float()))),
        ("drifting", slow),
        ("jittering", lambda x: blur(randn(9, *x.shape).float())),
    ],
)
def test_what_is_wrong_is_named(kind: str, spoil: Any, caplog: pytest.LogCaptureFixture) -> None:
    monitor = monitor_of()
    assert kind in watch(monitor, spoil(clips(1)))
    finding = next(finding for finding in monitor.findings if finding.kind == kind)
    signal = monitor.signals()["spatial" if kind in ("blurred", "noisy") else "temporal"]
    high = kind in ("noisy", "jittering")
    assert finding.limit == (1 if high else -1) * (0.75 if kind in ("blurred", "noisy") else 1.0)
    assert (finding.value > finding.limit) == high
    assert finding.value == signal
    assert finding.message.startswith(f"Step 0: the samples are {kind}: ")
    records = [(record.levelno, record.message) for record in caplog.records]
    assert (logging.WARNING, finding.message) in records


def test_frozen_clips_drift() -> None:
    """Rounding that differs from frame to frame is no change."""
    frozen = clips(1)[:, :, :1].expand(-1, -1, 8, -1, -1)
    assert "drifting" in watch(monitor_of(), frozen)
    assert "drifting" in watch(monitor_of(), frozen * (1 + 1e-7 * randn(0, 64, *SHAPE).float()))


def test_a_signal_is_the_distance_from_real_clips_in_their_own_spread() -> None:
    monitor, samples = monitor_of(), blur(clips(1))
    watch(monitor, samples)
    spatial = torch.stack([torch.stack([spectral_rolloff(c, pool_dim=0) for c in clip]).mean() for clip in samples])
    expected = (spatial.mean().item() - REFERENCE.spatial[0]) / REFERENCE.spatial[1]
    assert monitor.signals()["spatial"] == pytest.approx(expected, rel=1e-3)


def test_saturation_does_not_count() -> None:
    one, other = monitor_of(), monitor_of()
    watch(one, clips(1))
    watch(other, clips(1) * torch.tensor([1.0, 4.0, 0.25, 2.0]).view(1, 4, 1, 1, 1))
    assert other.signals() == pytest.approx(one.signals(), abs=1e-4)


def test_margins_can_be_set() -> None:
    assert watch(monitor_of(spatial_margin=50, temporal_margin=50), blur(clips(1))) == []
    assert set(watch(monitor_of(spatial_margin=1e-6, temporal_margin=50), clips(1))) <= {"blurred", "noisy"}
    assert watch(monitor_of(spatial_margin=50, temporal_margin=1e-6), clips(1))[0] in ("drifting", "jittering")


def test_the_last_clips_are_judged_once_there_are_enough() -> None:
    monitor = monitor_of(window=20)
    parts = clips(1, 28).split(4)
    watch(monitor, *parts[:4])
    assert monitor.signals() == {}
    watch(monitor, *parts[4:])
    whole = monitor_of(window=20)
    watch(whole, torch.cat(parts[2:]))
    assert monitor.signals() == pytest.approx(whole.signals(), rel=1e-5)


def test_steps_without_samples_change_nothing_but_count() -> None:
    monitor = SpectralRolloffMonitor(REFERENCE, every=4, grace=8)
    for step in range(1, 14):
        monitor.after_step(step, {"x_0": blur(clips(1))} if step == 1 else {})
        assert bool(monitor.findings) == (step >= 12)
    assert {finding.step for finding in monitor.findings} == {12}


def test_a_finding_is_said_once_and_again_only_after_a_recovery() -> None:
    monitor = monitor_of()
    good, bad = clips(1), blur(clips(1))
    watch(monitor, good, bad, bad, good, bad)
    assert [finding.step for finding in monitor.findings if finding.kind == "blurred"] == [1, 4]


def test_a_broken_clip_does_not_blind_the_monitor() -> None:
    broken = blur(clips(1))
    broken[5, 2, 3, 4, 4] = math.nan
    monitor = monitor_of()
    assert "blurred" in watch(monitor, broken)


def test_a_signal_in_which_real_clips_do_not_vary_is_left_out() -> None:
    reference = SpectralStatistics.measure(REAL[:, :, :3])  # of 3 frames there is one frequency
    monitor = monitor_of(reference)
    watch(monitor, clips(1)[:, :, :3])
    assert list(monitor.signals()) == ["spatial"]
    assert SpectralStatistics.measure(REAL[:1]).spatial[1] == 0


# --- Mistakes


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"every": 0}, "every must be at least 1, got 0"),
        ({"grace": -1}, "grace must be at least 0, got -1"),
        ({"window": 0}, "window must be at least 1, got 0"),
        ({"spatial_margin": 0.0}, "spatial_margin must be a finite number above 0"),
        ({"temporal_margin": math.inf}, "temporal_margin must be a finite number above 0"),
    ],
)
def test_options_out_of_range_are_refused(options: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        monitor_of(**options)


def test_samples_and_references_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match=r"x_0 must be \[B, C, F, H, W\] with frame_dim=2.*got \[4, 8, 8, 8\]"):
        SpectralStatistics.measure(REAL[0])
    with pytest.raises(ValueError, match="needs finite clips"):
        SpectralStatistics.measure(REAL / 0)
    with pytest.raises(ValueError, match=r"has 2 channels, the reference has 4 or more\. Measure"):
        watch(monitor_of(), clips(1)[:, :2])
    with pytest.raises(TypeError, match="x_0 must be a floating-point tensor"):
        watch(monitor_of(), clips(1).long())
