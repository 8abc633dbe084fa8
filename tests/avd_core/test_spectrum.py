import cmath
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from avd_core import spectral_rolloff, temporal_rolloff
from tensors import randn

# --- References: sums over all frequencies, as in the definition


def energies(signal: list[complex]) -> list[float]:
    """Squares of the discrete Fourier transform."""
    n = len(signal)
    turns = [[cmath.exp(-2j * math.pi * k * i / n) for i in range(n)] for k in range(n)]
    return [abs(sum(turn * value for turn, value in zip(row, signal, strict=True))) ** 2 for row in turns]


def energies_2d(image: Tensor) -> dict[tuple[int, int], float]:
    height, width = image.shape
    found = {}
    for k in range(height):
        for m in range(width):
            value = sum(
                image[i, j].item() * cmath.exp(-2j * math.pi * (k * i / height + m * j / width))
                for i in range(height)
                for j in range(width)
            )
            found[k, m] = abs(value) ** 2
    return found


def smallest_radius(energy_by_radius: dict[float, float], share: float) -> float:
    """Rings of equal radius, from the inside out."""
    total = sum(energy_by_radius.values())
    inside = 0.0
    for radius in sorted(energy_by_radius):
        inside += energy_by_radius[radius]
        if inside >= share * total:
            return radius
    raise AssertionError


def reference_spatial(images: list[Tensor], share: float) -> float:
    """Of one map, or of several that count as one."""
    rings: dict[float, float] = {}
    for image in images:
        height, width = image.shape
        for (k, m), energy in energies_2d(image).items():
            if (k, m) != (0, 0):
                radius = round(math.hypot(min(k, height - k) / height, min(m, width - m) / width), 9)
                rings[radius] = rings.get(radius, 0.0) + energy
    return smallest_radius(rings, share)


def reference_temporal(clip_FHW: Tensor, share: float) -> float:
    bands: dict[float, float] = {}
    frames = len(clip_FHW)
    for pixel in clip_FHW.flatten(1).T.tolist():
        for k, energy in enumerate(energies(pixel)):
            if k:
                band = min(k, frames - k) / frames
                bands[band] = bands.get(band, 0.0) + energy
    return smallest_radius(bands, share)


SIDES = st.integers(2, 7)
SHARES = st.sampled_from([0.3, 0.7, 0.85, 0.95])


@settings(deadline=None)
@given(SIDES, SIDES, SHARES, st.integers(0, 999))
def test_the_spatial_roll_off_is_that_of_the_definition(height: int, width: int, share: float, seed: int) -> None:
    maps = randn(seed, 2, height, width)
    expected = [reference_spatial([image], share) for image in maps]
    assert spectral_rolloff(maps, share=share).tolist() == pytest.approx(expected, abs=1e-8)


@settings(deadline=None)
@given(st.integers(2, 9), SHARES, st.integers(0, 999))
def test_the_temporal_roll_off_is_that_of_the_definition(frames: int, share: float, seed: int) -> None:
    clips = randn(seed, 2, frames, 2, 3)
    expected = [reference_temporal(clip, share) for clip in clips]
    assert temporal_rolloff(clips, share=share).tolist() == pytest.approx(expected, abs=1e-12)


def test_pooled_maps_count_by_their_energy() -> None:
    clips = randn(0, 2, 3, 4, 6, 5) * torch.tensor([1.0, 0.1, 3.0, 1e-6]).view(1, 1, 4, 1, 1).double()
    pooled = spectral_rolloff(clips, pool_dim=2)
    assert pooled.shape == (2, 3)
    for sample in range(2):
        for channel in range(3):
            expected = reference_spatial(list(clips[sample, channel]), 0.85)
            assert pooled[sample, channel].item() == pytest.approx(expected, abs=1e-8)
    assert torch.equal(spectral_rolloff(clips, pool_dim=-3), pooled)
    # A map that is nearly empty does not count, and by itself it would.
    assert torch.equal(spectral_rolloff(clips[:, :, :3], pool_dim=2), pooled)
    assert spectral_rolloff(clips)[:, :, 3].min() > 0.3


# --- Values that anybody can check


@pytest.mark.parametrize(("height", "width", "k", "m"), [(8, 8, 2, 0), (8, 8, 1, 3), (6, 10, 2, 5), (9, 7, 4, 3)])
def test_a_single_wave_rolls_off_at_its_own_frequency(height: int, width: int, k: int, m: int) -> None:
    rows = torch.arange(height).unsqueeze(1) * (k / height)
    columns = torch.arange(width) * (m / width)
    wave = (2 * math.pi * (rows + columns) + 0.3).cos()
    assert spectral_rolloff(wave).item() == pytest.approx(math.hypot(k / height, m / width), abs=1e-6)


def test_a_single_wave_in_time_rolls_off_at_its_own_frequency() -> None:
    for k in range(1, 6):
        wave = (2 * math.pi * k / 10 * torch.arange(10) + 0.3).cos().view(10, 1, 1)
        assert temporal_rolloff(wave * randn(0, 1, 3, 4)).item() == pytest.approx(k / 10, abs=1e-6)


def test_the_share_is_reached_where_the_sum_equals_it() -> None:
    """Two waves with 3/4 and 1/4 of the energy."""
    places = torch.arange(8.0)
    image = (3**0.5 * (2 * math.pi * places / 8).sin() + (2 * math.pi * 3 * places / 8).sin()).expand(8, 8)
    for share, expected in ((0.7, 1 / 8), (0.74, 1 / 8), (0.76, 3 / 8), (0.85, 3 / 8)):
        assert spectral_rolloff(image, share=share).item() == pytest.approx(expected)


def test_noise_and_its_blur() -> None:
    noise = randn(0, 2000, 1, 8, 8).float()
    blurred = F.avg_pool2d(F.pad(noise, (1, 1, 1, 1), mode="circular"), 3, 1)
    assert spectral_rolloff(noise).mean().item() == pytest.approx(0.54, abs=0.01)
    assert spectral_rolloff(blurred).mean().item() == pytest.approx(0.34, abs=0.01)


def test_a_grid_that_is_not_square_is_fair() -> None:
    """White noise has the same roll-off on any large grid, whatever its sides."""
    for height, width in ((60, 104), (104, 60), (64, 64), (32, 128)):
        value = spectral_rolloff(randn(1, 50, height, width)).mean().item()
        # The disc of that radius, cut off at the square of half a cycle, holds 85% of the frequencies.
        assert value == pytest.approx(0.523, abs=0.006)


# --- Properties

MAPS = st.builds(lambda seed, h, w: randn(seed, 3, h, w), st.integers(0, 999), st.integers(3, 9), st.integers(3, 9))


@given(MAPS, st.floats(0.01, 100), st.floats(-50, 50), st.booleans(), st.integers(0, 3), st.integers(0, 5))
def test_turning_mirroring_shifting_scale_and_offset_change_nothing(
    maps: Tensor, scale: float, offset: float, negative: bool, turns: int, shift: int
) -> None:
    changed = torch.rot90((-scale if negative else scale) * maps + offset, turns, (-2, -1)).flip(-1).roll(shift, -2)
    torch.testing.assert_close(spectral_rolloff(changed), spectral_rolloff(maps), rtol=0, atol=1e-12)


@given(st.integers(0, 999), st.integers(2, 9), st.floats(0.01, 100), st.floats(-50, 50))
def test_time_that_runs_backwards_scale_and_offset_change_nothing(
    seed: int, frames: int, scale: float, offset: float
) -> None:
    clips = randn(seed, 2, frames, 2, 3)
    changed = (scale * clips + offset).flip(-3)
    torch.testing.assert_close(temporal_rolloff(changed), temporal_rolloff(clips), rtol=0, atol=1e-12)


@given(st.integers(0, 999), st.integers(6, 16), st.integers(6, 16))
def test_blur_lowers_and_noise_raises(seed: int, height: int, width: int) -> None:
    def blur(maps: Tensor) -> Tensor:
        return F.avg_pool2d(F.pad(maps, (1, 1, 1, 1), mode="circular"), 3, 1)

    noise = randn(seed, 64, 1, height, width)
    smooth = blur(blur(randn(seed + 1, 64, 1, height, width)))
    assert spectral_rolloff(blur(noise)).mean() < spectral_rolloff(noise).mean() - 0.05
    assert spectral_rolloff(smooth + smooth.std() * noise).mean() > spectral_rolloff(smooth).mean() + 0.05


@given(st.integers(0, 999), st.integers(8, 20))
def test_smoothing_along_frames_lowers_and_flicker_raises_the_temporal_roll_off(seed: int, frames: int) -> None:
    changing = randn(seed, 64, frames, 2, 3)
    smooth = (changing + changing.roll(1, 1) + changing.roll(2, 1)) / 3
    flicker = smooth + smooth.std() * randn(seed + 1, 64, frames, 1, 1)
    assert temporal_rolloff(smooth).mean() < temporal_rolloff(changing).mean() - 0.03
    assert temporal_rolloff(flicker).mean() > temporal_rolloff(smooth).mean() + 0.03


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("value", [0.0, 0.1, -3e4, 1e-6])
def test_what_is_constant_has_0(dtype: torch.dtype, value: float) -> None:
    constant = torch.full((2, 3, 5, 7), value, dtype=dtype)
    # The same value with its last digit now one way, now the other, as rounding leaves it.
    up = torch.nextafter(constant, 2 * constant) if dtype != torch.float16 else constant
    trembling = torch.where(randn(0, 2, 3, 5, 7) > 0, up, constant)
    for x in (constant, trembling):
        assert torch.equal(spectral_rolloff(x), torch.zeros(2, 3, dtype=torch.promote_types(dtype, torch.float32)))
        assert temporal_rolloff(x).abs().max() == 0
    still = randn(1, 2, 1, 5, 7).to(dtype).expand(2, 3, 5, 7)
    assert temporal_rolloff(still).abs().max() == 0
    assert spectral_rolloff(still).min() > 0


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_very_small_and_very_large_maps_neither_vanish_nor_overflow(scale: float) -> None:
    maps = randn(0, 4, 8, 8).float()
    assert torch.equal(spectral_rolloff(scale * maps), spectral_rolloff(maps))
    assert torch.equal(temporal_rolloff(scale * maps), temporal_rolloff(maps))


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_map_that_is_not_finite_has_nan_and_the_others_are_not_touched(bad: float) -> None:
    maps = randn(0, 3, 4, 5)
    broken = maps.clone()
    broken[1, 2, 2] = bad
    result = spectral_rolloff(broken)
    assert result.isnan().tolist() == [False, True, False]
    assert torch.equal(result[[0, 2]], spectral_rolloff(maps)[[0, 2]])
    assert temporal_rolloff(broken).isnan()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_half_precision_is_computed_in_float32(dtype: torch.dtype) -> None:
    maps = randn(0, 200, 6, 9).to(dtype)
    for rolloff in (spectral_rolloff, temporal_rolloff):
        assert rolloff(maps).dtype == torch.float32
        torch.testing.assert_close(rolloff(maps), rolloff(maps.double()).float())


def test_there_is_no_gradient() -> None:
    maps = randn(0, 3, 4, 5).requires_grad_()
    assert not spectral_rolloff(maps).requires_grad
    assert not temporal_rolloff(maps).requires_grad


# --- Mistakes


@pytest.mark.parametrize("rolloff", [spectral_rolloff, temporal_rolloff])
def test_what_both_refuse(rolloff: object) -> None:
    maps = torch.zeros(2, 3, 4, 5)
    for bad, error, said in (
        (maps.long(), TypeError, "x must be a floating-point tensor, got torch.int64"),
        (None, TypeError, "x must be a torch.Tensor, got NoneType"),
        (maps[0, 0, 0], ValueError, r"x must be \[\.\.\., .*H, W\], got shape \[5\]"),
        (maps[:, :, :, :0], ValueError, r"x must not be empty, got shape \[2, 3, 4, 0\]"),
    ):
        with pytest.raises(error, match=said):
            rolloff(bad)
    for share in (0.0, 1.0, math.nan):
        with pytest.raises(ValueError, match="share must be a finite number above 0 and below 1"):
            rolloff(maps, share=share)


def test_what_one_of_them_refuses() -> None:
    with pytest.raises(ValueError, match=r"at least 2 frames, got 1 in \[2, 3, 1, 4, 5\].*transpose"):
        temporal_rolloff(torch.zeros(2, 3, 1, 4, 5))
    for dim in (1, 2, -1, 3):
        with pytest.raises(ValueError, match=rf"before the last two, got {dim}\. For the frames"):
            spectral_rolloff(torch.zeros(3, 4, 5), pool_dim=dim)
