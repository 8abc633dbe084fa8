"""Samples for the monitors, of methods whose training makes none: the student is sampled every so many steps."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Self

import torch
from pydantic import Field
from torch import Tensor

from avd_trainer.methods.base import Batches, Call, Turn
from avd_trainer.methods.distillation import Distillation, DistillationConfig
from avd_trainer.runtime.draws import Draws


class WatchedConfig(DistillationConfig):
    """Options of a method that is watched."""

    watch_every: int = Field(default=10, ge=0)
    """Steps between two at which the student is sampled for the monitors; 0 for never. Training itself makes no
    samples."""

    def unwatched(self) -> Self:
        return self.model_copy(update={"watch_every": 0})

    def watching_calls(self, max_steps: int) -> Sequence[Call]:
        """What that costs."""
        watched = (max_steps // self.watch_every) / max_steps if self.watch_every else 0.0
        return [Call("student", watched * len(self.few_steps))] if watched else []


class Watched(Distillation):
    """A method that learns from clips, and is sampled for the monitors."""

    def own_turns(self, step: int) -> Sequence[Turn]:
        every = self.config.watch_every
        return [Turn("student", ("clips",), watched=every > 0 and step % every == 0)]

    def watch(self, turn: Turn, batch: Batches, draws: Draws) -> dict[str, Tensor]:
        """In a watched turn samples of the clips' captions, as a metric for the monitors."""
        if not turn.watched:
            return {}
        assert self.sampler is not None, "who makes students can sample them"
        condition, unconditional_LD = batch["clips"].condition, self.setting.unconditional
        noise, shape = draws.named("trajectory"), self.setting.latent_shape
        with torch.no_grad():
            return {"x_0": self.sampler(self.student, condition, unconditional_LD, shape, noise)}
