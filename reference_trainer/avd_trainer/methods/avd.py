"""Adaptive Video Distillation: distribution matching, and two terms that keep colours and motion.

You et al. 2026, Eq. 9: ``L_G = L_matching + w_reg w_{t,s} L_reg + w_temp L_temp``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor

from avd_core import AVDConfig, AVDObjective, BalanceConfig, LossOutput, MotionConfig, RegressionConfig
from avd_trainer.methods.base import Batches, Call, Loss, Setting, Turn
from avd_trainer.methods.dmd import DMD, DMDMethodConfig
from avd_trainer.models.roles import Model
from avd_trainer.models.samplers import schedule
from avd_trainer.runtime.draws import Draws

PAPER = "You et al., CVPR 2026"


class AVDMethodConfig(DMDMethodConfig):
    """Adaptive Video Distillation: the paper's values are the defaults."""

    kind: Literal["avd"] = "avd"  # type: ignore[assignment]
    regression: RegressionConfig | None = RegressionConfig()
    """The adaptive regression on real clips, Eq. 5-7; None leaves it out. ``auto_update`` is the engine's to decide: a
    step is one iteration."""
    motion: MotionConfig | None = MotionConfig()
    """The clipped temporal variance of samples, Eq. 8; None leaves it out."""
    gradient_ratio: float | None = Field(default=None, gt=0)
    """Ratio of the regression's gradient to the matching term's to hold. Paper: None, a constant weight."""
    balance: BalanceConfig = BalanceConfig()
    """How that ratio is measured."""

    def calls(self, max_steps: int) -> Sequence[Call]:
        if self.regression is None:
            return super().calls(max_steps)
        judging = [Call("teacher", 1)] if self.regression.judged == "excess" else []
        return (*super().calls(max_steps), *judging, Call("student", 1, backward=True))

    @property
    def objective(self) -> AVDConfig:
        """The two terms as ``avd_core`` has them."""
        regression = self.regression
        if regression is not None and regression.order == "weight_first":
            # A step is one iteration, however many micro-batches it has.
            regression = regression.model_copy(update={"auto_update": False})
        return AVDConfig(
            timesteps=self.few_steps,
            regression=regression,
            motion=self.motion,
            gradient_ratio=self.gradient_ratio,
            balance=self.balance,
        )

    @model_validator(mode="after")
    def _check_parts(self) -> Self:
        if self.regression is None and self.motion is None:
            raise ValueError("regression and motion are both left out, which is method dmd. Choose that one")
        if self.motion is not None and self.motion.frame_dim != 2:
            raise ValueError("motion.frame_dim must be 2: this trainer's latents are [B, C, F, H, W]")
        if self.gradient_ratio is not None and self.regression is None:
            raise ValueError("gradient_ratio needs a regression whose gradient it could hold")
        if not self.balance.sync_ranks or (self.regression is not None and not self.regression.sync_ranks):
            raise ValueError(
                "regression.sync_ranks and balance.sync_ranks must be true: a run's checkpoints hold one cache and one "
                "ratio, not one per rank"
            )
        return self

    def check_accumulation(self) -> None:
        if self.regression is not None and self.regression.order == "update_first":
            raise ValueError(
                "micro_batch_size and method.regression.order=update_first exclude each other: the cache would be "
                "needed before the step's losses are known"
            )


class AVD(DMD):
    """Distribution matching with adaptive regression and clipped temporal variance; see :class:`AVDMethodConfig`."""

    Config: ClassVar[type[AVDMethodConfig]] = AVDMethodConfig

    def __init__(self, config: Any, models: Mapping[str, Model], setting: Setting) -> None:
        super().__init__(config, models, setting)
        self.state = self.objective = AVDObjective(config.objective).to(setting.device)

    def turns(self, step: int) -> Sequence[Turn]:
        student, *online = super().turns(step)
        data = student.data if self.objective.regression is None else (*student.data, "clips")
        return [student._replace(data=data), *online]

    def on_samples(self, x_BCFHW: Tensor) -> Iterator[LossOutput]:
        """Eq. 8: samples that move."""
        if self.objective.motion is not None:
            yield self.objective.on_samples(x_BCFHW)

    def on_clips(self, batch: Batches, draws: Draws, matching_loss: Tensor, matching_output: Tensor) -> Iterator[Loss]:
        """Eq. 5-7: the student's velocity on real clips, noised to one of its few steps."""
        if self.objective.regression is None:
            return
        clips_BCFHW, condition = batch["clips"]
        few_steps = self.objective.timesteps
        t_B = few_steps[(draws.uniform("regression_timesteps") * len(few_steps)).long()]
        noise_BCFHW = draws.normal("regression_noise", clips_BCFHW.shape[1:])
        x_t_BCFHW = schedule.add_noise(clips_BCFHW, noise_BCFHW, t_B)
        judged_by: dict[str, Tensor] = {}  # what the weight looks at besides the student's error
        if self.config.regression.judged == "relative":
            judged_by = {"clips": clips_BCFHW}
        if self.config.regression.judged == "excess":
            with torch.no_grad():  # and before the student's graph takes memory
                judged_by = {"teacher_prediction": self.teacher(x_t_BCFHW, t_B, condition)}
        velocity_BCFHW = self.student(x_t_BCFHW, t_B, condition)
        loss, metrics = self.objective.on_clips(
            velocity_BCFHW,
            schedule.velocity(clips_BCFHW, noise_BCFHW),
            t_B,
            **judged_by,
            matching_loss=matching_loss,
            matching_output=matching_output,
        )
        yield Loss(loss, metrics | {"regression/timesteps": t_B})

    def after(self, turn: Turn, *, accepted: bool) -> None:
        if turn.role == "student":
            self.objective.update()

    def monitor_options(self) -> dict[str, Any] | None:
        regression = self.config.regression
        # Without sharpness all weights are equal on purpose.
        adaptive = regression is not None and regression.sharpness > 0
        return {"regression_weight": regression.weight if adaptive else None}


METHOD = AVD
