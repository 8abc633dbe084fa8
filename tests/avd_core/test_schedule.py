import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from avd_core import FlowMatchingSchedule, classifier_free_guidance, shift_timesteps, standard_guidance_scale
from tensors import randn
from watchers import NoArithmetic

seeds = st.integers(0, 2**32 - 1)
timesteps = st.lists(st.floats(1, 1000), min_size=1, max_size=4).map(lambda t: torch.tensor(t, dtype=torch.float64))


def draw(seed: int, batch: int) -> tuple[Tensor, Tensor]:
    """x_0 and noise."""
    return randn(seed, batch, 2, 3), randn(seed + 1, batch, 2, 3)


# --- The path


@given(seeds, timesteps)
def test_noised_samples_lie_on_the_straight_line(seed: int, t: Tensor) -> None:
    x_0, noise = draw(seed, len(t))
    x_t = FlowMatchingSchedule().add_noise(x_0, noise, t)
    for b, timestep in enumerate(t.tolist()):
        sigma = timestep / 1000
        for actual, clean, n in zip(x_t[b].flatten(), x_0[b].flatten(), noise[b].flatten(), strict=True):
            assert actual.item() == pytest.approx((1 - sigma) * clean.item() + sigma * n.item(), rel=1e-9, abs=1e-12)


@given(seeds, timesteps)
def test_noise_velocity_and_x_0_convert_into_each_other(seed: int, t: Tensor) -> None:
    schedule = FlowMatchingSchedule()
    x_0, noise = draw(seed, len(t))
    x_t, velocity = schedule.add_noise(x_0, noise, t), schedule.velocity(x_0, noise)
    torch.testing.assert_close(schedule.velocity_to_x_0(velocity, x_t, t), x_0)
    torch.testing.assert_close(schedule.x_0_to_velocity(x_0, x_t, t), velocity, rtol=1e-6, atol=1e-9)


@given(seeds, timesteps)
def test_a_step_along_the_true_velocity_stays_on_the_line(seed: int, t: Tensor) -> None:
    schedule = FlowMatchingSchedule()
    x_0, noise = draw(seed, len(t))
    x_t, velocity, following = schedule.add_noise(x_0, noise, t), schedule.velocity(x_0, noise), t.flip(0) / 2
    there = schedule.add_noise(x_0, noise, following)
    torch.testing.assert_close(schedule.euler_step(x_t, velocity, t, following), there)
    there = schedule.velocity_to_x_0(velocity.flip(0), x_t, t)
    torch.testing.assert_close(schedule.euler_step(x_t, velocity.flip(0), t, torch.zeros_like(t)), there)
    with pytest.raises(ValueError, match="velocity"):
        schedule.euler_step(x_t, velocity[:, :1], t, following)


def test_the_ends_are_clean_and_pure_noise() -> None:
    schedule = FlowMatchingSchedule()
    x_0, noise = draw(0, 2)
    assert torch.equal(schedule.add_noise(x_0, noise, torch.tensor([0, 0])), x_0)
    assert torch.equal(schedule.add_noise(x_0, noise, torch.tensor([1000, 1000])), noise)


def test_velocity_points_from_clean_to_noise() -> None:
    x_0, noise = torch.zeros(1, 2), torch.ones(1, 2)
    assert torch.equal(FlowMatchingSchedule().velocity(x_0, noise), torch.ones(1, 2))


def test_at_the_clean_end_x_0_says_nothing_about_the_velocity() -> None:
    x_0, _ = draw(0, 1)
    assert not FlowMatchingSchedule().x_0_to_velocity(x_0, x_0 + 1, torch.tensor([0])).isfinite().any()


@given(seeds, st.floats(0.01, 1))
def test_time_may_be_counted_in_another_unit(seed: int, sigma: float) -> None:
    x_0, noise = draw(seed, 1)
    by_sigma = FlowMatchingSchedule(1).add_noise(x_0, noise, torch.tensor([sigma], dtype=torch.float64))
    by_step = FlowMatchingSchedule(1000).add_noise(x_0, noise, torch.tensor([1000 * sigma], dtype=torch.float64))
    torch.testing.assert_close(by_sigma, by_step)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("timestep_dtype", [torch.int64, torch.float32])
def test_results_have_the_dtype_of_the_samples(dtype: torch.dtype, timestep_dtype: torch.dtype) -> None:
    schedule, t = FlowMatchingSchedule(), torch.tensor([757, 522], dtype=timestep_dtype)
    x_0, noise = (tensor.to(dtype) for tensor in draw(0, 2))
    x_t = schedule.add_noise(x_0, noise, t)
    converted = (schedule.velocity_to_x_0(noise, x_t, t), schedule.x_0_to_velocity(x_0, x_t, t))
    for result in (x_t, *converted, schedule.euler_step(x_t, noise, t, t)):
        assert result.dtype == dtype


def test_sigma_is_not_rounded_to_the_samples_precision() -> None:
    # 0.757 would be 0.7578 in bfloat16; with noise 1 and x_0 0 the result is sigma, rounded once.
    schedule, like = FlowMatchingSchedule(), torch.zeros(1, 2, 3, dtype=torch.bfloat16)
    sigma = schedule.sigma(torch.tensor([757]), like)
    assert sigma.shape == (1, 1, 1)
    assert sigma.item() == pytest.approx(0.757, rel=1e-6)
    big = schedule.velocity_to_x_0(torch.full_like(like, 256.0), torch.full_like(like, 194.0), torch.tensor([757]))
    assert big[0, 0, 0].item() == pytest.approx(194 - 0.757 * 256, rel=2**-8)


def test_integer_timesteps_divide_to_fractions() -> None:
    sigma = FlowMatchingSchedule().sigma(torch.tensor([1000, 522]), torch.zeros(2, 1))
    assert sigma.flatten().tolist() == pytest.approx([1.0, 0.522])


# --- Shift

shifts = st.floats(0.1, 10)
sigmas = st.floats(0, 1)


@given(sigmas, shifts)
def test_shift_is_the_published_formula(sigma: float, shift: float) -> None:
    shifted = shift_timesteps(torch.tensor(1000 * sigma, dtype=torch.float64), shift).item()
    assert shifted == pytest.approx(1000 * shift * sigma / (1 + (shift - 1) * sigma), rel=1e-9, abs=1e-9)


@given(sigmas, shifts, shifts)
def test_shifts_compose_by_multiplication(sigma: float, first: float, second: float) -> None:
    t = torch.tensor(1000 * sigma, dtype=torch.float64)
    twice = shift_timesteps(shift_timesteps(t, first), second)
    torch.testing.assert_close(twice, shift_timesteps(t, first * second), rtol=1e-9, atol=1e-9)


@given(st.lists(st.floats(0, 1000), min_size=2, max_size=6, unique=True).map(sorted), shifts)
def test_shift_keeps_the_ends_and_the_order(t: list[float], shift: float) -> None:
    t = torch.tensor([0.0, *t, 1000.0], dtype=torch.float64)
    shifted = shift_timesteps(t, shift)
    assert shifted[0] == 0
    assert shifted[-1].item() == pytest.approx(1000)
    assert (shifted.diff() >= 0).all()
    # A shift above 1 moves towards noise, below 1 away from it.
    assert ((shifted - t) * (shift - 1) >= -1e-9).all()


def test_shift_gives_the_few_step_grid() -> None:
    # The even grid 1000, 750, 500, 250 at shift 5 in the unit of sigma, 1 for pure noise.
    shifted = shift_timesteps(torch.tensor([1.0, 0.75, 0.5, 0.25]), 5.0, num_train_timesteps=1)
    assert shifted.tolist() == pytest.approx([1.0, 0.9375, 5 / 6, 0.625])


def test_shift_one_changes_nothing_and_keeps_shape_and_dtype() -> None:
    t = torch.tensor([[1000.0, 522.0]], dtype=torch.float32)
    shifted = shift_timesteps(t, 1.0)
    assert shifted.dtype == t.dtype
    torch.testing.assert_close(shifted, t)


# --- Guidance


def test_guidance_one_is_conditional_and_zero_unconditional() -> None:
    conditional, unconditional = draw(0, 1)
    torch.testing.assert_close(classifier_free_guidance(conditional, unconditional, 1.0), conditional)
    assert torch.equal(classifier_free_guidance(conditional, unconditional, 0.0), unconditional)


@given(seeds, st.floats(-2, 10))
def test_the_additive_form_is_one_less(seed: int, g: float) -> None:
    conditional, unconditional = draw(seed, 1)
    additive = conditional + g * (conditional - unconditional)
    scale = standard_guidance_scale(g)
    assert scale == g + 1
    torch.testing.assert_close(classifier_free_guidance(conditional, unconditional, scale), additive)


# --- Wrong input

x = torch.zeros(2, 3)
t = torch.tensor([1000, 522])
schedule = FlowMatchingSchedule()

WRONG = {
    "one timestep per frame": (
        lambda: schedule.add_noise(x, x, torch.full((1, 3), 900)),
        ValueError,
        "Times of single frames",
    ),
    "thousands for fractions": (
        lambda: FlowMatchingSchedule(1).add_noise(x, x, t),
        ValueError,
        r"timesteps \[1000.*\] lie outside \[0, 1\].*num_train_timesteps",
    ),
    "negative timesteps": (lambda: schedule.velocity_to_x_0(x, x, -t), ValueError, r"lie outside \[0, 1000\]"),
    "timesteps that are NaN": (lambda: schedule.sigma(math.nan * t, x), ValueError, r"lie outside \[0, 1000\]"),
    "shapes differ": (lambda: schedule.add_noise(x, x[:1], t), ValueError, "x_0 and noise must have the same shape"),
    "integer samples": (lambda: schedule.add_noise(x.int(), x, t), TypeError, r"x_0\.float\(\)"),
    "devices differ": (lambda: schedule.add_noise(x, x.to("meta"), t), ValueError, "noise on meta"),
    "one timestep for a batch": (lambda: schedule.add_noise(x, x, t[:1]), ValueError, r"shape \[2\].*expand"),
    "a number as timestep": (lambda: schedule.add_noise(x, x, 900), TypeError, "timesteps must be a torch.Tensor"),
    "timesteps elsewhere": (lambda: schedule.add_noise(x, x, t.to("meta")), ValueError, "timesteps is on meta"),
    "velocity": (lambda: schedule.velocity(x, x[:, :1]), ValueError, "same shape"),
    "velocity to x_0": (lambda: schedule.velocity_to_x_0(x[:, :1], x, t), ValueError, "velocity and x_t"),
    "x_0 to velocity": (lambda: schedule.x_0_to_velocity(x[:, :1], x, t), ValueError, "x_0 and x_t"),
    "guidance": (lambda: classifier_free_guidance(x, x[:1], 5.0), ValueError, "conditional and unconditional"),
    "integer shift": (lambda: shift_timesteps(t, 5.0), TypeError, r"timesteps\.float\(\)"),
    "shift zero": (lambda: shift_timesteps(t.float(), 0.0), ValueError, "shift must be a finite number above 0"),
    "shift nan": (lambda: shift_timesteps(t.float(), math.nan), ValueError, "shift must be a finite number above 0"),
    "no timesteps": (
        lambda: FlowMatchingSchedule(0),
        ValueError,
        "timesteps must be a finite number above 0",
    ),
}


@pytest.mark.parametrize(("call", "error", "message"), WRONG.values(), ids=WRONG)
def test_wrong_input_is_refused_before_anything_happens(
    call: Callable[[], Any], error: type[Exception], message: str
) -> None:
    operands = [x.clone(), t.clone()]
    with pytest.raises(error, match=message):
        call()
    assert torch.equal(operands[0], x)
    assert torch.equal(operands[1], t)


def test_wrong_shapes_are_refused_before_any_arithmetic() -> None:
    wrong = x[:1]
    with pytest.raises(ValueError, match="same shape"), NoArithmetic():
        schedule.add_noise(x, wrong, t)
