import pytest
from diffusers import FlowMatchEulerDiscreteScheduler, FlowMatchLCMScheduler

from avd_core.sampling import SamplerKind
from avd_trainer.models.schedulers import GRID, SAMPLER, closest_scheduler, few_steps, grid_error, sampler_kind


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
