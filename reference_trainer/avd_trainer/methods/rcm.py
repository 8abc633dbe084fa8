"""Score-regularised consistency: sCM on real clips, and distribution matching on the student's own samples.

rCM, Zheng et al. 2025, after ``rcm/models/t2v_model_distill_rcm.py`` of their code. Both losses step together;
docs/methods/rcm.md says what differs from the authors' code.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import accumulate
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from avd_core import shift_timesteps
from avd_trainer.config.sections import ScoreTimestepsConfig
from avd_trainer.methods.base import Batches, Call, Loss, Setting, Turn, draw_noised
from avd_trainer.methods.continuous import ContinuousConfig, ContinuousConsistency, trained_as_theirs
from avd_trainer.methods.distillation import StudentRoleConfig
from avd_trainer.methods.dmd import DMD, DMDMethodConfig
from avd_trainer.models.condition import Condition
from avd_trainer.models.roles import Model
from avd_trainer.models.samplers import Rollout, few_step_rollout, schedule
from avd_trainer.runtime.draws import Draws

PAPER = "Zheng et al. 2025, arXiv 2510.08431 (rCM)"
NEEDS = ("teacher", "clips")
FORWARDS = (33.0,)
SAMPLED = "4 steps, re-noise"


class RCMMethodConfig(ContinuousConfig, DMDMethodConfig):
    """Score-regularised consistency. The values are the authors' for Wan2.1-T2V-1.3B, "theirs"."""

    kind: Literal["rcm"] = "rcm"  # type: ignore[assignment]
    online: StudentRoleConfig = trained_as_theirs(lr=4e-7)
    """The model that follows the student's samples. Theirs: 4e-7, betas 0 and 0.999, weight decay 0.01."""
    online_updates: int = Field(default=4, ge=1)
    """Updates of the online model per update of the student. Theirs: the student's is one update of five."""
    score_timesteps: ScoreTimestepsConfig = ScoreTimestepsConfig(low=0.0, high=1000.0)
    """Timesteps of the matching term, of the online model's training, and of random steps. Theirs: shift 5, all."""
    simulation: Literal["random", "fixed"] = "random"
    """Where a sample is noised to between its steps, of which there are up to the number of ``few_steps``: to drawn
    times, each at most the one before, or to the few steps. Theirs: random; ``dmd_fix_timesteps`` is the other."""

    def own_calls(self, max_steps: int) -> Sequence[Call]:
        matched = 1 - min(self.tangent_warmup / max_steps, 1.0)
        matching = [call._replace(times=matched * call.times) for call in super().own_calls(max_steps)]
        return (*self.consistency_calls(), *(call for call in matching if call.times))


class RCM(DMD):
    """Consistency and matching; see :class:`RCMMethodConfig`."""

    Config: ClassVar[type[RCMMethodConfig]] = RCMMethodConfig

    made_from = "clips"  # whose captions they are

    def __init__(self, config: Any, models: Mapping[str, Model], setting: Setting) -> None:
        super().__init__(config, models, setting)
        self.consistency = ContinuousConsistency(config, models["student"], models["teacher"], setting)
        self.state.add_module("consistency", self.consistency.state)

    def own_turns(self, step: int) -> Sequence[Turn]:
        if step <= self.config.tangent_warmup:
            return [Turn("student", ("clips",), "consistency")]
        return super().own_turns(step)

    def own_losses(self, turn: Turn, batch: Batches, draws: Draws) -> Iterator[Loss]:
        alone = turn.part == "consistency"
        if turn.role == "student":
            yield self.consistency.loss(batch, draws, shown=alone)
        if not alone:
            yield from super().own_losses(turn, batch, draws)

    def after(self, turn: Turn, *, accepted: bool) -> None:
        super().after(turn, accepted=accepted)
        self.consistency.after(turn)

    def generate(self, batch: Batches, draws: Draws) -> Rollout:
        """Backward simulation: from noise in some steps, the times between them drawn for each sample."""
        if self.config.simulation == "fixed":
            return super().generate(batch, draws)
        steps = len(self.config.few_steps)
        # One number for the whole batch: every rank must run the same number of forwards.
        last = draws.shared_integer("exit_step", steps)
        clips_BCFHW, condition = batch["clips"]
        drawn = (schedule.num_train_timesteps * draws.uniform("simulation_timesteps") for _ in range(steps - 1))
        shifted = (shift_timesteps(uniform_B, self.config.score_timesteps.shift) for uniform_B in drawn)
        first_B = clips_BCFHW.new_full((len(clips_BCFHW),), schedule.num_train_timesteps)
        falling = list(accumulate(shifted, torch.minimum, initial=first_B))
        noise = draws.named("trajectory")
        return few_step_rollout(self.student, condition, self.setting.latent_shape, falling, noise, last=last)

    def denoise(self, x_BCFHW: Tensor, condition: Condition, draws: Draws) -> Loss:
        """The online model's velocity F of TrigFlow on a noised sample: flow's, times ``1 / (cos + sin)``."""
        t_B, x_t_BCFHW, target_BCFHW = draw_noised(x_BCFHW, draws, "score", self.config.score_timesteps)
        error = self.online(x_t_BCFHW, t_B, condition) - target_BCFHW
        sigma = schedule.sigma(t_B, error)
        return Loss(((sigma.square() + (1 - sigma).square()) * error.square()).mean(), {})


METHOD = RCM
