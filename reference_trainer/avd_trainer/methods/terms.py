"""AVD's two terms on top of any distillation method: adaptive regression on real clips, and samples that move.

You et al. 2026, Eq. 9: ``L_G = L_own + w_reg w_{t,s} L_reg + w_temp L_temp``; there L_own is distribution matching. A
user adds them with ``--set method.avd.regression.weight=2``; ``--set method.avd={}`` has all values of the paper.

A method gets them by being a :class:`~avd_trainer.methods.distillation.Distillation`. It owes one thing: the loss of a
student's turn is yielded with the sample that it was computed from, as clean prediction::

    rollout = predict(self.student, x_t, t, condition, finished=...)   # however the method asks its student
    cut = Cut(rollout.velocity)
    x = rollout._replace(velocity=cut.output).x_0                      # or converted, where x_0 is not what it predicts
    yield Loss(value, metrics | describe_samples(x.detach(), rollout), cut, samples=x)

The motion term is computed from ``samples`` and shares the loss's backward pass. The regression follows with a forward
of its own: the student's velocity on real clips at the method's few steps. A student that is asked for something else
than a velocity overrides ``Distillation.velocity``.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, ClassVar, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor

from avd_core import AVDConfig, AVDObjective, BalanceConfig, MotionConfig, RegressionConfig
from avd_trainer.config.sections import Section
from avd_trainer.methods.base import Batches, Call, Loss, Turn
from avd_trainer.models.samplers import VelocityPredictor, schedule
from avd_trainer.runtime.draws import Draws


class TermsConfig(Section):
    """The terms of Adaptive Video Distillation: the paper's values are the defaults."""

    regression: RegressionConfig | None = RegressionConfig()
    """The adaptive regression on real clips, Eq. 5-7; None leaves it out. ``auto_update`` is the engine's to decide: a
    step is one iteration."""
    motion: MotionConfig | None = MotionConfig()
    """The clipped temporal variance of samples, Eq. 8; None leaves it out."""
    gradient_ratio: float | None = Field(default=None, gt=0)
    """Ratio of the regression's gradient to that of the method's own loss to hold. Paper: None, a constant weight."""
    balance: BalanceConfig = BalanceConfig()
    """How that ratio is measured."""

    set_at: ClassVar[str] = "method.avd"
    """Where a user finds these options."""
    without_both: ClassVar[str] = "which adds nothing. Leave method.avd out"
    """What it means to leave out both terms, and the remedy."""

    def objective_at(self, few_steps: tuple[float, ...]) -> AVDConfig:
        """The two terms as ``avd_core`` has them, for a student of these few steps."""
        regression = self.regression
        if regression is not None and regression.order == "weight_first":
            # A step is one iteration, however many micro-batches it has.
            regression = regression.model_copy(update={"auto_update": False})
        return AVDConfig(
            timesteps=few_steps,
            regression=regression,
            motion=self.motion,
            gradient_ratio=self.gradient_ratio,
            balance=self.balance,
        )

    @property
    def judges_by_teacher(self) -> bool:
        """Whether the regression's weight looks at the teacher's error."""
        return self.regression is not None and self.regression.judged == "excess"

    def added_calls(self) -> Sequence[Call]:
        """How often transformers are asked in a step besides."""
        if self.regression is None:
            return ()
        judging = [Call("teacher", 1)] if self.judges_by_teacher else []
        return (*judging, Call("student", 1, backward=True))

    def check_accumulation(self) -> None:
        """Raise ValueError if gradients cannot be accumulated over micro-batches."""
        if self.regression is not None and self.regression.order == "update_first":
            raise ValueError(
                f"micro_batch_size and {self.set_at}.regression.order=update_first exclude each other: the cache would "
                "be needed before the step's losses are known"
            )

    @model_validator(mode="after")
    def _check_terms(self) -> Self:
        if self.regression is None and self.motion is None:
            raise ValueError(f"regression and motion are both left out, {self.without_both}")
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


class Terms:
    """The two terms in a run.

    Args:
        config: Their options.
        few_steps: The student's.
        device: Where this process computes.

    Attributes:
        objective: The terms, with the state that has to survive a restart.
    """

    def __init__(self, config: TermsConfig, few_steps: tuple[float, ...], device: torch.device) -> None:
        self.config = config
        self.objective = AVDObjective(config.objective_at(few_steps)).to(device)

    def with_clips(self, turn: Turn) -> Turn:
        """A turn with the clips that the regression reads, if it is the student's."""
        if turn.role != "student" or self.config.regression is None or "clips" in turn.data:
            return turn
        return turn._replace(data=(*turn.data, "clips"))

    def on_samples(self, own: Loss) -> Loss:
        """Eq. 8: the method's own loss, and with it samples that move."""
        if self.config.motion is None:
            return own
        motion = self.objective.on_samples(own.samples)
        return own._replace(value=own.value + motion.loss, metrics={**own.metrics, **motion.metrics})

    def on_clips(
        self,
        own: Sequence[Loss],
        student: VelocityPredictor,
        teacher: VelocityPredictor | None,
        batch: Batches,
        draws: Draws,
    ) -> Iterator[Loss]:
        """Eq. 5-7: the student's velocity on real clips, noised to one of its few steps.

        Args:
            own: The method's own losses of this turn, without the other term, whose gradients are compared with; they
                can still be differentiated at their cuts.
            student: Gives the student's velocity.
            teacher: Gives the teacher's; it is asked only where the weight looks at its error.
            batch: With ``clips``.
            draws: Of the turn.
        """
        if self.config.regression is None:
            return
        outputs = [loss.cut.output for loss in own if loss.cut is not None]
        assert len(outputs) == len(own), "the student's losses have cuts"
        clips_BCFHW, condition = batch["clips"]
        few_steps = self.objective.timesteps
        t_B = few_steps[(draws.uniform("regression_timesteps") * len(few_steps)).long()]
        noise_BCFHW = draws.normal("regression_noise", clips_BCFHW.shape[1:])
        x_t_BCFHW = schedule.add_noise(clips_BCFHW, noise_BCFHW, t_B)
        judged_by: dict[str, Tensor] = {}  # what the weight looks at besides the student's error
        if self.config.regression.judged == "relative":
            judged_by = {"clips": clips_BCFHW}
        if self.config.judges_by_teacher:
            assert teacher is not None, "who asks the teacher has it among the roles"
            with torch.no_grad():  # and before the student's graph takes memory
                judged_by = {"teacher_prediction": teacher(x_t_BCFHW, t_B, condition)}
        velocity_BCFHW = student(x_t_BCFHW, t_B, condition)
        loss, metrics = self.objective.on_clips(
            velocity_BCFHW,
            schedule.velocity(clips_BCFHW, noise_BCFHW),
            t_B,
            **judged_by,
            matching_loss=torch.stack([loss.value for loss in own]).sum(),
            matching_output=outputs,
        )
        yield Loss(loss, metrics | {"regression/timesteps": t_B})

    def after(self, turn: Turn) -> None:
        """End a turn."""
        if turn.role == "student":
            self.objective.update()

    def monitor_options(self) -> dict[str, Any]:
        """What the monitor has to know of the terms."""
        regression = self.config.regression
        # Without sharpness all weights are equal on purpose.
        return {"regression_weight": regression.weight if regression is not None and regression.sharpness > 0 else None}
