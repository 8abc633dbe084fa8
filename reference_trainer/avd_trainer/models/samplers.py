"""From noise to samples: the student's few steps, and the teacher's many."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from avd_core import FlowMatchingSchedule, classifier_free_guidance, shift_timesteps
from avd_core.sampling import SamplerKind, kept_frames
from avd_trainer.models.condition import Condition

schedule = FlowMatchingSchedule()

VelocityPredictor = Callable[[Tensor, Tensor, Condition], Tensor]
"""``(x_t [B, C, F, H, W], timesteps [B], condition)`` to a velocity ``[B, C, F, H, W]``."""

DrawNoise = Callable[[Sequence[int]], Tensor]
"""A sample's shape ``[C, F, H, W]`` to standard normal noise ``[B, C, F, H, W]``."""


class Sampler(Protocol):
    """How a model becomes a sample, in inference."""

    def __call__(
        self,
        model: VelocityPredictor,
        condition: Condition,
        unconditional: Tensor,
        shape: Sequence[int],
        draw_noise: DrawNoise,
    ) -> Tensor:
        """A sample ``[B, C, F, H, W]`` for each of the B that ``condition`` tells of; arguments as in
        :func:`sample_teacher`."""


@dataclass(frozen=True)
class FewStepSampler:
    """A distilled student's sampler; see :func:`few_step_rollout`.

    Attributes:
        few_steps: Timesteps, falling.
        kind: How it goes from one to the next.
    """

    few_steps: Sequence[float]
    kind: SamplerKind = "re-noise"

    def __call__(
        self,
        model: VelocityPredictor,
        condition: Condition,
        unconditional: Tensor,
        shape: Sequence[int],
        draw_noise: DrawNoise,
    ) -> Tensor:
        return few_step_rollout(model, condition, shape, self.few_steps, draw_noise, sampler=self.kind).x_0


@dataclass(frozen=True, kw_only=True)
class EulerSampler:
    """Euler steps of the probability-flow ODE; see :func:`sample_teacher`."""

    guidance_scale: float
    shift: float
    steps: int = 25

    def __call__(
        self,
        model: VelocityPredictor,
        condition: Condition,
        unconditional: Tensor,
        shape: Sequence[int],
        draw_noise: DrawNoise,
    ) -> Tensor:
        return sample_teacher(
            model,
            condition,
            unconditional,
            shape,
            draw_noise,
            steps=self.steps,
            guidance_scale=self.guidance_scale,
            shift=self.shift,
        )


class Rollout(NamedTuple):
    """The last step that the student ran, on its own trajectory or where it was asked to start.

    Attributes:
        x_t: ``[B, C, F, H, W]`` where the step started.
        velocity: ``[B, C, F, H, W]`` what the student predicted there.
        timesteps: ``[B]`` of that step.
        finished: Whether no step comes after it: the clean prediction is what the student would show.
    """

    x_t: Tensor
    velocity: Tensor
    timesteps: Tensor
    finished: bool

    @property
    def x_0(self) -> Tensor:
        """``[B, C, F, H, W]`` the clean prediction: the student's sample."""
        return schedule.velocity_to_x_0(self.velocity, self.x_t, self.timesteps)

    def at(self, timesteps: Tensor) -> Tensor:
        """``[B, C, F, H, W]`` where the velocity leads by other ``timesteps`` ``[B]``, in a straight line."""
        return schedule.euler_step(self.x_t, self.velocity, self.timesteps, timesteps)


def clean_predictor(model: VelocityPredictor) -> Callable[[Tensor, Tensor, Condition], Tensor]:
    """``(x_t, timesteps, condition)`` to ``x_0``, for a :class:`avd_core.HalfRateInterpolationSampler`.

    At a lower frame rate, where ``x_t`` has some of the frames, the model sees those frames of the image latents.
    """

    def predict_x_0(x_t: Tensor, timesteps: Tensor, condition: Condition) -> Tensor:
        velocity = model(x_t, timesteps, _at_frame_rate(condition, x_t.shape[2]))
        return schedule.velocity_to_x_0(velocity, x_t, timesteps)

    return predict_x_0


def guided_velocity(
    model: VelocityPredictor,
    x_t: Tensor,
    timesteps: Tensor,
    condition: Condition,
    unconditional: Tensor,
    guidance_scale: float,
) -> Tensor:
    """Classifier-free guidance in one forward of twice the batch; with scale 1 a plain forward.

    ``unconditional`` is ``[L, D]``, the text embedding of the negative prompt. It takes the text's place alone: an
    image is shown to both, as in Wan2.1.
    """
    if guidance_scale == 1:
        return model(x_t, timesteps, condition)
    conditions = Condition.cat([condition, condition.with_text(unconditional)])
    both = model(torch.cat([x_t, x_t]), torch.cat([timesteps, timesteps]), conditions)
    conditional, without = both.chunk(2)
    return classifier_free_guidance(conditional, without, guidance_scale)


def guided(model: VelocityPredictor, unconditional: Tensor, guidance_scale: float) -> VelocityPredictor:
    """A model under guidance, asked as a model; see :func:`guided_velocity`."""

    def velocity(x_t: Tensor, timesteps: Tensor, condition: Condition) -> Tensor:
        return guided_velocity(model, x_t, timesteps, condition, unconditional, guidance_scale)

    return velocity


def few_step_rollout(
    model: VelocityPredictor,
    condition: Condition,
    shape: Sequence[int],
    timesteps: Sequence[float] | Sequence[Tensor],
    draw_noise: DrawNoise,
    *,
    sampler: SamplerKind = "re-noise",
    last: int | None = None,
    on_prediction: Callable[[float, Tensor], None] | None = None,
) -> Rollout:
    """Run the student from noise over its few steps, as in inference.

    Only the last step is run with gradient (where gradients are enabled at all), and no step after it is run.

    Args:
        model: The student.
        condition: What the B samples are to show.
        shape: ``[C, F, H, W]`` of a sample.
        timesteps: The few steps, falling; or tensors ``[B]``, with a time of each sample.
        draw_noise: Draws for the B samples.
        sampler: From one step to the next: ``re-noise`` takes the clean prediction and noises it anew, ``ode`` goes on
            along the velocity, and draws only the first noise.
        last: Index of the step to stop at; None runs all of them.
        on_prediction: Called in each step with its timestep, a number, and its clean prediction ``[B, C, F, H, W]``.
    """
    last = len(timesteps) - 1 if last is None else last
    x_t = draw_noise(shape)
    times = [torch.as_tensor(each).to(x_t).expand(len(condition)) for each in timesteps]
    with torch.no_grad():
        for step, next_B in enumerate(times[1 : last + 1]):
            rollout = predict(model, x_t, times[step], condition, finished=False)
            if on_prediction is not None:
                on_prediction(float(timesteps[step]), rollout.x_0)
            x_t = rollout.at(next_B) if sampler == "ode" else schedule.add_noise(rollout.x_0, draw_noise(shape), next_B)
    rollout = predict(model, x_t, times[last], condition, finished=last == len(timesteps) - 1)
    if on_prediction is not None:
        on_prediction(float(timesteps[last]), rollout.x_0)
    return rollout


def predict(
    model: VelocityPredictor, x_t: Tensor, timesteps: Tensor, condition: Condition, *, finished: bool
) -> Rollout:
    """One step of the student from ``x_t`` ``[B, C, F, H, W]`` at ``timesteps`` ``[B]``."""
    return Rollout(x_t, model(x_t, timesteps, condition), timesteps, finished)


@torch.no_grad()
def sample_teacher(
    model: VelocityPredictor,
    condition: Condition,
    unconditional: Tensor,
    shape: Sequence[int],
    draw_noise: DrawNoise,
    *,
    steps: int = 25,
    guidance_scale: float,
    shift: float,
    on_step: Callable[[], None] = lambda: None,
    on_prediction: Callable[[float, Tensor], None] | None = None,
) -> Tensor:
    """Sample ``[B, C, F, H, W]`` with Euler steps of the probability-flow ODE.

    Args:
        model: The teacher.
        condition: What the B samples are to show.
        unconditional: ``[L, D]``, the text embedding of the negative prompt.
        shape: ``[C, F, H, W]``.
        draw_noise: Draws for the B samples.
        steps: Euler steps.
        guidance_scale: Classifier-free guidance, standard form.
        shift: Of the evenly spaced timesteps, by :func:`avd_core.shift_timesteps`: above 1, more of the steps are at
            high noise. You et al. 2026 sample their teacher with 5; Wan2.1's own default at 480p is 3.
        on_step: Called after each step.
        on_prediction: As in :func:`few_step_rollout`.
    """
    x_t = draw_noise(shape)
    grid = shift_timesteps(torch.linspace(schedule.num_train_timesteps, 0, steps + 1), shift)
    for current, following in pairwise(grid.tolist()):
        timesteps = x_t.new_full((len(condition),), current)
        velocity = guided_velocity(model, x_t, timesteps, condition, unconditional, guidance_scale)
        if on_prediction is not None:
            on_prediction(current, schedule.velocity_to_x_0(velocity, x_t, timesteps))
        x_t = x_t + (following - current) / schedule.num_train_timesteps * velocity
        on_step()
    return x_t


def _at_frame_rate(condition: Condition, frames: int) -> Condition:
    """A condition of the highest rate with at most so many frames."""
    latents = condition.image_latents
    if latents is None:
        return condition
    rate = 1
    while len(kept := kept_frames(latents.shape[2], rate)) > frames:
        rate *= 2
    return replace(condition, image_latents=latents[:, :, kept])
