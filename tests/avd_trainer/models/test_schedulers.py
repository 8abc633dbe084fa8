import pytest
from diffusers import FlowMatchEulerDiscreteScheduler, FlowMatchLCMScheduler

from avd_core.sampling import SamplerKind
from avd_trainer.models.schedulers import (
    GRID,
    SAMPLER,
    closest_even_shift,
    closest_scheduler,
    few_steps,
    grid_error,
    sampler_kind,
)


@pytest.mark.parametrize(
    ("sampler", "kind"), [("re-noise", FlowMatchLCMScheduler), ("ode", FlowMatchEulerDiscreteScheduler)]
)
@pytest.mark.parametrize(
    ("grid", "off"),
    [
        ((1000, 900, 757, 522), 1.1),
        ((1000, 750, 500, 250), 0.01),
        ((1000, 937.5, 833.333, 625), 0.01),
        ((1000, 500), 0.01),
        ((1000,), 0.01),
        (tuple(range(1000, 0, -100)), 0.01),
        ((1000, 900, 750, 500), 0.01),
        ((900, 600, 300), 100),  # its grids begin at 1000
    ],
)
def test_diffusers_scheduler_comes_close_to_a_grid(
    grid: tuple[float, ...], off: float, sampler: SamplerKind, kind: type
) -> None:
    scheduler = closest_scheduler(grid, sampler)
    assert type(scheduler) is kind
    scheduler.set_timesteps(len(grid))
    assert scheduler.timesteps.tolist() == pytest.approx(grid, abs=off)
    error = grid_error(scheduler, grid)
    assert error <= off
    assert error == max(abs(scheduler.timesteps.numpy() - grid))


def test_the_grid_of_an_export_comes_before_that_of_a_scheduler_class() -> None:
    assert few_steps({GRID: [1000.0, 500.0], "timesteps": [1000]}) == [1000.0, 500.0]
    assert few_steps({"timesteps": [1000]}) == [1000]
    assert few_steps(closest_scheduler((1000, 500)).config) is None


def test_how_a_student_goes_on_is_read_beside_it() -> None:
    assert sampler_kind({SAMPLER: "ode", "sampler": "re-noise"}) == "ode"
    assert sampler_kind({"sampler": "ode"}) == "ode"
    assert sampler_kind({GRID: [1000.0]}) == "re-noise"  # exports from before


@pytest.mark.parametrize(
    ("grid", "shift", "off"),
    [
        ((1000, 750, 500, 250), 1.0, 0.0),
        ((1000, 938, 833, 625), 5.0, 0.5),
        ((1000, 900, 757, 522), 3.2, 5.9),  # 3.2 / 1.65 of 500 is 762
        ((1000,), 1.0, 0.0),
        ((1000, 667, 334), 1.0, 0.0),
    ],
)
def test_the_shift_of_even_steps_that_comes_close_to_a_grid(grid: tuple[float, ...], shift: float, off: float) -> None:
    found, error = closest_even_shift(grid)
    assert found == shift
    assert error == pytest.approx(off, abs=0.05)
    even = [1 - int(1000 * step / len(grid)) / 1000 for step in range(len(grid))]
    timesteps = [1000 * shift * sigma / (1 + (shift - 1) * sigma) for sigma in even]
    assert error == pytest.approx(max(abs(a - b) for a, b in zip(timesteps, grid, strict=True)), abs=1e-3)
