from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from avd_core import (
    FlowMatchingSchedule,
    HalfRateInterpolationSampler,
    LatentFrameInterpolator,
    interpolate_linearly,
    kept_frames,
    raise_frame_rate,
    repeat_frames,
    step_rates,
)
from loss_cases import GRID
from tensors import randn

schedule = FlowMatchingSchedule()
frame_counts = st.integers(2, 40)
rates_of_four = st.sampled_from([(1, 1, 1, 1), (2, 1, 1, 1), (2, 2, 1, 1), (2, 2, 2, 2), (4, 2, 1, 1), (8, 4, 4, 1)])


def denoise(x_t: Tensor, timesteps: Tensor) -> Tensor:
    """A made-up denoiser in which frames, places and timesteps matter."""
    neighbours = x_t.roll(1, dims=2) - 0.5 * x_t.flip(2)
    return torch.tanh(x_t + 0.3 * neighbours) * (1 - timesteps.to(x_t.dtype) / 1500).view(-1, 1, 1, 1, 1)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def sample(
    noise: Tensor,
    rates: Sequence[int] | None = None,
    half_rate_steps: int = 2,
    interpolator: Any = interpolate_linearly,
    seed: int = 0,
    **options: Any,
) -> Tensor:
    sampler = HalfRateInterpolationSampler(
        options.pop("denoiser", denoise), interpolator, GRID, half_rate_steps, rates=rates, **options
    )
    return sampler(noise, generator(seed))


def plain_few_step_sampler(noise: Tensor, draws: torch.Generator) -> Tensor:
    """DMD's: predict x_0, noise it to the next step, repeat."""
    x_t = noise
    for current, following in pairwise(GRID):
        x_0 = denoise(x_t, torch.full((len(noise),), float(current)))
        sigma = following / 1000
        x_t = (1 - sigma) * x_0 + sigma * torch.randn(noise.shape, generator=draws, dtype=noise.dtype)
    return denoise(x_t, torch.full((len(noise),), float(GRID[-1])))


def halved(places: list[int]) -> list[int]:
    return sorted({*places[::2], places[-1]})


def at_rate(frames: int, rate: int) -> list[int]:
    places = list(range(frames))
    for _ in range(rate.bit_length() - 1):
        places = halved(places)
    return places


def reference_half_rate_sampler(noise: Tensor, rates: tuple[int, ...], draws: torch.Generator) -> Tensor:
    """Frame by frame over dictionaries from place to frame."""
    frames = noise.shape[2]
    x_t = {place: noise[:, :, place] for place in at_rate(frames, rates[0])}
    for step, (timestep, rate) in enumerate(zip(GRID, rates, strict=True)):
        places = sorted(x_t)
        assert places == at_rate(frames, rate)
        predicted = denoise(torch.stack([x_t[p] for p in places], dim=2), torch.full((len(noise),), float(timestep)))
        x_0 = dict(zip(places, predicted.unbind(2), strict=True))
        following = (*rates, 1)[step + 1]
        while rate > following:
            rate //= 2
            for place in at_rate(frames, rate):
                if place not in x_0:
                    before, after = max(p for p in places if p < place), min(p for p in places if p > place)
                    x_0[place] = (x_0[before] + x_0[after]) / 2
            places = sorted(x_0)
        if step + 1 < len(GRID):
            sigma = GRID[step + 1] / 1000
            fresh = torch.randn(noise.shape, generator=draws, dtype=noise.dtype)
            x_t = {place: (1 - sigma) * frame + sigma * fresh[:, :, place] for place, frame in x_0.items()}
    return torch.stack([x_0[place] for place in range(frames)], dim=2)


# --- What it computes


@given(st.integers(0, 2**20), frame_counts)
def test_without_half_rate_steps_it_is_the_plain_few_step_sampler(seed: int, frames: int) -> None:
    noise = randn(seed, 2, 3, frames, 4, 4)
    result = sample(noise, half_rate_steps=0, interpolator=None, seed=seed)
    torch.testing.assert_close(result, plain_few_step_sampler(noise, generator(seed)), rtol=1e-6, atol=1e-6)


def plain_euler_sampler(noise: Tensor) -> Tensor:
    """Straight on along ``(x_t - x_0) / sigma``."""
    x_t = noise
    for current, following in pairwise((*GRID, 0)):
        velocity = (x_t - denoise(x_t, torch.full((len(noise),), float(current)))) / (current / 1000)
        x_t = x_t + (following - current) / 1000 * velocity
    return x_t


@given(st.integers(0, 2**20), frame_counts)
def test_without_noise_in_between_it_goes_straight_on(seed: int, frames: int) -> None:
    noise, draws = randn(seed, 2, 3, frames, 4, 4), generator(seed)
    untouched = draws.get_state()
    result = HalfRateInterpolationSampler(denoise, interpolate_linearly, GRID, 0, sampler="ode")(noise, draws)
    torch.testing.assert_close(result, plain_euler_sampler(noise), rtol=1e-6, atol=1e-6)
    assert torch.equal(draws.get_state(), untouched)


def test_straight_on_there_is_noise_only_where_the_rate_rises() -> None:
    noise, draws = randn(0, 1, 2, 9, 4, 4), generator()
    result = sample(noise, (2, 2, 1, 1), sampler="ode")
    x_t, t = noise[:, :, ::2], [torch.full((1,), float(timestep)) for timestep in GRID]
    x_t = schedule.euler_step(x_t, schedule.x_0_to_velocity(denoise(x_t, t[0]), x_t, t[0]), t[0], t[1])
    x_0 = interpolate_linearly(denoise(x_t, t[1]))
    x_t = schedule.add_noise(x_0, torch.randn(noise.shape, generator=draws, dtype=noise.dtype), t[2])
    x_t = schedule.euler_step(x_t, schedule.x_0_to_velocity(denoise(x_t, t[2]), x_t, t[2]), t[2], t[3])
    torch.testing.assert_close(result, denoise(x_t, t[3]))


def test_another_sampler_is_refused() -> None:
    with pytest.raises(ValueError, match='sampler must be "re-noise" or "ode", got \'euler\''):
        sample(randn(0, 1, 2, 9, 4, 4), sampler="euler")


def test_one_frame_is_sampled_by_the_plain_sampler() -> None:
    noise = randn(0, 2, 3, 1, 4, 4)
    result = sample(noise, half_rate_steps=0, interpolator=None)
    torch.testing.assert_close(result, plain_few_step_sampler(noise, generator()), rtol=1e-6, atol=1e-6)


@given(st.integers(0, 2**20), frame_counts, rates_of_four)
def test_it_equals_a_sampler_that_goes_frame_by_frame(seed: int, frames: int, rates: tuple[int, ...]) -> None:
    noise = randn(seed, 1, 2, frames, 2, 2)
    result = sample(noise, rates, seed=seed)
    assert result.shape == noise.shape
    torch.testing.assert_close(result, reference_half_rate_sampler(noise, rates, generator(seed)), rtol=1e-6, atol=1e-6)


def test_half_rate_steps_are_rates_of_two() -> None:
    noise = randn(0, 2, 3, 9, 4, 4)
    assert torch.equal(sample(noise, half_rate_steps=2), sample(noise, (2, 2, 1, 1)))
    assert not torch.equal(sample(noise, half_rate_steps=2), sample(noise, half_rate_steps=1))


@pytest.mark.parametrize("grid", [(1000,), (900, 300), tuple(range(1000, 0, -100))])
def test_any_number_of_steps(grid: tuple[int, ...]) -> None:
    noise = randn(0, 1, 2, 9, 4, 4)
    for half in (0, 1, len(grid)):
        result = HalfRateInterpolationSampler(denoise, interpolate_linearly, grid, half)(noise)
        assert result.shape == noise.shape
        assert result.isfinite().all()


def test_the_paper_is_the_default() -> None:
    sampler = HalfRateInterpolationSampler(denoise, interpolate_linearly)
    assert sampler.timesteps == (1000, 900, 757, 522)
    assert sampler.rates == (2, 2, 1, 1)


def test_clips_of_one_colour_come_through_unchanged() -> None:
    """Where nothing moves, half rate loses nothing."""
    still = randn(0, 2, 3, 1, 4, 4)

    def knows(x_t: Tensor, timesteps: Tensor) -> Tensor:
        return still.expand_as(x_t)

    result = sample(randn(1, 2, 3, 8, 4, 4), denoiser=knows)
    assert torch.equal(result, still.expand_as(result))


# --- Which frames


@given(st.integers(1, 200), st.sampled_from([1, 2, 4, 8, 16]))
def test_every_second_frame_and_the_last_are_kept(frames: int, rate: int) -> None:
    kept = kept_frames(frames, rate)
    assert kept == at_rate(frames, rate)
    assert (kept[0], kept[-1]) == (0, frames - 1)
    length = frames
    for _ in range(rate.bit_length() - 1):
        length = length // 2 + 1 if length > 1 else 1
    assert len(kept) == length


def test_wan_lengths() -> None:
    assert len(kept_frames(21, 2)) == 11
    assert len(kept_frames(20, 2)) == 11
    assert len(kept_frames(21, 4)) == 6


@given(st.integers(0, 2**20), frame_counts, st.sampled_from([(2, 1), (4, 2), (4, 1), (8, 2), (8, 1)]))
def test_raising_the_rate_keeps_frames_bit_for_bit(seed: int, frames: int, rates: tuple[int, int]) -> None:
    rate, target = rates
    kept, wanted = kept_frames(frames, rate), kept_frames(frames, target)
    x_0 = randn(seed, 1, 2, len(kept), 2, 2)
    raised = raise_frame_rate(x_0, interpolate_linearly, frames, rate, target)
    assert raised.shape[2] == len(wanted)
    assert torch.equal(raised[:, :, [wanted.index(place) for place in kept]], x_0)


@pytest.mark.parametrize(("frames", "rates"), [(2, (2, 2, 1, 1)), (3, (4, 2, 1, 1)), (4, (8, 4, 2, 1))])
def test_clips_too_short_to_leave_frames_out_need_no_interpolation(frames: int, rates: tuple[int, ...]) -> None:
    """The network refuses a single frame, so it must not be asked for what lies between one."""
    noise = randn(0, 1, 8, frames, 4, 4)
    result = sample(noise, rates, interpolator=LatentFrameInterpolator(8))
    torch.testing.assert_close(result, reference_half_rate_sampler(noise, rates, generator()), rtol=1e-5, atol=1e-5)


@given(frame_counts)
def test_a_steady_motion_is_restored_exactly(frames: int) -> None:
    """Linear interpolation of what moves evenly; the unevenly spaced last pair of even counts needs no insertion."""
    x_0 = torch.arange(frames, dtype=torch.float64).view(1, 1, frames, 1, 1)
    assert torch.equal(raise_frame_rate(x_0[:, :, kept_frames(frames, 2)], interpolate_linearly, frames, 2, 1), x_0)


def test_the_denoiser_runs_on_fewer_frames() -> None:
    seen = []

    def counting(x_t: Tensor, timesteps: Tensor) -> Tensor:
        seen.append((x_t.shape[2], timesteps.tolist()))
        return denoise(x_t, timesteps)

    sample(randn(0, 1, 2, 21, 2, 2), (4, 2, 1, 1), denoiser=counting)
    assert seen == [(6, [1000.0]), (11, [900.0]), (21, [757.0]), (21, [522.0])]


def test_every_step_starts_from_the_same_noise_at_any_rate() -> None:
    """What is left at t=1000 is noise alone, so the denoiser sees the full-rate noise at the places that it keeps."""
    seen = {}

    def watching(rates: tuple[int, ...]) -> Callable[[Tensor, Tensor], Tensor]:
        def run(x_t: Tensor, timesteps: Tensor) -> Tensor:
            seen.setdefault(rates, []).append(x_t)
            return torch.zeros_like(x_t)

        return run

    noise = randn(0, 1, 2, 9, 2, 2)
    for rates in ((1, 1, 1, 1), (2, 2, 1, 1)):
        sample(noise, rates, denoiser=watching(rates))
    for step, (full, half) in enumerate(zip(seen[1, 1, 1, 1], seen[2, 2, 1, 1], strict=True)):
        assert torch.equal(full[:, :, ::2] if step < 2 else full, half)


def test_positions_are_told_only_when_asked_for() -> None:
    told = []

    def placing(x_t: Tensor, timesteps: Tensor, frame_positions: list[int] | None = None) -> Tensor:
        told.append(frame_positions)
        return denoise(x_t, timesteps)

    noise = randn(0, 1, 2, 8, 2, 2)
    sample(noise, (4, 2, 1, 1), denoiser=placing, positions="strided")
    assert told == [[0, 4, 7], [0, 2, 4, 6, 7], list(range(8)), list(range(8))]
    told.clear()
    sample(noise, denoiser=placing)
    assert told == [None] * 4


# --- Randomness, conditioning, callbacks


def test_a_seeded_generator_decides_everything() -> None:
    noise = randn(0, 2, 3, 9, 4, 4)
    torch.manual_seed(1)
    first = sample(noise, seed=5)
    torch.manual_seed(2)
    assert torch.equal(first, sample(noise, seed=5))
    assert not torch.equal(first, sample(noise, seed=6))


def test_without_a_generator_the_global_one_draws() -> None:
    noise, sampler = randn(0, 1, 2, 5, 2, 2), HalfRateInterpolationSampler(denoise, interpolate_linearly)
    torch.manual_seed(1)
    first = sampler(noise)
    torch.manual_seed(1)
    assert torch.equal(first, sampler(noise))
    assert not torch.equal(first, sampler(noise))


def test_with_a_generator_each_a_sample_does_not_depend_on_its_batch() -> None:
    noise = randn(0, 3, 2, 8, 4, 4)
    sampler = HalfRateInterpolationSampler(denoise, interpolate_linearly)
    together = sampler(noise, [generator(seed) for seed in range(3)])
    for row in range(3):
        alone = sampler(noise[row : row + 1], generator(row))
        torch.testing.assert_close(together[row : row + 1], alone)


def test_conditioning_reaches_every_step() -> None:
    given_ = []

    def conditioned(x_t: Tensor, timesteps: Tensor, text: str, scale: float = 1.0) -> Tensor:
        given_.append((text, scale))
        return scale * denoise(x_t, timesteps)

    sampler = HalfRateInterpolationSampler(conditioned, interpolate_linearly)
    sampler(randn(0, 1, 2, 5, 2, 2), text="a cat", scale=0.5)
    assert given_ == [("a cat", 0.5)] * 4


def test_a_callback_sees_each_step() -> None:
    steps = []
    noise = randn(0, 1, 2, 21, 4, 4)
    result = sample(noise, on_step=steps.append)
    assert [(s.index, s.timestep, s.rate, s.x_0.shape[2]) for s in steps] == [
        (0, 1000.0, 2, 11), (1, 900.0, 2, 11), (2, 757.0, 1, 21), (3, 522.0, 1, 21),
    ]  # fmt: skip
    assert torch.equal(steps[-1].x_0, result)


def test_nothing_keeps_a_graph() -> None:
    model = nn.Conv3d(2, 2, 1)
    result = sample(randn(0, 1, 2, 5, 2, 2).float(), denoiser=lambda x_t, timesteps: model(x_t))
    assert not result.requires_grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_the_sample_has_the_dtype_of_the_noise(dtype: torch.dtype) -> None:
    """Also where the model and the interpolator give others, and timesteps are told exactly."""
    told = []

    def mixed(x_t: Tensor, timesteps: Tensor) -> Tensor:
        told.extend(timesteps.tolist())
        return denoise(x_t, timesteps).bfloat16()

    network = LatentFrameInterpolator(8)
    result = sample(randn(0, 1, 8, 8, 4, 4).to(dtype), denoiser=mixed, interpolator=lambda x: network(x).double())
    assert result.dtype == dtype
    assert told == [float(t) for t in GRID]


def test_noise_between_steps_has_the_right_share() -> None:
    """With a denoiser that says nothing, what goes into a step is noise of its sigma."""
    inputs = []

    def zero(x_t: Tensor, timesteps: Tensor) -> Tensor:
        inputs.append(x_t)
        return torch.zeros_like(x_t)

    sample(randn(0, 4, 8, 9, 16, 16), denoiser=zero)
    for timestep, x_t in zip(GRID, inputs, strict=True):
        assert x_t.std().item() == pytest.approx(timestep / 1000, rel=0.02)


# --- Wrong input


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"half_rate_steps": 5}, "from 0 to 4"),
        ({"half_rate_steps": -1}, "from 0 to 4"),
        ({"rates": (2, 1)}, "each of the 4 steps"),
        ({"rates": (3, 1, 1, 1)}, "powers of two"),
        ({"rates": (1, 2, 1, 1)}, "do not grow"),
        ({"rates": (0, 0, 0, 0)}, "powers of two"),
        ({"timesteps": (522, 757)}, "fall strictly"),
        ({"timesteps": (1000, 0)}, "above 0"),
        ({"timesteps": (1001, 900)}, "at most 1000"),
        ({"timesteps": ()}, "fall strictly"),
        ({"timesteps": (1000, float("nan"), 500)}, "fall strictly"),
        ({"positions": "absolute"}, "consecutive"),
    ],
)
def test_wrong_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        HalfRateInterpolationSampler(denoise, interpolate_linearly, **options)


def never(*args: object, **kwargs: object) -> None:
    raise AssertionError("work began")


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((1, 16, 1, 8, 8), "one frame"),
        ((1, 4, 9, 8, 8), "16 channels"),
        ((1, 16, 9, 3, 8), "at least 4"),
        ((16, 9, 8, 8), "B, C, F, H, W"),
        ((0, 16, 9, 8, 8), "none of them 0"),
    ],
)
def test_noise_that_cannot_be_used_is_refused_before_work_starts(shape: tuple[int, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        HalfRateInterpolationSampler(never, LatentFrameInterpolator(16))(torch.randn(shape))


def test_other_wrong_input_is_refused() -> None:
    sampler = HalfRateInterpolationSampler(never, interpolate_linearly)
    noise = torch.randn(2, 3, 9, 4, 4)
    with pytest.raises(TypeError, match="floating"):
        sampler(noise.long())
    with pytest.raises(ValueError, match="1 generators for 2 samples"):
        sampler(noise, [generator()])
    with pytest.raises(ValueError, match="denoiser must return"):
        sample(noise, denoiser=lambda x_t, timesteps: x_t[:, :, :1])
    with pytest.raises(ValueError, match="interpolator must return"):
        sample(noise, interpolator=lambda x: x)


def test_frames_and_rates_that_do_not_fit_are_refused() -> None:
    x_0 = torch.randn(1, 2, 5, 2, 2)
    for rate in (0, 3, -2):
        with pytest.raises(ValueError, match="power of two"):
            kept_frames(9, rate)
    with pytest.raises(ValueError, match="at least one frame"):
        kept_frames(0, 2)
    with pytest.raises(ValueError, match="of 9 frames at rate 4 must have 3, got 5"):
        raise_frame_rate(x_0, interpolate_linearly, 9, 4, 1)
    for target in (0, 4):
        with pytest.raises(ValueError, match="target_rate must be from 1"):
            raise_frame_rate(x_0, interpolate_linearly, 9, 2, target)


def test_step_rates() -> None:
    assert step_rates(4) == (2, 2, 1, 1)
    assert step_rates(3, 0) == (1, 1, 1)
    assert step_rates(3, rates=[4, 4, 2]) == (4, 4, 2)


def test_repeated_frames_are_an_interpolator_too() -> None:
    noise = randn(0, 1, 2, 8, 4, 4)
    assert not torch.equal(sample(noise, interpolator=repeat_frames), sample(noise))
