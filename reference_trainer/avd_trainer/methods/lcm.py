"""Latent consistency: one jump from any point of the teacher's guided trajectory to its clean end.

Luo et al. 2023, Algorithm 1 and Eq. 9-14, in rectified flow. Equation numbers are that paper's; what they compute is in
:mod:`avd_trainer.methods.consistency`:

- Eq. 13-14, a step of the solver under guidance ``w``: DDIM's, which in rectified flow is Euler's, and in which the
  paper's ``(1 + w) eps(c) - w eps()`` is the usual form of guidance with scale ``1 + w``.
- Eq. 9, the consistency function ``f = c_skip x + c_out x_0``. It has to be the identity at the trajectory's end, and
  ``x_0 = x_t - sigma v`` is, where ``sigma = 0``. So there is no ``c_skip`` and no ``c_out``; at every other point the
  authors' are below 1e-5 and within 1e-5 of 1.
- Eq. 12, the distance of ``f`` and of what the average of ``f`` says a skip of k timesteps further on.

In the variance-preserving notation of the paper a point is ``x_t / n`` with ``n^2 = (1 - sigma)^2 + sigma^2``, which
changes neither ``x_0`` nor where a step leads.
"""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from avd_trainer.methods.consistency import Consistency, ConsistencyConfig

PAPER = "Luo et al. 2023, arXiv 2310.04378 (LCM)"
NEEDS = ("teacher", "clips")
FORWARDS = (6.4,)
SAMPLED = "4 steps, re-noise"


class LCMMethodConfig(ConsistencyConfig):
    """Latent consistency distillation. "Code" is the authors' training script in diffusers' examples."""

    kind: Literal["lcm"] = "lcm"
    few_steps: tuple[float, ...] = Field(default=(1000.0, 904.76, 750.0, 513.16), min_length=1)
    """The student's timesteps, falling, in (0, 1000]: points of the trajectory. Code: diffusers' scheduler for it takes
    the 50th, 38th, 25th and 13th of 50."""
    points: int = Field(default=50, ge=1)
    """Points of a trajectory: every 20th timestep. Paper: skips of k = 20; code: 50 points."""
    shift: float = Field(default=3.0, gt=0)
    """Shift of these points. Ours: Wan2.1's at 480p. The paper's model had another noise schedule."""
    lowest: float = Field(default=0.0, ge=0)
    """Where trajectories end, in timesteps before the shift. Paper: at the clip itself."""
    target: Literal["average", "student"] = "average"
    """Who goes on from the lower point. Paper: the average; code for adapters: the student itself."""
    ema_decay: float = Field(default=0.95, ge=0, lt=1)
    """Decay of the average, which is exported too. Paper and code: 0.95."""
    huber: float | None = Field(default=0.001, gt=0)
    """``c`` of the pseudo-Huber distance; None is the squared one. Code: 0.001; paper: the squared one."""


class LCM(Consistency):
    """Latent consistency distillation; see :class:`LCMMethodConfig`."""

    Config: ClassVar[type[LCMMethodConfig]] = LCMMethodConfig


METHOD = LCM
