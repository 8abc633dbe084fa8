"""Distribution matching: samples move from where the online model sees them to where the teacher does.

Algorithm 1 of You et al. 2026 without its two terms, which is DMD2 without its GAN. Equation numbers are that paper's.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from avd_core import DistributionMatchingLoss, LossOutput
from avd_trainer.config.sections import ScoreTimestepsConfig
from avd_trainer.methods.base import Batches, Call, Cut, Loss, Setting, Turn, draw_noised, prefixed
from avd_trainer.methods.distillation import Distillation, DistillationConfig, StudentRoleConfig, describe_samples
from avd_trainer.models.condition import Condition
from avd_trainer.models.roles import Model, Roles, Trained
from avd_trainer.models.samplers import FewStepSampler, Rollout, few_step_rollout, guided_velocity, schedule
from avd_trainer.runtime.draws import Draws

PAPER = "Yin et al. 2024, arXiv 2405.14867 (DMD2)"
NEEDS = ("teacher", "prompts")
FORWARDS = (32.5,)
SAMPLED = "4 steps, re-noise"


class DMDMethodConfig(DistillationConfig):
    """Distribution matching distillation."""

    kind: Literal["dmd"] = "dmd"
    online: StudentRoleConfig = StudentRoleConfig()
    """The model that follows the student's samples."""
    online_updates: int = Field(default=5, ge=1)
    """Updates of the online model per update of the student. Paper: 5."""
    guidance_scale: float = Field(default=5.0, ge=1)
    """Classifier-free guidance of the teacher, standard form. Paper: 5."""
    matching_weight: float = Field(default=1.0, ge=0)
    """Weight of the distribution-matching term. Paper: 1."""
    score_timesteps: ScoreTimestepsConfig = ScoreTimestepsConfig()
    """Timesteps of the matching term and of the online model's training."""

    def roles(self, student_weights: str | None = None) -> Roles:
        return {**super().roles(student_weights), "online": Trained(self.online.optimizer, self.online.lora)}

    def own_calls(self, max_steps: int) -> Sequence[Call]:
        before = (len(self.few_steps) - 1) / 2  # steps without gradient: a sample stops at each as often as at others
        return (
            Call("student", before + (self.online_updates - 1) * (before + 1)),
            Call("student", 1, backward=True),
            Call("teacher", 1, guidance_scale=self.guidance_scale, beside="student"),
            Call("online", 1, beside="student"),
            Call("online", self.online_updates, backward=True),
        )


class DMD(Distillation):
    """Distribution matching; see :class:`DMDMethodConfig`."""

    Config: ClassVar[type[DMDMethodConfig]] = DMDMethodConfig

    made_from = "prompts"
    """What the student makes samples from."""

    def __init__(self, config: Any, models: Mapping[str, Model], setting: Setting) -> None:
        super().__init__(config, models, setting)
        self.online: Any = models.get("online")
        self.sampler = FewStepSampler(config.few_steps)
        self.matching = DistributionMatchingLoss(weight=config.matching_weight)
        self._generated: list[tuple[Tensor, Condition]] = []  # samples and what they show, by micro-batch

    def own_turns(self, step: int) -> Sequence[Turn]:
        # The first online update learns from the samples of the student's.
        more = [Turn("online", (self.made_from,))] * (self.config.online_updates - 1)
        return [Turn("student", (self.made_from,)), Turn("online"), *more]

    def own_losses(self, turn: Turn, batch: Batches, draws: Draws) -> Iterator[Loss]:
        if turn.role == "online":
            yield self.denoise(*self.take_sample(turn, batch, draws), draws)  # Eq. 2
            return
        condition = batch[self.made_from].condition
        rollout = self.generate(batch, draws)  # Algorithm 1: x = G(...)
        cut = Cut(rollout.velocity)
        x_BCFHW = rollout._replace(velocity=cut.output).x_0
        self._generated.append((x_BCFHW.detach(), condition))
        loss, metrics = self.match(x_BCFHW, batch, draws)  # Eq. 4
        yield Loss(loss, metrics | describe_samples(x_BCFHW.detach(), rollout), cut, samples=x_BCFHW)

    def generate(self, batch: Batches, draws: Draws) -> Rollout:
        """Backward simulation: the student's own trajectory, stopped at one of its few steps."""
        few_steps, noise = self.config.few_steps, draws.named("trajectory")
        # One step for the whole batch: every rank must run the same number of forwards.
        last = draws.shared_integer("exit_step", len(few_steps))
        condition, shape = batch[self.made_from].condition, self.setting.latent_shape
        return few_step_rollout(self.student, condition, shape, few_steps, noise, last=last)

    def take_sample(self, turn: Turn, batch: Batches, draws: Draws) -> tuple[Tensor, Condition]:
        """What the online model learns from: a new sample if the turn reads what it is made from, or the student's."""
        if self.made_from in turn.data:
            with torch.no_grad():
                self._generated.append((self.generate(batch, draws).x_0, batch[self.made_from].condition))
        return self._generated.pop(0)

    def match(self, x_BCFHW: Tensor, batch: Batches, draws: Draws) -> LossOutput:
        """Eq. 4: both models' clean predictions of the noised sample."""
        condition = batch[self.made_from].condition
        with torch.no_grad():
            t_B, x_t_BCFHW, _ = draw_noised(x_BCFHW.detach(), draws, "score", self.config.score_timesteps)
            seen_BCFHW = self.show_teacher(x_BCFHW.detach(), x_t_BCFHW, t_B, batch, draws)
            scale, unconditional_LD = self.config.guidance_scale, self.setting.unconditional
            real_BCFHW = guided_velocity(self.teacher, seen_BCFHW, t_B, condition, unconditional_LD, scale)
            online_BCFHW = self.online(x_t_BCFHW, t_B, condition)
            real_x_0 = schedule.velocity_to_x_0(real_BCFHW, seen_BCFHW, t_B)
            online_x_0 = schedule.velocity_to_x_0(online_BCFHW, x_t_BCFHW, t_B)
        loss, metrics = self.matching(x_BCFHW, real_x_0, online_x_0)
        return prefixed("matching", LossOutput(loss, {"gradient_square": metrics["gradient_norm"].square()}))

    def show_teacher(self, x_BCFHW: Tensor, x_t_BCFHW: Tensor, t_B: Tensor, batch: Batches, draws: Draws) -> Tensor:
        """What the teacher sees in Eq. 4: what the online model sees, the noised sample."""
        return x_t_BCFHW

    def summarise(self, metrics: dict[str, Tensor]) -> dict[str, Tensor]:
        # Only now: the root of a mean is not the mean of roots, and a batch can be shared out in any way.
        squares = metrics.pop("matching/gradient_square", None)
        norms = {} if squares is None else {"matching/gradient_norm": squares.sqrt()}
        return super().summarise(metrics | norms)

    def denoise(self, x_BCFHW: Tensor, condition: Condition, draws: Draws) -> Loss:
        """Eq. 2: the online model's velocity on a noised sample."""
        t_B, x_t_BCFHW, target_BCFHW = draw_noised(x_BCFHW, draws, "score", self.config.score_timesteps)
        return Loss(F.mse_loss(self.online(x_t_BCFHW, t_B, condition), target_BCFHW), {})


METHOD = DMD
