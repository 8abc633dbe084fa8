"""Phased consistency: a trajectory in as many phases as the student has steps, each with a jump to its end.

Wang et al. 2024, in its form for flow models: ``train_pcm_lora_sd3.py`` of their code. What the equations compute is in
:mod:`avd_trainer.methods.consistency`: a solver's step under guidance, the jump ``x_t + (sigma_end - sigma_t) v`` to
the end of the phase, and the pseudo-Huber distance to the jump of the student itself from the point below. At the
lowest point of a phase that point is its end, and the target what the teacher says. A sample takes one jump after the
other and draws no noise in between.
"""

from __future__ import annotations

from typing import ClassVar, Literal, Self

from pydantic import Field, model_validator

from avd_core.sampling import SamplerKind
from avd_trainer.methods.consistency import Consistency, ConsistencyConfig
from avd_trainer.models.samplers import schedule

PAPER = "Wang et al. 2024, arXiv 2405.18407 (PCM)"
NEEDS = ("teacher", "clips")
FORWARDS = (6.4,)
SAMPLED = "4 steps, ode"


class PCMMethodConfig(ConsistencyConfig):
    """Phased consistency distillation. "Code" is the authors' script for Stable Diffusion 3, a flow model."""

    kind: Literal["pcm"] = "pcm"
    sampled_by: ClassVar[SamplerKind] = "ode"
    few_steps: tuple[float, ...] = Field(default=(1000.0, 900.0, 750.0, 500.0), min_length=1)
    """Where phases begin, and so the student's timesteps, falling from 1000; each is a point of the trajectory. Code:
    2, 4 or 8 phases of equal length before the shift."""
    points: int = Field(default=100, ge=1)
    """Points of a trajectory. Code: 100 in its commands, 50 by default."""
    shift: float = Field(default=3.0, gt=0)
    """Shift of these points. Code: 3, its model's own, as Wan2.1's at 480p."""
    lowest: float = Field(default=1.0, ge=0)
    """Where trajectories end, in timesteps before the shift. Code: 1, with 0 named as the alternative."""
    guidance_scale: float = Field(default=4.0, ge=1)
    """Classifier-free guidance of the teacher's step, standard form. Code: w = 3, which is 4 in it."""

    @property
    def edges(self) -> tuple[int, ...]:
        """Each phase ends where the next one begins, the last at the trajectory's end."""
        return (0, *(self.nearest_point(step) for step in reversed(self.few_steps[1:])))

    @model_validator(mode="after")
    def _check_phases(self) -> Self:
        if off := self.steps_off_points():
            raise ValueError(off)
        if self.few_steps[0] != schedule.num_train_timesteps:
            raise ValueError(f"few_steps must begin at 1000, where the first phase does, got {self.few_steps[0]:g}")
        return self


class PCM(Consistency):
    """Phased consistency distillation; see :class:`PCMMethodConfig`."""

    Config: ClassVar[type[PCMMethodConfig]] = PCMMethodConfig


METHOD = PCM
