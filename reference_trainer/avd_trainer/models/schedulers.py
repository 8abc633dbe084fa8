"""The student's few steps as diffusers' schedulers hold them."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FlowMatchLCMScheduler

from avd_core import FlowMatchingSchedule, shift_timesteps
from avd_core.sampling import SamplerKind

GRID = "_timesteps"
"""In a scheduler's config: the exact grid. diffusers keeps names that begin so, and does not take them for mistakes."""

SAMPLER = "_sampler"
"""Beside it: how the student goes from one of its steps to the next. Exports from before have none: they re-noise."""

DiffusersScheduler: TypeAlias = FlowMatchLCMScheduler | FlowMatchEulerDiscreteScheduler
_CLASSES: Mapping[SamplerKind, type[DiffusersScheduler]] = {
    "re-noise": FlowMatchLCMScheduler,
    "ode": FlowMatchEulerDiscreteScheduler,
}


def few_steps(scheduler: Mapping[str, Any]) -> Any:
    """The grid in a ``scheduler_config.json``, of an export or of a saved ``FewStepScheduler``; None if it has none."""
    return scheduler.get(GRID, scheduler.get("timesteps"))


def sampler_kind(scheduler: Mapping[str, Any]) -> Any:
    """How a student is sampled, by the same file."""
    return scheduler.get(SAMPLER, scheduler.get("sampler", "re-noise"))


def closest_scheduler(timesteps: Sequence[float], sampler: SamplerKind = "re-noise") -> DiffusersScheduler:
    """The sampler that a student is trained for, as diffusers has it, with the grid that is closest to the student's.

    Its class has no field for a grid of one's own; ``shift`` and the end shape one, which begins at 1000. Exact for
    evenly spaced steps from 1000 and shifts of them (``1000, 750, 500, 250``; ``1000, 938, 833, 625``); for the paper's
    grid off by 1.1 of 1000. The exact grid stands beside them in an export, for who reads it: ``avd sample``, and
    ``FewStepScheduler`` of ``avd_integrations``.
    """
    kind = _CLASSES[sampler]
    if len(timesteps) == 1:
        return kind()
    end = timesteps[-1] / FlowMatchingSchedule().num_train_timesteps

    def scheduler(shift: float) -> DiffusersScheduler:
        return kind(shift=round(shift, 4), shift_terminal=end)

    return scheduler(_best_shift(lambda shift: grid_error(scheduler(shift), timesteps)))


def closest_even_shift(timesteps: Sequence[float]) -> tuple[float, float]:
    """The shift of even steps from 1000 that comes closest to a student's grid, as for ComfyUI's ``simple`` schedule.

    Returns:
        The shift, to two decimals as that program takes it, and the most by which a timestep is off.
    """
    steps, last = len(timesteps), FlowMatchingSchedule().num_train_timesteps
    even = torch.tensor([last - int(step * last / steps) for step in range(steps)], dtype=torch.float64)

    def error(shift: float) -> float:
        return float((shift_timesteps(even, round(shift, 2)) - torch.tensor(timesteps)).abs().max())

    best = round(_best_shift(error), 2)
    return best, error(best)


def grid_error(scheduler: DiffusersScheduler, timesteps: Sequence[float]) -> float:
    """The most by which a timestep that a scheduler samples at is off a student's."""
    scheduler.set_timesteps(len(timesteps))
    found: list[float] = scheduler.timesteps.tolist()
    return max(abs(own - wanted) for own, wanted in zip(found, timesteps, strict=True))


def _best_shift(error: Callable[[float], float]) -> float:
    """Where an error that has one minimum is least, of shifts from 1/55 to 55; the mildest of equals."""
    best = 0.0
    for width in (4.0, 0.1, 0.0025):  # a coarse look at the logarithm, then closer ones
        tried = [best + width * place / 40 for place in range(-40, 41)]
        best = min(tried, key=lambda log_shift: (error(math.exp(log_shift)), abs(log_shift)))
    return math.exp(best)
