"""What methods have in common that distil a teacher into a student of few steps, and AVD's terms on top of any of them.

Such a method says its own turns, losses and calls. What the engine sees adds the terms that ``method.avd`` has; see
:mod:`avd_trainer.methods.terms`.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any, ClassVar, Self

from pydantic import Field, model_validator
from torch import Tensor

from avd_core import AVDConfig, AVDObjective, temporal_variance
from avd_trainer.config.sections import LoRAConfig, OptimizerConfig, Section
from avd_trainer.methods.base import Batches, Call, Loss, Method, MethodConfig, Setting, Turn
from avd_trainer.methods.terms import Terms, TermsConfig
from avd_trainer.models.condition import Condition
from avd_trainer.models.roles import Average, Frozen, Model, Roles, Trained
from avd_trainer.models.samplers import Rollout
from avd_trainer.runtime.draws import Draws


class StudentRoleConfig(Section):
    """A transformer that is trained, and how."""

    optimizer: OptimizerConfig = OptimizerConfig(lr=2e-6)
    """Paper: AdamW, 2e-6."""
    lora: LoRAConfig | None = None
    """Train adapters, which share one frozen base with the teacher; None trains all weights."""


class DistillationConfig(MethodConfig):
    """What methods have in common that distil a teacher into a student of few steps."""

    few_steps: tuple[float, ...] = Field(default=(1000.0, 900.0, 757.0, 522.0), min_length=1)
    """The student's timesteps, falling, in (0, 1000]. Released code of AVD: 1000, 900, 757, 522."""
    student: StudentRoleConfig = StudentRoleConfig()
    """The model that is distilled."""
    sampling_shift: float = Field(default=5.0, gt=0)
    """Shift of the timesteps at which the *teacher* is sampled, for calibration and comparisons; training does not
    sample it, and the student has its few steps. Paper: 5."""
    ema_decay: float = Field(default=0.99, ge=0, lt=1)
    """Decay of the average of the student's weights, which is what is exported and sampled from."""
    avd: TermsConfig | None = None
    """AVD's terms on top of the method's own losses; None for the method alone. ``{}`` is all of the paper's."""

    own_losses_ask_teacher: ClassVar[bool] = True
    """Whether the method's own losses ask the teacher, or else the student only starts from it."""

    @property
    def terms(self) -> TermsConfig | None:
        """AVD's terms, wherever a configuration has them."""
        return self.avd

    @property
    def objective(self) -> AVDConfig | None:
        """AVD's terms as ``avd_core`` has them."""
        return None if self.terms is None else self.terms.objective_at(self.few_steps)

    @abstractmethod
    def own_calls(self, max_steps: int) -> Sequence[Call]:
        """:meth:`calls` of the method alone."""

    def calls(self, max_steps: int) -> Sequence[Call]:
        return (*self.own_calls(max_steps), *(() if self.terms is None else self.terms.added_calls()))

    def check_accumulation(self) -> None:
        if self.terms is not None:
            self.terms.check_accumulation()

    @model_validator(mode="after")
    def _check_few_steps(self) -> Self:
        steps = self.few_steps
        falling = all(later < earlier for earlier, later in pairwise(steps))
        if not falling or not 0 < steps[-1] <= steps[0] <= 1000:
            raise ValueError(f"few_steps must fall from at most 1000 to above 0, got {steps}")
        return self

    def check_student_weights(self) -> None:
        if self.student.lora is not None:
            raise ValueError(
                "student_weights and method.student.lora exclude each other: the adapters' base is the teacher. Leave "
                "one out"
            )

    def roles(self, student_weights: str | None = None) -> Roles:
        judging = self.terms is not None and self.terms.judges_by_teacher
        return {
            **({"teacher": Frozen()} if self.own_losses_ask_teacher or judging else {}),
            "student": Trained(self.student.optimizer, self.student.lora, student_weights),
            "ema": Average("student", self.ema_decay),
        }


class Distillation(Method):
    """A method that distils, with AVD's terms on top where they are wanted.

    A method has :meth:`own_turns` and :meth:`own_losses`, and asks ``student`` and ``teacher``. It calls
    :func:`describe_samples` in each turn of the student.

    Attributes:
        student: The model that is distilled.
        teacher: What it is distilled from; None where nobody asks it.
        terms: AVD's terms, or None.
        objective: Their maths and state, or None.
    """

    def __init__(self, config: Any, models: Mapping[str, Model], setting: Setting) -> None:
        super().__init__(config, models, setting)
        self.student = models["student"]
        self.teacher: Any = models.get("teacher")
        self.terms: Terms | None = None
        self.objective: AVDObjective | None = None
        if config.terms is not None:
            self.terms = Terms(config.terms, config.few_steps, setting.device)
            self.state = self.objective = self.terms.objective

    @abstractmethod
    def own_turns(self, step: int) -> Sequence[Turn]:
        """:meth:`turns` of the method alone."""

    @abstractmethod
    def own_losses(self, turn: Turn, batch: Batches, draws: Draws) -> Iterator[Loss]:
        """:meth:`losses` of the method alone; that of a student's turn has ``samples``."""

    def velocity(self, x_t: Tensor, timesteps: Tensor, condition: Condition) -> Tensor:
        """The student's velocity ``noise - x_0`` of rectified flow, ``[B, C, F, H, W]``, whatever else it is asked."""
        velocity: Tensor = self.student(x_t, timesteps, condition)
        return velocity

    def turns(self, step: int) -> Sequence[Turn]:
        own = self.own_turns(step)
        return own if self.terms is None else [self.terms.with_clips(turn) for turn in own]

    def losses(self, turn: Turn, batch: Batches, draws: Draws) -> Iterator[Loss]:
        seen: list[Loss] = []  # of which the balance measures the gradient
        for own in self.own_losses(turn, batch, draws):
            if self.terms is None or turn.role != "student":
                yield own
                continue
            seen.append(own)
            if own.samples is None:
                yield own
            else:
                yield self.terms.on_samples(own)
                yield from self.terms.on_clips(seen, self.velocity, self.teacher, batch, draws)

    def after(self, turn: Turn, *, accepted: bool) -> None:
        if self.terms is not None:
            self.terms.after(turn)

    def summarise(self, metrics: dict[str, Tensor]) -> dict[str, Tensor]:
        # Only now: the logarithm of a mean is not the mean of logarithms.
        return metrics | {"sample/temporal_loss": -metrics["sample/variance"].log()}

    def monitor_options(self) -> dict[str, Any] | None:
        return {} if self.terms is None else self.terms.monitor_options()


def describe_samples(x_0: Tensor, rollout: Rollout) -> dict[str, Tensor]:
    """Metrics of a rollout's samples ``[B, C, F, H, W]``, and themselves if they are finished."""
    # Samples of earlier steps are blurred by nature and would look like a collapse.
    shown = {"x_0": x_0} if rollout.finished else {}
    return shown | {
        "sample/timestep": rollout.timesteps.mean(),
        "sample/std": x_0.flatten(1).std(dim=1).mean(),
        "sample/variance": temporal_variance(x_0),
    }
