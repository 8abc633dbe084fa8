"""Continuous-time consistency: a clip's prediction stays the same along the teacher's path, by its derivative.

sCM, as the authors of rCM have it for video: :mod:`avd_trainer.methods.continuous` has its loss.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar, Literal

from avd_trainer.methods.base import Batches, Call, Loss, Setting, Turn
from avd_trainer.methods.continuous import ContinuousConfig, ContinuousConsistency
from avd_trainer.methods.watching import Watched, WatchedConfig
from avd_trainer.models.roles import Model
from avd_trainer.models.samplers import FewStepSampler
from avd_trainer.runtime.draws import Draws

PAPER = "Lu and Song 2024, arXiv 2410.11081 (sCM)"
NEEDS = ("teacher", "clips")
FORWARDS = (6.4,)
SAMPLED = "4 steps, re-noise"


class SCMMethodConfig(ContinuousConfig, WatchedConfig):
    """Continuous-time consistency alone."""

    kind: Literal["scm"] = "scm"

    def own_calls(self, max_steps: int) -> Sequence[Call]:
        return (*self.consistency_calls(), *self.watching_calls(max_steps))


class SCM(Watched):
    """Continuous-time consistency; see :class:`SCMMethodConfig`."""

    Config: ClassVar[type[SCMMethodConfig]] = SCMMethodConfig

    def __init__(self, config: Any, models: Mapping[str, Model], setting: Setting) -> None:
        super().__init__(config, models, setting)
        self.sampler = FewStepSampler(config.few_steps)
        self.consistency = ContinuousConsistency(config, models["student"], models["teacher"], setting)
        self.state.add_module("consistency", self.consistency.state)

    def own_losses(self, turn: Turn, batch: Batches, draws: Draws) -> Iterator[Loss]:
        loss = self.consistency.loss(batch, draws, shown=True)
        yield loss._replace(metrics={**loss.metrics, **self.watch(turn, batch, draws)})

    def after(self, turn: Turn, *, accepted: bool) -> None:
        super().after(turn, accepted=accepted)
        self.consistency.after(turn)


METHOD = SCM
