"""The configuration of a run: the engine's options, and a section for the method."""

from __future__ import annotations

import operator
from functools import reduce
from typing import TYPE_CHECKING, Annotated, Literal, Self

from pydantic import Field, model_validator

from avd_core.sampling import SamplerKind
from avd_trainer.config.sections import (
    CheckpointConfig,
    DataSection,
    LoggingConfig,
    ParallelConfig,
    SamplesConfig,
    Section,
    ShardsData,
)
from avd_trainer.methods.registry import list_methods, load_method

if TYPE_CHECKING:
    from avd_trainer.methods.base import MethodConfig

    AnyMethodConfig = MethodConfig
else:
    AnyMethodConfig = Annotated[
        reduce(operator.or_, [load_method(method.kind).Config for method in list_methods()]),
        Field(discriminator="kind"),
    ]


GRACE = 100
"""Steps at its start that the monitors leave unjudged; of a run that is shorter than twice as many, half."""
PATIENCE = 100
"""Steps after which a discriminator is judged, and for which a fault has to last; of a run that is shorter than eight
times as many, an eighth."""


class TrainConfig(Section):
    """A run of any method."""

    method: AnyMethodConfig
    """What is trained and how. ``kind`` is one that ``avd methods`` lists; the other keys depend on it."""
    teacher: str | None = None
    """``bundled:tiny``, a diffusers folder or hub id, or an original Wan2.1 folder; docs/models.md lists them. None for
    methods that have none."""
    student_weights: str | None = None
    """Weights that the student starts from, for example another distiller's ``model.pt``; None: the teacher's."""
    codec: str | None = None
    """A diffusers Wan pipeline (folder or hub id) whose VAE decodes the sample clips; None: the one that encoded the
    data, or else the teacher's."""
    data: DataSection
    """Real clips with captions."""
    prompts: ShardsData | None = None
    """Prompts of the matching term; None: the captions of ``data``."""
    max_steps: int = Field(ge=1)
    """Steps of the run. Each is one update of the student, and what else the method updates with it."""
    batch_size: int = Field(ge=1)
    """Examples per update, over all ranks."""
    micro_batch_size: int | None = Field(default=None, ge=1)
    """Examples that a rank runs at once, accumulating gradients over its share of the batch. None: its whole share."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """What transformers compute in. Trained weights, sums of gradients and losses are always float32."""
    seed: int = Field(default=0, ge=0)
    """Seed of everything that is drawn while training."""
    max_gradient_norm: float | None = Field(default=10.0, gt=0)
    """Gradients are clipped to this norm; None leaves them as they are. Paper of AVD: 10."""
    max_skipped_steps: int = Field(default=10, ge=1)
    """Steps in a row with a non-finite loss or gradient after which the run stops."""
    monitor_grace: int | None = Field(default=None, ge=0)
    """Steps at the start that the monitors leave unjudged. None: 100, of a run shorter than 200 steps half of it."""
    monitor_patience: int | None = Field(default=None, ge=0)
    """Steps that a discriminator has to learn before the monitor judges it, and for which a fault then has to last.
    None: 100, of a run shorter than 800 steps an eighth of it."""
    parallel: ParallelConfig = ParallelConfig()
    """How the run spreads over its ranks."""
    checkpoint: CheckpointConfig = CheckpointConfig()
    """When to save, and what to keep."""
    samples: SamplesConfig = SamplesConfig()
    """Clips while training."""
    logging: LoggingConfig = LoggingConfig()
    """Where metrics go."""

    @model_validator(mode="after")
    def _check_parts(self) -> Self:
        method = self.method
        if method.needs_teacher and self.teacher is None:
            raise ValueError(f"method {method.kind} needs a teacher, such as bundled:tiny")
        if not method.needs_teacher and (self.teacher is not None or self.student_weights is not None):
            raise ValueError(f"method {method.kind} starts from random weights: leave teacher and student_weights out")
        if self.student_weights is not None:
            method.check_student_weights()
        if self.micro_batch_size is not None:
            method.check_accumulation()
        method.check_precision(self.precision)
        if self.prompts is not None and not isinstance(self.data, ShardsData):
            raise ValueError("prompts need data of kind shards, whose text embeddings are of the same encoder")
        return self

    @property
    def grace(self) -> int:
        """Steps at the start that the monitors leave unjudged."""
        return min(GRACE, self.max_steps // 2) if self.monitor_grace is None else self.monitor_grace

    @property
    def patience(self) -> int:
        """Steps that a discriminator has before it is judged, and for which a fault has to last."""
        return min(PATIENCE, self.max_steps // 8) if self.monitor_patience is None else self.monitor_patience

    @property
    def few_steps(self) -> tuple[float, ...] | None:
        """The student's timesteps; None for methods without a student."""
        steps: tuple[float, ...] | None = getattr(self.method, "few_steps", None)
        return steps

    @property
    def sampled_by(self) -> SamplerKind:
        """How the student goes from one of its few steps to the next."""
        return self.method.sampled_by
