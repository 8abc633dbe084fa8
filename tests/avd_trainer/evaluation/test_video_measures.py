"""Measures of single videos: what they are by definition, and that each moves one way with its own fault."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from avd_trainer.data.moving_shapes import MovingShapes
from avd_trainer.data.preparation.stages.flow import flow_magnitude
from avd_trainer.evaluation.controls import CONTROLS, RealClips
from avd_trainer.evaluation.video_measures import (
    VIDEO_MEASURES,
    edge_rolloff,
    flicker,
    flow_measures,
    video_measures,
)
from avd_trainer.evaluation.video_reference import PixelCodec
from avd_trainer.runtime.errors import UserError


@pytest.fixture(scope="module")
def clips() -> list[Tensor]:
    shapes = MovingShapes(2, seed=3, held_out=True)
    return [shapes[index].video for index in range(2)]


def texture(height: int, width: int) -> Tensor:
    """A smooth random picture ``[H, W]`` in [0, 1]."""
    noise = torch.rand(1, 1, height // 6, width // 6, generator=torch.Generator().manual_seed(0))
    return F.interpolate(noise, (height, width), mode="bicubic", align_corners=False)[0, 0].clamp(0, 1)


def shifted(steps: list[float], size: int = 120) -> Tensor:
    """``[F, S, S]``: a texture that goes right by so many pixels from each frame to the next."""
    wide, frames, place = texture(size, 2 * size), [], 60.0
    for step in [0.0, *steps]:
        place -= step
        whole = int(place)
        share = place - whole
        frames.append((1 - share) * wide[:, whole : whole + size] + share * wide[:, whole + 1 : whole + 1 + size])
    return torch.stack(frames)


def control(name: str) -> Callable[[Tensor, float], Tensor]:
    def spoil(video: Tensor, strength: float) -> Tensor:
        return CONTROLS[name].spoil(RealClips(video.unsqueeze(0)), strength, PixelCodec()).video[0]

    return spoil


def quicker(video: Tensor, factor: float) -> Tensor:
    return video[:, :: int(factor)]


def gain_colour(video: Tensor, by: float) -> Tensor:
    gray = video.mean(dim=0, keepdim=True)
    factor = torch.linspace(1, 1 + by, video.shape[1]).view(1, -1, 1, 1)
    return (gray + factor * (video - gray)).clamp(0, 1)


def pulse(video: Tensor, by: float) -> Tensor:
    return (video + by * (-1.0) ** torch.arange(video.shape[1]).view(1, -1, 1, 1)).clamp(0, 1)


def tremble(video: Tensor, by: float) -> Tensor:
    draws = torch.randn(video.shape[1], generator=torch.Generator().manual_seed(0))
    frames = [frame.roll(round(by * float(draw)), 2) for frame, draw in zip(video.unbind(1), draws, strict=True)]
    return torch.stack(frames, dim=1)


@pytest.mark.parametrize(
    ("measure", "fault", "strengths", "rises"),
    [
        ("flow", quicker, (1, 2, 3), True),
        ("flow", control("frozen"), (0.0, 0.5, 1.0), False),
        ("saturation", control("saturated"), (0.7, 1.0, 1.3), True),
        ("saturation_drift", gain_colour, (-0.4, 0.0, 0.4), True),
        ("flicker", pulse, (0.0, 0.01, 0.03), True),
        ("spatial_rolloff", control("blurred"), (0.0, 0.6, 1.2), False),
        ("spatial_rolloff", control("noise"), (0.0, 0.1, 0.5), True),
        ("temporal_rolloff", control("shuffled"), (0.0, 0.2, 0.7), True),
        ("temporal_rolloff", control("noise"), (0.0, 0.01, 0.1), True),
        ("pixel_correlation", control("noise"), (0.0, 0.1, 0.5), False),
        ("flow_jerk", tremble, (0, 1, 2), True),
    ],
)
def test_each_measure_moves_one_way_with_its_fault(
    clips: list[Tensor],
    measure: str,
    fault: Callable[[Tensor, float], Tensor],
    strengths: tuple[float, ...],
    rises: bool,
) -> None:
    values = [sum(video_measures(fault(clip, strength))[measure] for clip in clips) for strength in strengths]
    first, second, third = values if rises else values[::-1]
    assert first < second < third


def test_brightness_that_alternates_has_its_amplitude_and_a_fade_none() -> None:
    alternating = 0.5 + 0.03 * (-1.0) ** torch.arange(9).view(-1, 1, 1).expand(9, 32, 32)
    assert flicker(alternating) == pytest.approx(255 * 0.03, rel=1e-4)
    assert flicker(torch.linspace(0.1, 0.9, 9).view(-1, 1, 1).expand(9, 32, 32)) == pytest.approx(0, abs=1e-4)


def test_flow_is_in_pixels_at_480p_and_a_steady_one_has_no_jerk() -> None:
    slow, quick = flow_measures(shifted([1.0] * 8)), flow_measures(shifted([2.0] * 8))
    assert slow[0] == pytest.approx(4, rel=0.15)
    assert quick[0] == pytest.approx(8, rel=0.15)
    uneven = flow_measures(shifted([1.0, 2.0] * 4))
    # |V_{t+1} - 2 V_t + V_{t-1}| is 2 pixels of 120, whatever t.
    assert uneven[1] == pytest.approx(8, rel=0.2)
    assert max(slow[1], quick[1]) < 0.1 * uneven[1]


def test_flow_is_that_of_the_filter_of_data_preparation() -> None:
    frames = shifted([1.5] * 4)
    pixels = (255 * frames).round().to(torch.uint8).numpy()
    expected = [flow_magnitude(pixels[place], pixels[place + 1], "farneback") for place in range(4)]
    assert flow_measures(frames)[0] == pytest.approx(4 * sum(expected) / 4, rel=1e-6)


def test_edges_of_frames_with_natural_spectra_show_blur() -> None:
    noise = torch.randn(3, 64, 64, generator=torch.Generator().manual_seed(0))
    radius = torch.hypot(torch.fft.fftfreq(64).unsqueeze(1), torch.fft.fftfreq(64)).clamp_min(1 / 64)
    natural = torch.fft.ifft2(torch.fft.fft2(noise) / radius).real
    natural = (natural - natural.min()) / (natural.max() - natural.min())
    blurred = control("blurred")(natural.expand(3, 3, 64, 64), 0.8)[0]
    assert edge_rolloff(blurred) < 0.75 * edge_rolloff(natural)


def test_saturation_drift_is_the_last_quarter_less_the_first() -> None:
    saturation = torch.linspace(0.2, 0.6, 9).view(-1, 1, 1).expand(9, 16, 16)
    video = torch.stack([torch.full_like(saturation, 0.8), 0.8 * (1 - saturation), 0.8 * (1 - saturation)])
    values = video_measures(video)
    assert values["saturation"] == pytest.approx(0.4, abs=1e-5)
    assert values["saturation_drift"] == pytest.approx(0.575 - 0.225, abs=1e-5)


def test_a_still_and_a_grey_video_have_defined_values() -> None:
    still = torch.rand(3, 1, 16, 16).expand(3, 5, 16, 16) + 1e-7 * torch.randn(3, 5, 16, 16)
    values = video_measures(still)
    assert list(values) == list(VIDEO_MEASURES)
    assert values["temporal_rolloff"] == 0
    assert values["pixel_correlation"] == pytest.approx(1, abs=1e-3)
    grey = video_measures(torch.full((3, 5, 16, 20), 0.5))
    assert all(abs(grey[name]) < 1e-6 for name in VIDEO_MEASURES if name != "pixel_correlation")


def test_what_cannot_be_measured_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for shape in ((1, 3, 9, 32, 32), (3, 4, 32, 32), (3, 9, 32, 12)):
        with pytest.raises(ValueError, match=r"at least 5 frames of 16 x 16 is expected"):
            video_measures(torch.rand(shape))
    monkeypatch.setattr("avd_trainer.evaluation.video_measures.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r'pip install "avd-core\[prepare\]"'):
        video_measures(torch.rand(3, 5, 16, 16))
