import pytest

from avd_trainer.models.schedulers import GRID, closest_scheduler, few_steps, grid_error


@pytest.mark.parametrize(
    ("grid", "off"),
    [
        ((1000, 900, 757, 522), 1.1),
        ((1000, 750, 500, 250), 0.01),
        ((1000, 937.5, 833.333, 625), 0.01),
        ((1000, 500), 0.01),
        ((1000,), 0.01),
        (tuple(range(1000, 0, -100)), 0.01),
        ((900, 600, 300), 100),  # its grids begin at 1000
    ],
)
def test_diffusers_scheduler_comes_close_to_a_grid(grid: tuple[float, ...], off: float) -> None:
    scheduler = closest_scheduler(grid)
    scheduler.set_timesteps(len(grid))
    assert scheduler.timesteps.tolist() == pytest.approx(grid, abs=off)
    error = grid_error(scheduler, grid)
    assert error <= off
    assert error == max(abs(scheduler.timesteps.numpy() - grid))


def test_the_grid_of_an_export_comes_before_that_of_a_scheduler_class() -> None:
    assert few_steps({GRID: [1000.0, 500.0], "timesteps": [1000]}) == [1000.0, 500.0]
    assert few_steps({"timesteps": [1000]}) == [1000]
    assert few_steps(closest_scheduler((1000, 500)).config) is None
