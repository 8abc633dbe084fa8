"""Two neighbouring points of a teacher's trajectory, which are to lead to the same place.

The teacher takes an Euler step from the upper point to the one below (Eq. 13-14 of Luo et al. 2023, arXiv 2310.04378,
where it is DDIM's). From the upper point the student goes straight to the end of the phase, from the lower one its
target does, and the two are to agree (Eq. 12). Models predict velocities of rectified flow, in which the end is ``x_t +
(sigma_end - sigma_t) v``: an ``x_0`` where the phase ends at 0.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from avd_trainer.methods.base import Cut
from avd_trainer.models.condition import Condition
from avd_trainer.models.samplers import Rollout, VelocityPredictor, predict, schedule


class Pair(NamedTuple):
    """Where two neighbouring points of a trajectory lead.

    Attributes:
        rollout: The student's answer at the upper point.
        cut: Of the velocity in it.
        prediction: ``[B, C, F, H, W]`` the end of the phase, from the upper point; with gradient at ``cut``.
        target: ``[B, C, F, H, W]`` the same end from the lower point, without gradient.
    """

    rollout: Rollout
    cut: Cut
    prediction: Tensor
    target: Tensor

    @property
    def x_0(self) -> Tensor:
        """``[B, C, F, H, W]`` the student's clean prediction, with gradient at ``cut``; whatever the phase's end."""
        return self.rollout._replace(velocity=self.cut.output).x_0


def consistency_pair(
    student: VelocityPredictor,
    target: VelocityPredictor,
    teacher: VelocityPredictor,
    x_t: Tensor,
    condition: Condition,
    *,
    upper: Tensor,
    lower: Tensor,
    end: Tensor,
) -> Pair:
    """Take ``x_t`` ``[B, C, F, H, W]`` at ``upper``, and where the teacher leads from it at ``lower``, to ``end``.

    The three are timesteps ``[B]``.
    """
    with torch.no_grad():
        x_lower = schedule.euler_step(x_t, teacher(x_t, upper, condition), upper, lower)
        target_BCFHW = predict(target, x_lower, lower, condition, finished=False).at(end)
    rollout = predict(student, x_t, upper, condition, finished=False)
    cut = Cut(rollout.velocity)
    return Pair(rollout, cut, rollout._replace(velocity=cut.output).at(end), target_BCFHW)


def mean_distance(prediction: Tensor, target: Tensor, *, huber: float | None = None) -> Tensor:
    """Mean pseudo-Huber distance ``sqrt(d^2 + c^2) - c`` with ``c = huber``, or mean squared distance without it."""
    if huber is None:
        return F.mse_loss(prediction, target)
    return ((prediction - target).square() + huber**2).sqrt().sub(huber).mean()
