r"""TrigFlow, in which time is an angle, and the loss of continuous-time consistency models in it.

An angle t in [0, pi/2] noises a clip to ``x_t = cos(t) x_0 + sin(t) noise``, and what a model gives is the velocity
``F = dx_t/dt = cos(t) noise - sin(t) x_0``, so that ``x_0 = cos(t) x_t - sin(t) F`` (Lu and Song 2024, arXiv
2410.11081, whose ``sigma_d`` is 1 here, as in the authors' code of rCM).

A flow model knows the same clips by another scale and time. With ``sigma = sin(t) / (cos(t) + sin(t))``::

    x_sigma = (1 - sigma) x_0 + sigma noise = x_t / (cos(t) + sin(t))
    F       = (velocity + (cos(t) - sin(t)) x_t) / (cos(t) + sin(t))      where velocity = noise - x_0

Both are exact, and nothing is divided by a number that can vanish. Shapes: angles ``[B]`` in radians, all else ``[B, C,
F, H, W]``.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from avd_trainer.models.condition import Condition
from avd_trainer.models.samplers import VelocityPredictor, schedule

NORM_OFFSET = 0.1
"""Added to a tangent's norm before it is divided by it. Lu and Song 2024, and the authors' code of rCM: 0.1."""


def cos_sin(angles: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
    """Cosine and sine of each sample's angle, ``[B, 1, ...]`` to broadcast against ``like``."""
    angles = angles.view(-1, *[1] * (like.ndim - 1))
    return angles.cos(), angles.sin()


def to_timesteps(angles: Tensor) -> Tensor:
    """Angles to a flow model's timesteps, 0 to 1000."""
    return schedule.num_train_timesteps * angles.sin() / (angles.cos() + angles.sin())


def to_angles(timesteps: Tensor) -> Tensor:
    """A flow model's timesteps to angles."""
    return torch.atan2(timesteps, schedule.num_train_timesteps - timesteps)


def to_flow(x_t: Tensor, angles: Tensor) -> Tensor:
    """A noised clip in the scale of a flow model."""
    cos, sin = cos_sin(angles, x_t)
    return x_t / (cos + sin)


def trig_velocity(velocity: Tensor, x_t: Tensor, angles: Tensor) -> Tensor:
    """The velocity F of TrigFlow, from what a flow model predicts of ``to_flow(x_t, angles)``."""
    cos, sin = cos_sin(angles, x_t)
    return (velocity + (cos - sin) * x_t) / (cos + sin)


def ask(model: VelocityPredictor, x_t: Tensor, angles: Tensor, condition: Condition) -> Tensor:
    """A flow model's velocity F of TrigFlow at ``x_t``."""
    return trig_velocity(model(to_flow(x_t, angles), to_timesteps(angles), condition), x_t, angles)


def step_back(x_t: Tensor, F: Tensor, step: float) -> Tensor:
    """Where the path through ``x_t`` with velocity F was an angle ``step`` before: exact for a path of TrigFlow."""
    return math.cos(step) * x_t - math.sin(step) * F


def difference(F: Tensor, F_before: Tensor, step: float) -> Tensor:
    """dF/dt from F here and an angle ``step`` before, as the authors' code has it (``fd_type=2``)."""
    return (math.cos(step) * F - F_before) / math.sin(step)


def consistency_tangent(
    F: Tensor, F_teacher: Tensor, F_tangent: Tensor, x_t: Tensor, angles: Tensor, warmup: Tensor | float
) -> Tensor:
    """``g = -cos sqrt(1 - r^2 sin^2) (F - F_teacher) - (r cos sin x_t + F_tangent)``: where the prediction is to go.

    With r = 1 it is ``cos(t) df/dt``, f being the prediction of x_0: 0 where that stays the same along the teacher's
    path. The form is that of the authors' code of rCM. In Algorithm 1 of Lu and Song 2024 the root is ``cos``, whatever
    r, and r stands before ``F_tangent`` as well.

    Args:
        F: The student's velocity; no gradient passes.
        F_teacher: The teacher's, guided.
        F_tangent: ``cos sin dF/dt`` of the student along the teacher's path.
        x_t: The noised clip.
        angles: Of it.
        warmup: r in [0, 1].
    """
    cos, sin = cos_sin(angles, x_t)
    root = (1 - (warmup * sin).square()).sqrt()
    return -cos * root * (F.detach() - F_teacher) - (warmup * cos * sin * x_t + F_tangent)


def consistency_loss(F: Tensor, tangent: Tensor) -> Tensor:
    """``|F - sg(F) - g / (|g| + 0.1)|^2 / (2 C F H W)``, its mean over samples; norms are those of whole samples.

    The authors' code sums over values and samples: its loss is ``2 B C F H W`` times this one, as its matching loss is
    of :class:`avd_core.DistributionMatchingLoss`. So weights of the two terms mean the same here and there.
    """
    norms_B = tangent.flatten(1).norm(dim=1)
    normalised = tangent / (norms_B + NORM_OFFSET).view(-1, *[1] * (F.ndim - 1))
    loss: Tensor = 0.5 * (F - F.detach() - normalised).square().mean()
    return loss
