"""Everything that a run depends on, validated before it starts."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from avd_core import AVDConfig
from avd_trainer.config.sections import (
    ArchitectureConfig,
    CheckpointConfig,
    EvaluationConfig,
    HeldOutConfig,
    LoggingConfig,
    LoRAConfig,
    OptimizerConfig,
    ParallelConfig,
    RanksConfig,
    SamplesConfig,
    ScoreTimestepsConfig,
    Section,
    ShapesData,
    ShardsData,
    VideosData,
)


class TrainConfig(Section):
    """A distillation run: Algorithm 1 of the paper."""

    teacher: str
    """``bundled:tiny``, a diffusers folder or hub id, or an original Wan2.1 folder; docs/models.md lists them."""
    student_weights: str | None = None
    """Weights that the student starts from, for example another distiller's ``model.pt``; None: the teacher's."""
    codec: str | None = None
    """A diffusers Wan pipeline (folder or hub id) whose VAE decodes the sample clips; None: the teacher's, where it is
    one."""
    data: Annotated[ShapesData | VideosData | ShardsData, Field(discriminator="kind")]
    """Real clips with captions: the regression's data."""
    prompts: ShardsData | None = None
    """Prompts of the matching term; None: the captions of ``data``."""
    max_steps: int = Field(ge=1)
    """Generator updates."""
    batch_size: int = Field(ge=1)
    """Examples per update, over all ranks."""
    micro_batch_size: int | None = Field(default=None, ge=1)
    """Examples that a rank runs at once; it accumulates gradients over the rest of its share. None: its whole share."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """What the models compute in. Trained weights, gradients' sums and losses are float32 in any case."""
    student_lora: LoRAConfig | None = None
    """Train adapters of the student; None trains all of its weights."""
    online_lora: LoRAConfig | None = None
    """Train adapters of the online model; None trains all of its weights. Adapters share one frozen base with the
    teacher."""
    seed: int = Field(default=0, ge=0)
    """Seed of everything that is drawn while training."""
    guidance_scale: float = Field(default=5.0, ge=1)
    """Classifier-free guidance of the teacher, standard form. Paper: 5."""
    matching_weight: float = Field(default=1.0, ge=0)
    """Weight of the distribution-matching term. Paper: 1."""
    objective: AVDConfig = AVDConfig()
    """What is added to distribution matching, and the student's few steps."""
    score_timesteps: ScoreTimestepsConfig = ScoreTimestepsConfig()
    """Timesteps of the matching term and of the online model's training."""
    online_updates: int = Field(default=5, ge=1)
    """Updates of the online model per generator update. Paper: 5."""
    student_optimizer: OptimizerConfig = OptimizerConfig(lr=2e-6)
    """Paper: AdamW, 2e-6."""
    online_optimizer: OptimizerConfig = OptimizerConfig(lr=2e-6)
    """Paper: AdamW, 2e-6."""
    max_gradient_norm: float = Field(default=10.0, gt=0)
    """Gradients are clipped to this norm. Paper: 10."""
    ema_decay: float = Field(default=0.99, ge=0, lt=1)
    """Decay of the average of the student's weights, which is what is saved and sampled from."""
    max_skipped_steps: int = Field(default=10, ge=1)
    """Steps in a row with a non-finite loss or gradient after which the run stops."""
    parallel: ParallelConfig = ParallelConfig()
    """How the run spreads over its ranks."""
    checkpoint: CheckpointConfig = CheckpointConfig()
    """When to save, and what to keep."""
    samples: SamplesConfig = SamplesConfig()
    """Clips while training."""
    logging: LoggingConfig = LoggingConfig()
    """Where metrics go."""
    evaluation: EvaluationConfig = EvaluationConfig()
    """What ``avd demo`` measures."""

    @model_validator(mode="after")
    def _check_parts(self) -> Self:
        if self.student_weights is not None and self.student_lora is not None:
            raise ValueError(
                "student_weights and student_lora exclude each other: the adapters' base is the teacher. Leave one out"
            )
        regression = self.objective.regression
        if self.micro_batch_size is not None and regression is not None and regression.order == "update_first":
            raise ValueError(
                "micro_batch_size and objective.regression.order=update_first exclude each other: the cache would be "
                "needed before the step's losses are known"
            )
        if self.prompts is not None and not isinstance(self.data, ShardsData):
            raise ValueError("prompts need data of kind shards, whose text embeddings are of the same encoder")
        return self

    @model_validator(mode="after")
    def _check_few_steps(self) -> Self:
        steps = self.objective.timesteps
        if self.objective.motion is not None and self.objective.motion.frame_dim != 2:
            raise ValueError("objective.motion.frame_dim must be 2: this trainer's latents are [B, C, F, H, W]")
        if steps[0] < steps[-1] or not 0 < steps[-1] <= steps[0] <= 1000:
            raise ValueError(f"objective.timesteps must fall from at most 1000 to above 0, got {steps}")
        return self


class InterpolatorConfig(Section):
    """Training of a :class:`avd_core.LatentFrameInterpolator`: Sec. 8 of the paper."""

    data: Annotated[ShapesData | VideosData | ShardsData, Field(discriminator="kind")]
    """Real clips; captions are not read."""
    widths: tuple[Annotated[int, Field(ge=8, multiple_of=8)], ...] = Field(
        default=(32, 64, 128), min_length=3, max_length=3
    )
    """Channels of the network's three levels."""
    max_steps: int = Field(default=10_000, ge=1)
    """Updates. Paper: 10,000."""
    batch_size: int = Field(default=32, ge=1)
    """Clips per update, over all ranks. Paper: 32."""
    micro_batch_size: int | None = Field(default=None, ge=1)
    """Clips that a rank runs at once; it accumulates gradients over the rest of its share. None: its whole share."""
    optimizer: OptimizerConfig = OptimizerConfig(lr=1e-5)
    """Paper: AdamW, 1e-5."""
    lr_schedule: Literal["constant", "cosine"] = "constant"
    """``cosine`` lets the learning rate fall along half a cosine, from ``optimizer.lr`` in the first step to 0 behind
    the last. Paper: none is named."""
    seed: int = Field(default=0, ge=0)
    """Seed of the network's first weights and of the order of clips."""
    max_skipped_steps: int = Field(default=10, ge=1)
    """Steps in a row with a non-finite loss or gradient after which the run stops."""
    parallel: RanksConfig = RanksConfig()
    """How the ranks deal with each other."""
    checkpoint: CheckpointConfig = CheckpointConfig()
    """When to save, and what to keep."""
    logging: LoggingConfig = LoggingConfig()
    """Where metrics go."""
    evaluation: HeldOutConfig = HeldOutConfig()
    """What the network is measured on."""


class TeacherConfig(Section):
    """Training of a small teacher from nothing: flow matching on shapes."""

    architecture: ArchitectureConfig = ArchitectureConfig()
    """The model."""
    data: ShapesData = ShapesData()
    """Clips to train on."""
    max_steps: int = Field(ge=1)
    """Optimizer steps."""
    batch_size: int = Field(ge=1)
    """Clips per step."""
    seed: int = Field(default=0, ge=0)
    """Seed of everything that is drawn while training."""
    optimizer: OptimizerConfig
    """``lr`` is the peak of a one-cycle schedule, which also moves the first beta from 0.95 to 0.85 and back."""
    timestep_shift: float = Field(default=2.0, gt=0)
    """Shift of the uniformly drawn timesteps."""
    caption_dropout: float = Field(default=0.1, ge=0, le=1)
    """Share of clips trained without caption, for classifier-free guidance."""
    max_gradient_norm: float = Field(default=1.0, gt=0)
    """Gradients are clipped to this norm."""
    ema_decay: float = Field(default=0.999, ge=0, lt=1)
    """Decay of the average of the weights, which is what is saved."""
