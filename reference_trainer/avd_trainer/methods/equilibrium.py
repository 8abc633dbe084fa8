"""Phase II of V-PAE: a student that is judged by a discriminator whose backbone is the student's own average.

arXiv 2508.21019. Used by :mod:`avd_trainer.methods.vpae`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor

from avd_core import (
    ClippedTemporalVarianceLoss,
    ConditionalScoreDistillationLoss,
    HingeLoss,
    LossOutput,
    MotionConfig,
    SpatioTemporalR1Loss,
    gradient_shares,
)
from avd_trainer.config.sections import ScoreTimestepsConfig
from avd_trainer.methods.base import Batches, Call, Cut, Loss, Setting, draw_noised, prefixed, weighted_sum
from avd_trainer.methods.distillation import DistillationConfig, describe_samples
from avd_trainer.models.condition import Condition
from avd_trainer.models.discriminators.discriminator import Discriminator, HeadConfig, build_head
from avd_trainer.models.roles import Average, Built, Model, Reads, Roles, Trained
from avd_trainer.models.samplers import Rollout, few_step_rollout, guided_velocity, schedule
from avd_trainer.runtime.draws import Draws


class EquilibriumConfig(DistillationConfig):
    """Options of the adversarial phase: the paper's values are the defaults, where it states one."""

    critic: Literal["average", "frozen", "separate"] = "average"
    """Whose blocks see the videos: those of the student's average, as in the paper; of the frozen teacher; or of a
    further model, trained with the head, which starts from the teacher and steps as the student does."""
    head: HeadConfig = HeadConfig()
    """What judges by the outputs of these blocks."""
    critic_timesteps: ScoreTimestepsConfig = ScoreTimestepsConfig()
    """Times t' that clips and samples are noised to before they are judged. Ours: as in distribution matching."""
    r1_weight: float = Field(default=100.0, ge=0)
    """Weight of STR1, which keeps the discriminator smooth at real clips; 0 leaves it out. Ours: APT's 100."""
    r1_spatial_step: float | None = Field(default=None, gt=0)
    """Standard deviation of STR1's spatial perturbation; the term then counts as that of the paper's 0.01, which None
    adds. Ours: 0.1 in bfloat16, where rounding in the backbone changes logits by more than a perturbation of 0.01."""
    r1_precision: Literal["run", "float32"] = "run"
    """In what the backbone sees what STR1 compares: in the run's precision, or in float32 where that is bfloat16. Then
    the paper's 0.01 is not lost in rounding, and the clip is seen once more. Runs in float32 refuse it. Ours."""
    csds_weight: float = Field(default=10.0, ge=0)
    """Weight of conditional score distillation; 0 leaves it out. Paper: 10."""
    csds_timesteps: ScoreTimestepsConfig = ScoreTimestepsConfig()
    """Its times t''. Ours: as in distribution matching."""
    csds_guidance: float = Field(default=1.0, ge=1)
    """Classifier-free guidance of the teacher in it, standard form. Ours: none."""
    motion: MotionConfig | None = None
    """The clipped temporal variance of AVD's Eq. 8 on the samples, which V-PAE does not have; None leaves it out."""

    @model_validator(mode="after")
    def _check_motion(self) -> Self:
        if self.motion is not None and not (self.motion.frame_dim == 2 and self.motion.sync_ranks):
            raise ValueError(
                "motion.frame_dim must be 2, as this trainer's latents are [B, C, F, H, W], and motion.sync_ranks true,"
                " as a run does not depend on the number of its ranks"
            )
        if self.motion is not None and self.avd is not None and self.avd.motion is not None:
            raise ValueError("motion and avd.motion are the same term: it would count twice. Set one of them to null")
        return self

    def check_precision(self, precision: str) -> None:
        super().check_precision(precision)
        if precision == "float32" and self.r1_precision == "float32":
            raise ValueError(
                "precision=float32 and method.r1_precision=float32 exclude each other: STR1 is in float32 already, and "
                "the clip would be seen once more for nothing. Leave method.r1_precision at run"
            )

    @property
    def backbone(self) -> str:
        """The role whose blocks see the videos."""
        return {"average": "ema", "frozen": "teacher", "separate": "critic"}[self.critic]

    @property
    def asks_average(self) -> bool:
        """Whether the average of the student's weights is a model that is asked, and not only exported."""
        return self.critic == "average"

    @property
    def _judged(self) -> int:
        """Videos that the head judges per clip: itself, a sample; with STR1 the clip perturbed in space and in time,
        and in float32 itself again."""
        if self.r1_weight == 0:
            return 2
        return 4 if self.r1_precision == "run" else 5

    def equilibrium_roles(self) -> Roles:
        """Who takes part besides student and teacher."""
        reads = Reads(self.backbone, lambda layers: len(self.head.tapped(layers)), self._judged)
        separate = {"critic": Trained(self.student.optimizer, self.student.lora)} if self.critic == "separate" else {}
        return {
            **separate,
            "ema": Average("student", self.ema_decay, asked=self.asks_average, warmup=False),
            "discriminator": Built(
                self.head.optimizer, lambda _, architecture: build_head(self.head, architecture), reads
            ),
        }

    def equilibrium_calls(self) -> Sequence[Call]:
        """How often each transformer is asked in a step."""
        return (
            Call("student", 1),
            Call(self.backbone, self._judged, backward=self.critic == "separate"),
            Call("student", 1, backward=True),
            Call("teacher", int(self.csds_weight > 0), guidance_scale=self.csds_guidance, beside="student"),
            Call(self.backbone, 1, backward=True, beside="student"),
        )


class Equilibrium:
    """The losses of the adversarial phase.

    Args:
        config: Its options.
        models: By role.
        setting: What the method is given besides.
    """

    def __init__(self, config: EquilibriumConfig, models: Mapping[str, Model], setting: Setting) -> None:
        self.config, self.setting = config, setting
        self.student, self.teacher = models["student"], models["teacher"]
        backbone: Any = models[config.backbone]
        self.discriminator = Discriminator(
            backbone, models["discriminator"], config.head.tapped(len(backbone.module.blocks))
        )
        self.hinge = HingeLoss()
        self.r1 = SpatioTemporalR1Loss(weight=config.r1_weight, step_spatial=config.r1_spatial_step)
        self.csds = ConditionalScoreDistillationLoss(weight=config.csds_weight)
        self.motion = None if config.motion is None else ClippedTemporalVarianceLoss(**config.motion.model_dump())

    def judge(self, batch: Batches, draws: Draws) -> Loss:
        """L_D = E max(0, 1 - D(clip)) + E max(0, 1 + D(sample)) + L_STR1, both noised to the same t'."""
        clips_BCFHW, condition = batch["clips"]
        with torch.no_grad():
            x_BCFHW = self._generate(condition, draws).x_0
        t_B, clips_t_BCFHW, _ = draw_noised(clips_BCFHW, draws, "critic", self.config.critic_timesteps)
        samples_t_BCFHW = schedule.add_noise(x_BCFHW, draws.normal("sample_noise", x_BCFHW.shape[1:]), t_B)
        discriminator = partial(self.discriminator, timesteps=t_B, condition=condition)
        clip_logits_B = discriminator(clips_t_BCFHW)
        terms = [self.hinge.discriminator(clip_logits_B, discriminator(samples_t_BCFHW))]
        if self.config.r1_weight:
            channels, *of_frames = clips_BCFHW.shape[1:]
            noise = {
                "spatial_noise": draws.normal("r1_spatial_noise", (channels, 1, *of_frames[1:])),
                "temporal_noise": draws.normal("r1_temporal_noise", (channels, *of_frames)),
            }
            if self.config.r1_precision == "float32":
                # The clip too: beside its logit in bfloat16 rounding would look like a slope.
                discriminator = partial(discriminator, dtype=torch.float32)
                clip_logits_B = discriminator(clips_t_BCFHW)
            terms.append(prefixed("r1", self.r1(discriminator, clips_t_BCFHW, clip_logits_B, **noise)))
        return Loss(*weighted_sum(*terms))

    def be_judged(self, batch: Batches, draws: Draws) -> Loss:
        """L_G = -E D(sample) + L_C-SDS, and our motion term where it is wanted."""
        condition = batch["prompts"].condition
        rollout = self._generate(condition, draws)
        cut = Cut(rollout.velocity)
        x_BCFHW = rollout._replace(velocity=cut.output).x_0
        terms: dict[str, LossOutput] = {}
        if self.config.csds_weight:  # before there is a graph of the critic
            terms["csds"] = self.csds(x_BCFHW, self._denoise(x_BCFHW.detach(), condition, draws))
        if self.motion is not None:
            terms["motion"] = self.motion(x_BCFHW)
        t_B, x_t_BCFHW, _ = draw_noised(x_BCFHW, draws, "critic", self.config.critic_timesteps)
        terms["adversarial"] = self.hinge.generator(self.discriminator(x_t_BCFHW, t_B, condition))
        named = {name: prefixed(name, term) for name, term in terms.items()}
        # This is the backward pass through the critic; the loss that comes back has the gradient already.
        loss, shares = gradient_shares(cut.output, {name: term.loss for name, term in named.items()})
        metrics = weighted_sum(*named.values())[1] | {f"{name}/share": share for name, share in shares.items()}
        return Loss(loss, metrics | describe_samples(x_BCFHW.detach(), rollout), cut, x_BCFHW)

    def _generate(self, condition: Condition, draws: Draws) -> Rollout:
        """xhat = e - v(e, T, c): the student's sample, as in inference."""
        noise, shape = draws.named("trajectory"), self.setting.latent_shape
        return few_step_rollout(self.student, condition, shape, self.config.few_steps, noise)

    @torch.no_grad()
    def _denoise(self, x_BCFHW: Tensor, condition: Condition, draws: Draws) -> Tensor:
        """f_real(xhat_t'', t''): the teacher's clean prediction of noised samples."""
        t_B, x_t_BCFHW, _ = draw_noised(x_BCFHW, draws, "csds", self.config.csds_timesteps)
        scale, unconditional_LD = self.config.csds_guidance, self.setting.unconditional
        velocity_BCFHW = guided_velocity(self.teacher, x_t_BCFHW, t_B, condition, unconditional_LD, scale)
        return schedule.velocity_to_x_0(velocity_BCFHW, x_t_BCFHW, t_B)
