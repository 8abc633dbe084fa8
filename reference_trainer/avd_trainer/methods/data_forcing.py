"""Data-forcing of a dmd2 student: the teacher sees, half of the time, a real clip in place of the sample.

Data-Forcing Distillation, arXiv 2606.18478: a few hundred updates of a student that DMD2 has distilled
(``student_weights``), without its GAN. Where the paper is silent, a reading of ours is an option; see
docs/methods/data_forcing.md.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from avd_trainer.methods.base import Batches
from avd_trainer.methods.dmd import DMD, DMDMethodConfig
from avd_trainer.models.samplers import schedule
from avd_trainer.runtime.draws import Draws

PAPER = "Chen et al. 2026, arXiv 2606.18478 (Data-Forcing Distillation)"
NEEDS = ("teacher", "clips")
FORWARDS = (32.5,)
SAMPLED = "4 steps, re-noise"


class DataForcingMethodConfig(DMDMethodConfig):
    """Data-Forcing Distillation: the paper's values are the defaults, where it states one."""

    kind: Literal["data_forcing"] = "data_forcing"  # type: ignore[assignment]
    forcing: float = Field(default=0.5, ge=0, le=1)
    """Probability with which the teacher sees a noised real clip of the sample's caption; 0 is method dmd on the
    captions of clips. Paper: 1/2."""
    forcing_noise: Literal["shared", "own"] = "shared"
    """Noise of that clip: the sample's, or drawn for it. Both are noised to the same time. Ours: shared."""

    def warnings(self, max_steps: int, student_weights: str | None) -> Sequence[str]:
        told = super().warnings(max_steps, student_weights)
        if student_weights is not None:
            return told
        return [
            *told,
            "data_forcing starts from the teacher itself, from where it is reported to diverge. Set student_weights to "
            "a student that dmd2 has distilled.",
        ]


class DataForcing(DMD):
    """Data-Forcing Distillation; see :class:`DataForcingMethodConfig`."""

    Config: ClassVar[type[DataForcingMethodConfig]] = DataForcingMethodConfig

    made_from = "clips"  # samples of their captions; nothing of a clip is in its sample

    def show_teacher(self, x_BCFHW: Tensor, x_t_BCFHW: Tensor, t_B: Tensor, batch: Batches, draws: Draws) -> Tensor:
        """A noised clip with probability 1/2, or else the noised sample. The online model always sees the sample."""
        clips_BCFHW = batch["clips"].latents
        if self.config.forcing_noise == "own":
            noise_BCFHW = draws.normal("forcing_noise", clips_BCFHW.shape[1:])
            clips_t_BCFHW = schedule.add_noise(clips_BCFHW, noise_BCFHW, t_B)
        else:  # (1 - s) clip + s e, where x_t is (1 - s) x + s e
            clips_t_BCFHW = x_t_BCFHW + (1 - schedule.sigma(t_B, x_BCFHW)) * (clips_BCFHW - x_BCFHW)
        forced_B = draws.uniform("forcing") < self.config.forcing
        return torch.where(forced_B.view(-1, 1, 1, 1, 1), clips_t_BCFHW, x_t_BCFHW)


METHOD = DataForcing
