"""Running the models: one few-step rollout of the student, and sampling from teacher and student."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
from diffusers import WanTransformer3DModel
from torch import Tensor

from avd_core import FlowMatchingSchedule, classifier_free_guidance, shift_timesteps

schedule = FlowMatchingSchedule()

DrawNoise = Callable[[torch.Size], Tensor]


class Rollout(NamedTuple):
    """What the student made.

    Attributes:
        x_0: ``[B, C, F, H, W]`` its clean prediction at the last step that was run.
        velocity: ``[B, C, F, H, W]`` the velocity that ``x_0`` was computed from.
        timestep: The timestep of that step.
    """

    x_0: Tensor
    velocity: Tensor
    timestep: float


def predict_velocity(model: WanTransformer3DModel, x_t: Tensor, timesteps: Tensor, text: Tensor) -> Tensor:
    """One forward: ``[B, C, F, H, W]``, ``[B]``, ``[B, L, D]`` to a velocity ``[B, C, F, H, W]``."""
    velocity: Tensor = model(x_t, timesteps, text, return_dict=False)[0]
    return velocity


def guided_velocity(
    model: WanTransformer3DModel, x_t: Tensor, timesteps: Tensor, text: Tensor, guidance_scale: float
) -> Tensor:
    """Classifier-free guidance in one forward of twice the batch; with scale 1 a plain forward."""
    if guidance_scale == 1:
        return predict_velocity(model, x_t, timesteps, text)
    both = predict_velocity(
        model, torch.cat([x_t, x_t]), torch.cat([timesteps, timesteps]), torch.cat([text, torch.zeros_like(text)])
    )
    conditional, unconditional = both.chunk(2)
    return classifier_free_guidance(conditional, unconditional, guidance_scale)


def few_step_rollout(
    model: WanTransformer3DModel,
    text: Tensor,
    shape: Sequence[int],
    timesteps: Sequence[float],
    draw_noise: DrawNoise,
    *,
    last: int | None = None,
) -> Rollout:
    """Run the student from noise over its few steps, as in inference: predict x_0, noise it to the next step, repeat.

    Only the last step is run with gradient (where gradients are enabled at all), and no step after it is run.

    Args:
        model: The student.
        text: ``[B, L, D]``.
        shape: ``[C, F, H, W]`` of a sample.
        timesteps: The few steps, falling.
        draw_noise: Gives standard normal noise of a shape.
        last: Index of the step to stop at; None runs all of them.
    """
    last = len(timesteps) - 1 if last is None else last
    batch = len(text)
    x_t = draw_noise(torch.Size([batch, *shape]))
    with torch.no_grad():
        for current, following in pairwise(timesteps[: last + 1]):
            x_0 = _predict(model, x_t, current, text).x_0
            x_t = schedule.add_noise(x_0, draw_noise(x_0.shape), x_0.new_full((batch,), following))
    return _predict(model, x_t, timesteps[last], text)


@torch.no_grad()
def sample_teacher(
    model: WanTransformer3DModel,
    text: Tensor,
    shape: Sequence[int],
    draw_noise: DrawNoise,
    *,
    steps: int = 25,
    guidance_scale: float,
    shift: float = 3.0,
    on_step: Callable[[], None] = lambda: None,
) -> Tensor:
    """Sample ``[B, C, F, H, W]`` with Euler steps of the probability-flow ODE.

    Args:
        model: The teacher.
        text: ``[B, L, D]``.
        shape: ``[C, F, H, W]``.
        draw_noise: Gives standard normal noise of a shape.
        steps: Euler steps.
        guidance_scale: Classifier-free guidance, standard form.
        shift: Shift of the uniform timesteps. Wan2.1 samples 480p with 3.
        on_step: Called after each step.
    """
    x_t = draw_noise(torch.Size([len(text), *shape]))
    grid = shift_timesteps(torch.linspace(schedule.num_train_timesteps, 0, steps + 1), shift)
    for current, following in pairwise(grid.tolist()):
        velocity = guided_velocity(model, x_t, x_t.new_full((len(text),), current), text, guidance_scale)
        x_t = x_t + (following - current) / schedule.num_train_timesteps * velocity
        on_step()
    return x_t


def _predict(model: WanTransformer3DModel, x_t: Tensor, timestep: float, text: Tensor) -> Rollout:
    timesteps = x_t.new_full((len(x_t),), timestep)
    velocity = predict_velocity(model, x_t, timesteps, text)
    return Rollout(schedule.velocity_to_x_0(velocity, x_t, timesteps), velocity, timestep)
