import math

import pytest
import torch
from torch import nn

from avd_trainer.config.sections import OptimizerConfig
from avd_trainer.training.optimizers import adamw, mean_over_micro_batches, set_rates

Rates = list[tuple[float, float, float]]


def rates(schedule: str, steps: int, first: int = 1) -> Rates:
    """Learning rate and betas of each step from the first on."""
    config = OptimizerConfig(lr=0.01, betas=(0.9, 0.97), schedule=schedule)
    optimizer = adamw({"weight": nn.Parameter(torch.zeros(1))}, config)
    found = []
    for step in range(first, steps + 1):
        set_rates(optimizer, config, step, steps)
        (group,) = optimizer.param_groups
        found.append((group["lr"], *group["betas"]))
    return found


@pytest.mark.parametrize("steps", [1, 2, 3, 4, 7, 10, 60, 1001])
def test_one_cycle_is_pytorchs(steps: int) -> None:
    optimizer = torch.optim.AdamW([nn.Parameter(torch.zeros(1))], lr=0.01, betas=(0.9, 0.97))
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.01, total_steps=steps)
    expected: Rates = []
    for step in range(steps):
        (group,) = optimizer.param_groups
        expected.append((group["lr"], *group["betas"]))
        optimizer.step()
        if step < steps - 1:
            scheduler.step()
    for found, wanted in zip(rates("one_cycle", steps), expected, strict=True):
        assert found == pytest.approx(wanted, rel=1e-9)


def test_cosine_falls_from_the_first_step_to_nothing_behind_the_last() -> None:
    expected = [0.005 * (1 + math.cos(math.pi * step / 8)) for step in range(8)]
    found = rates("cosine", 8)
    assert [lr for lr, *_ in found] == pytest.approx(expected, rel=1e-12)
    assert (found[0][0], found[4][0]) == (0.01, pytest.approx(0.005))
    assert {tuple(betas) for _, *betas in found} == {(0.9, 0.97)}


def test_constant_stays() -> None:
    assert rates("constant", 5) == [(0.01, 0.9, 0.97)] * 5


def test_rates_are_a_function_of_the_step_alone() -> None:
    """So that a resumed run, which begins in the middle, has those of one that was not stopped."""
    assert rates("one_cycle", 10, first=7) == rates("one_cycle", 10)[6:]


def test_micro_batches_are_averaged_where_they_are_scalars_and_joined_where_they_are_lists() -> None:
    parts = [{"loss": torch.tensor(float(n)), "losses": torch.tensor([n, n + 0.5])} for n in range(3)]
    found = mean_over_micro_batches(parts)
    assert found["loss"] == 1
    assert found["losses"].tolist() == [0, 0.5, 1, 1.5, 2, 2.5]
