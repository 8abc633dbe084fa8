import cmath
import colorsys
import math

import pytest
import torch
from torch import Tensor

from avd_trainer.evaluation.clip_measures import (
    autocorrelation,
    channel_spread,
    clip_measures,
    energy_distance,
    hsv_saturation,
    spatial_frequency,
    temporal_frequency,
)


@pytest.fixture
def latents() -> Tensor:
    return torch.randn(6, 4, 5, 3, 2, generator=torch.Generator().manual_seed(0))


def test_saturation_is_that_of_the_hsv_colour_model() -> None:
    video = torch.rand(1, 3, 2, 3, 4)
    video[0, :, 0, 0, 0] = 0  # black has no saturation
    expected = [colorsys.rgb_to_hsv(*pixel)[1] for pixel in video.permute(0, 2, 3, 4, 1).reshape(-1, 3).tolist()]
    assert hsv_saturation(video).flatten().tolist() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("independent", [True, False])
def test_energy_distance_is_its_definition(independent: bool) -> None:
    x, y = torch.randn(4, 2, 3), torch.randn(5, 2, 3) + 1

    def mean_distance(pairs: list[tuple[Tensor, Tensor]]) -> float:
        return sum(math.dist(a.flatten().tolist(), b.flatten().tolist()) for a, b in pairs) / len(pairs)

    def within(z: Tensor) -> float:
        return mean_distance([(a, b) for i, a in enumerate(z) for j, b in enumerate(z) if i != j or not independent])

    between = mean_distance([(a, b) for a in x for b in y])
    expected = (2 * between - within(x) - within(y)) / math.sqrt(6)
    assert energy_distance(x, y, independent=independent) == pytest.approx(expected, rel=1e-5)


def test_energy_distance_is_zero_for_one_distribution_and_grows_with_scale() -> None:
    real, same = torch.randn(200, 64), torch.randn(200, 64)
    distances = [energy_distance(scale * same, real) for scale in (1.0, 1.2, 1.5)]
    assert abs(distances[0]) < 0.005
    assert distances[0] < distances[1] < distances[2]


def test_energy_distance_of_sets_with_the_same_captions_is_zero_for_one_set_twice() -> None:
    x = torch.randn(20, 8)
    assert energy_distance(x, x, independent=False) == pytest.approx(0, abs=1e-9)
    assert energy_distance(x, x + 0.1 * torch.randn(20, 8), independent=False) > 0


def test_channel_spread_is_the_channel_that_is_farthest_off(latents: Tensor) -> None:
    assert channel_spread(latents, latents) == 0
    wide, narrow = latents.clone(), latents.clone()
    wide[:, 2] *= 1.3
    narrow[:, 1] /= 1.5
    narrow[:, 2] *= 1.3
    assert channel_spread(wide, latents) == pytest.approx(math.log(1.3), rel=0.01)
    assert channel_spread(narrow, latents) == pytest.approx(math.log(1.5), rel=0.01)
    assert channel_spread(latents + 7, latents) == pytest.approx(0, abs=1e-5)  # a shift is no spread
    assert 4 < channel_spread(torch.zeros_like(latents), latents) < 10


def test_autocorrelation_is_its_definition(latents: Tensor) -> None:
    for clip, value in zip(latents, autocorrelation(latents, latents).tolist(), strict=True):
        frames = [frame.flatten().tolist() for frame in clip.transpose(0, 1)]
        means = [sum(values) / len(frames) for values in zip(*frames, strict=True)]
        deviations = [[x - mean for x, mean in zip(frame, means, strict=True)] for frame in frames]
        products = [
            sum(a * b for a, b in zip(deviations[t], deviations[t + 1], strict=True)) for t in range(len(frames) - 1)
        ]
        squares = sum(x * x for frame in deviations for x in frame)
        assert value == pytest.approx(sum(products) / squares, abs=3e-4)


def test_autocorrelation_of_drift_noise_and_stills() -> None:
    drift = torch.linspace(0, 1, 10).view(1, 1, 10, 1, 1).expand(2, 3, 10, 4, 4)
    assert autocorrelation(drift, drift).tolist() == pytest.approx([1 - 3 / 10] * 2, abs=1e-3)
    noise = torch.randn(4, 8, 5, 16, 16)
    assert float(autocorrelation(noise, noise).mean()) == pytest.approx(-1 / 5, abs=0.02)
    still = noise[:, :, :1].expand_as(noise) + 1e-6 * noise  # as rounding leaves it
    assert autocorrelation(still, noise).tolist() == pytest.approx([1.0] * 4, abs=1e-3)


def dft(values: list[float]) -> list[complex]:
    n = len(values)
    return [sum(x * cmath.exp(-2j * math.pi * k * i / n) for i, x in enumerate(values)) for k in range(n)]


def test_temporal_frequency_is_its_definition() -> None:
    video = torch.rand(1, 3, 5, 2, 2, dtype=torch.float64)
    power = [0.0] * 5
    for pixel in video[0].permute(0, 2, 3, 1).reshape(-1, 5).tolist():
        power = [total + abs(value) ** 2 for total, value in zip(power, dft(pixel), strict=True)]
    frequencies = [0, 1 / 5, 2 / 5, 2 / 5, 1 / 5]
    expected = sum(p * f for p, f in zip(power, frequencies, strict=True)) / sum(power[1:])
    assert float(temporal_frequency(video)) == pytest.approx(expected, rel=1e-3)


def test_spatial_frequency_is_its_definition() -> None:
    video = torch.rand(1, 1, 1, 4, 3, dtype=torch.float64)
    rows = [dft(row) for row in video[0, 0, 0].tolist()]
    columns = [dft(list(column)) for column in zip(*[[v.real for v in row] for row in rows], strict=True)]
    imaginary = [dft(list(column)) for column in zip(*[[v.imag for v in row] for row in rows], strict=True)]
    total = weighted = 0.0
    for kx, fx in enumerate([0, 1 / 3, 1 / 3]):
        for ky, fy in enumerate([0, 1 / 4, 1 / 2, 1 / 4]):
            power = abs(columns[kx][ky] + 1j * imaginary[kx][ky]) ** 2 * (kx + ky > 0)
            total += power
            weighted += power * math.hypot(fx, fy)
    assert float(spatial_frequency(video)) == pytest.approx(weighted / total, rel=1e-3)


def test_waves_have_their_own_frequency() -> None:
    x = torch.arange(16.0)
    wave = 0.5 + 0.4 * torch.cos(2 * math.pi * x * 3 / 16)
    along_x = wave.view(1, 1, 1, 1, 16).expand(2, 3, 8, 16, 16)
    assert spatial_frequency(along_x).tolist() == pytest.approx([3 / 16] * 2, rel=1e-3)
    assert temporal_frequency(along_x).tolist() == pytest.approx([0, 0], abs=1e-6)
    diagonal = 0.5 + 0.4 * torch.cos(2 * math.pi * (x.view(16, 1) * 3 + x * 4) / 16)
    assert float(spatial_frequency(diagonal.expand(1, 1, 1, 16, 16))) == pytest.approx(5 / 16, rel=1e-3)
    in_time = wave.view(1, 1, 16, 1, 1).expand(1, 3, 16, 4, 4)
    assert float(temporal_frequency(in_time)) == pytest.approx(3 / 16, rel=1e-3)
    assert float(spatial_frequency(in_time)) == 0


def test_rounding_of_a_still_clip_is_no_flicker() -> None:
    still = torch.full((1, 3, 9, 8, 8), 0.5) + 1e-6 * torch.randn(1, 3, 9, 8, 8)
    assert float(temporal_frequency(still)) < 1e-4
    assert float(spatial_frequency(still)) < 1e-4


def test_temporal_loss_is_the_mean_of_single_clips_losses(latents: Tensor) -> None:
    scaled = latents * torch.tensor([0.1, 0.5, 1.0, 1.0, 2.0, 5.0]).view(-1, 1, 1, 1, 1)
    losses = []
    for clip in scaled:
        series = clip.permute(0, 2, 3, 1).reshape(-1, 5).tolist()
        variances = [sum((x - sum(xs) / 5) ** 2 for x in xs) / 5 for xs in series]
        losses.append(-math.log(sum(variances) / len(variances) + 1e-6))
    video = torch.rand(6, 3, 5, 8, 8)
    values = clip_measures(scaled, video, latents, video, paired=True)
    assert values["temporal_loss"] == pytest.approx(sum(losses) / 6, rel=1e-5)


@pytest.mark.parametrize(
    ("own", "paired", "error"),
    [
        ((0.4, 0.2), True, 0.2),  # each clip has the other's
        ((0.4, 0.2), False, 0.0),
        ((0.1, 0.5), True, 0.1),  # one has too little, the other too much
        ((0.5, 0.1), False, 0.1),
    ],
)
def test_saturation_error_is_that_of_single_clips(own: tuple[float, float], paired: bool, error: float) -> None:
    def video(saturation: tuple[float, float]) -> Tensor:
        lowest = 0.5 * (1 - torch.tensor(saturation))
        return torch.stack([torch.full((2,), 0.5), lowest, lowest], dim=1).view(2, 3, 1, 1, 1).expand(2, 3, 5, 4, 4)

    latents = torch.randn(2, 4, 5, 3, 2, generator=torch.Generator().manual_seed(0))
    values = clip_measures(latents, video(own), latents, video((0.2, 0.4)), paired=paired)
    assert values["saturation_error"] == pytest.approx(error, abs=1e-6)


def test_pixels_beyond_the_screen_count_as_the_screen_shows_them(latents: Tensor) -> None:
    video = torch.tensor([2.0, 1.0, 1.0]).view(1, 3, 1, 1, 1).expand(6, 3, 5, 8, 8)
    assert clip_measures(latents, video, latents, video, paired=True)["saturation"] == 0
