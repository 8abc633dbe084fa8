"""What sCM and rCM have in common: consistency by the derivative of the prediction along the teacher's path.

Algorithm 1 of Lu and Song 2024, arXiv 2410.11081, as the authors of rCM (arXiv 2510.08431) have it for video. Its maths
is in :mod:`avd_trainer.methods.trigflow`; docs/methods/scm.md says what differs from their code.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Literal, Self

import torch
from pydantic import Field
from torch import Tensor, nn

from avd_trainer.config.sections import OptimizerConfig
from avd_trainer.methods import trigflow
from avd_trainer.methods.base import Batches, Call, Cut, Loss, Setting, Turn
from avd_trainer.methods.distillation import DistillationConfig, StudentRoleConfig, describe_samples
from avd_trainer.models.condition import Condition
from avd_trainer.models.forward_derivative import directional_derivative
from avd_trainer.models.roles import Model
from avd_trainer.models.samplers import guided_velocity, predict
from avd_trainer.runtime.draws import Draws


def trained_as_theirs(lr: float) -> StudentRoleConfig:
    """Of all weights, at this learning rate, otherwise as the authors of rCM do."""
    return StudentRoleConfig(optimizer=OptimizerConfig(lr=lr, betas=(0.0, 0.999), weight_decay=0.01))


class ContinuousConfig(DistillationConfig):
    """Options of the loss of sCM. The values are those of rCM's authors for Wan2.1-T2V-1.3B, "theirs"."""

    few_steps: tuple[float, ...] = (1000.0, 933.78, 852.9, 608.98)
    """The student's timesteps. Theirs: angles 1.5, 1.4 and 1.0 behind the first, which is arctan 80 (987.65) where they
    sample, and pure noise where they train."""
    student: StudentRoleConfig = trained_as_theirs(lr=2e-6)
    """The model that is distilled. Theirs: 2e-6, betas 0 and 0.999, weight decay 0.01."""
    guidance_scale: float = Field(default=5.0, ge=1)
    """Classifier-free guidance of the teacher, standard form. Theirs: 5."""
    consistency_weight: float = Field(default=100.0, gt=0)
    """Weight of ``consistency_loss``. Its gradient has the same norm for a clip of any size, while the matching term's,
    where there is one, grows as the root of the number of values. Theirs: 100, for 16 x 20 x 60 x 104 of them."""
    log_sigma_mean: float = 0.7
    """Clips are noised to angles whose tangent is log-normal: mean of its logarithm. Theirs: 0.7, for 14B 1.5."""
    log_sigma_std: float = Field(default=1.6, gt=0)
    """Its standard deviation. Theirs: 1.6."""
    derivative: Literal["differences", "forward"] = "differences"
    """How the student is differentiated along the teacher's path: by finite ``differences``, or exactly, by ``forward``
    differentiation (JVP), which has twice the operations, and takes attention apart. Differences need float32. Theirs:
    forward, by a kernel of their own."""
    derivative_step: float = Field(default=1e-4, gt=0, le=0.1)
    """Angle of the finite difference, in radians. Theirs: 1e-4."""
    tangent_warmup: int = Field(default=0, ge=0)
    """Steps over which the tangent's less stable part comes in; ours is 0 where no preset says otherwise. Theirs: 1000,
    for 14B none."""

    def check_precision(self, precision: str) -> None:
        if precision == "bfloat16" and self.derivative == "differences":
            raise ValueError(
                "precision=bfloat16 and method.derivative=differences exclude each other: the difference of two "
                f"predictions {self.derivative_step:g} radians apart is lost in rounding. Set method.derivative=forward"
            )

    def begins_later(self) -> Mapping[str, tuple[int, str]]:
        if not self.tangent_warmup:
            return {}
        return {"tangent_warmup": (self.tangent_warmup, "what is behind the warm-up")}

    def scaled(self, by: float) -> Self:
        return self.model_copy(update={"tangent_warmup": round(by * self.tangent_warmup)})

    def consistency_calls(self) -> Sequence[Call]:
        """What the loss costs."""
        return (
            Call("teacher", 1, guidance_scale=self.guidance_scale),
            Call("student", 1, differentiated=self.derivative == "forward"),  # or else elsewhere on the path
            Call("student", 1, backward=True),
        )


class ContinuousConsistency:
    """The loss of sCM; its ``state`` holds how many steps are done, for the warm-up."""

    def __init__(self, config: ContinuousConfig, student: Model, teacher: Model, setting: Setting) -> None:
        self.config, self.setting = config, setting
        self.student, self.teacher = student, teacher
        self.steps, self.state = torch.zeros((), device=setting.device), nn.Module()
        self.state.register_buffer("steps", self.steps)

    def loss(self, batch: Batches, draws: Draws, *, shown: bool) -> Loss:
        """Of a batch with ``clips``; ``shown`` says whether its predictions stand for the samples of the turn."""
        clips_BCFHW, condition = batch["clips"]
        normal_B = draws.normal("consistency_angles", (1,)).squeeze(1)
        t_B = (self.config.log_sigma_mean + self.config.log_sigma_std * normal_B).exp().atan()
        cos, sin = trigflow.cos_sin(t_B, clips_BCFHW)
        x_t = cos * clips_BCFHW + sin * draws.normal("consistency_noise", clips_BCFHW.shape[1:])
        x_sigma, timesteps_B = trigflow.to_flow(x_t, t_B), trigflow.to_timesteps(t_B)
        with torch.no_grad():  # and before the student's graph takes memory
            scale, unconditional = self.config.guidance_scale, self.setting.unconditional
            guided = guided_velocity(self.teacher, x_sigma, timesteps_B, condition, unconditional, scale)
            F_teacher = trigflow.trig_velocity(guided, x_t, t_B)
            derivative = self._derivative(x_t, t_B, F_teacher, condition)
        rollout = predict(self.student, x_sigma, timesteps_B, condition, finished=False)
        cut = Cut(rollout.velocity)
        F = trigflow.trig_velocity(cut.output, x_t, t_B)
        steps = self.config.tangent_warmup
        warmup = (self.steps / steps).clamp_max(1) if steps else 1.0
        tangent = trigflow.consistency_tangent(F, F_teacher, derivative(F.detach()), x_t, t_B, warmup)
        loss = self.config.consistency_weight * trigflow.consistency_loss(F, tangent)
        norms_B = tangent.flatten(1).norm(dim=1)
        metrics = {"consistency/loss": loss.detach(), "consistency/tangent_norm": norms_B.mean()}
        if not shown:
            return Loss(loss, metrics, cut)
        x_0 = rollout._replace(velocity=cut.output).x_0
        return Loss(loss, metrics | describe_samples(x_0.detach(), rollout), cut, samples=x_0)

    def after(self, turn: Turn) -> None:
        """End a turn."""
        if turn.role == "student":
            self.steps += 1

    def _derivative(
        self, x_t: Tensor, t_B: Tensor, F_teacher: Tensor, condition: Condition
    ) -> Callable[[Tensor], Tensor]:
        """From the student's F to ``cos sin dF/dt`` along the teacher's path; the student is asked here."""
        cos, sin = trigflow.cos_sin(t_B, x_t)
        if self.config.derivative == "differences":
            step = self.config.derivative_step
            before = trigflow.ask(self.student, trigflow.step_back(x_t, F_teacher, step), t_B - step, condition)
            return lambda F: cos * sin * trigflow.difference(F, before, step)
        # Scaled before and not behind, Sec. 5.1 of Lu and Song: a derivative can be large where the product is not.
        along = (cos * sin * F_teacher, t_B.cos() * t_B.sin())
        found = directional_derivative(lambda x, t: trigflow.ask(self.student, x, t, condition), (x_t, t_B), along)
        return lambda F: found
