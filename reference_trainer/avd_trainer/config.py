"""Everything that a run depends on, validated before it starts."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeVar

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from yaml import YAMLError

from avd_core import AVDConfig
from avd_trainer.errors import UserError
from avd_trainer.history import WandbConfig


class ConfigError(UserError):
    """A configuration that cannot be used; the message names the field and the remedy."""


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)


class ShapesData(_Section):
    """Generated clips of two moving shapes; needs no files."""

    kind: Literal["shapes"] = "shapes"
    clips: int = Field(default=1024, ge=2)
    """Number of clips to train on."""
    held_out: int = Field(default=768, ge=2)
    """Number of further clips that only evaluation sees."""
    seed: int = Field(default=0, ge=0)
    """Which clips to train on; held-out clips are of seed ``HELD_OUT + seed``. Data and training have separate seeds,
    so that runs can differ in one alone."""


class VideosData(_Section):
    """The user's own video files."""

    kind: Literal["videos"] = "videos"
    path: Path
    """A folder; it is searched recursively for files that PyAV can decode."""


class ShardsData(_Section):
    """Encoded clips in Parquet shards, as ``avd data`` makes them."""

    kind: Literal["shards"] = "shards"
    path: Path
    """The folder of a data set."""
    workers: int = Field(default=2, ge=0)
    """Processes per rank that read ahead; 0 reads in the training process."""


class OptimizerConfig(_Section):
    """AdamW."""

    lr: float = Field(gt=0)
    """Learning rate."""
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = (0.9, 0.999)
    """Decay of the first and second moment. Paper: (0.9, 0.999)."""
    weight_decay: float = Field(default=0.0, ge=0)
    """Decoupled weight decay."""


class ScoreTimestepsConfig(_Section):
    """Which timesteps the teacher and the online model are asked at."""

    shift: float = Field(default=5.0, gt=0)
    """Timestep shift of a uniform draw. Paper: 5."""
    low: float = Field(default=20.0, ge=0, le=1000)
    """Lower bound. Paper: 20."""
    high: float = Field(default=980.0, ge=0, le=1000)
    """Upper bound. Paper: 980."""

    @model_validator(mode="after")
    def _check_order(self) -> Self:
        if not self.low < self.high:
            raise ValueError(f"low must be below high, got {self.low} and {self.high}")
        return self


class LoRAConfig(_Section):
    """Low-rank adapters in place of full fine-tuning, by peft."""

    rank: int = Field(default=64, ge=1)
    """Rank of the update of each weight matrix."""
    alpha: float = Field(default=64.0, gt=0)
    """The update is scaled by ``alpha / rank``."""
    target_modules: tuple[str, ...] = ("to_q", "to_k", "to_v", "to_out.0", "ffn.net.0.proj", "ffn.net.2")
    """Linear layers that get an adapter, by the end of their names."""


class RanksConfig(_Section):
    """How the ranks of a run deal with each other."""

    timeout_minutes: float = Field(default=30.0, gt=0)
    """How long a rank waits for the others before it says that one is gone."""


class ParallelConfig(RanksConfig):
    """How a run spreads over its ranks, and what it trades for memory."""

    replicate: int = Field(default=1, ge=1)
    """Groups of ranks that each hold all shards (hybrid sharding: usually one per node). 1 shards over all ranks."""
    activation_checkpointing: bool = True
    """Keep only the inputs of transformer blocks for the backward pass, and compute the rest again."""
    compile: bool = False
    """``torch.compile`` of each transformer block; needs a C++ compiler."""


class CheckpointConfig(_Section):
    """When to save, and what to keep."""

    every: int = Field(default=100, ge=1)
    """Steps between two checkpoints; the last step is always saved."""
    keep_latest: int = Field(default=2, ge=1)
    """How many to keep. One that holds a file named ``keep`` is never removed, and does not count."""
    keep_every: int | None = Field(default=None, ge=1)
    """Checkpoints of steps that this divides are kept for good."""


class SamplesConfig(_Section):
    """Clips of the averaged student while it trains."""

    every: int | None = Field(default=None, ge=1)
    """Steps between two looks; None for none."""
    count: int = Field(default=4, ge=1)
    """Number of prompts: the first of the data."""
    fps: float = Field(default=16.0, gt=0)
    """Frames per second of the files. Wan2.1: 16."""


class LoggingConfig(_Section):
    """Where metrics go, besides ``metrics.jsonl``."""

    tensorboard: bool = True
    """Event files in the run's ``tensorboard`` folder."""
    wandb: WandbConfig | None = None
    """Weights & Biases, if wanted."""


class EvaluationConfig(_Section):
    """How a demo measures what came out."""

    samples: int = Field(default=144, ge=2)
    """Clips per model, and real clips to compare with."""
    teacher_steps: int = Field(default=25, ge=1)
    """Euler steps of the teacher."""


class HeldOutConfig(_Section):
    """How an interpolator is measured."""

    clips: int = Field(default=64, ge=1)
    """Of data of kind shards: how many of the last samples are held out. Shapes and videos have held-out clips of their
    own."""


class TrainConfig(_Section):
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
    """Samples per update, over all ranks."""
    micro_batch_size: int | None = Field(default=None, ge=1)
    """Samples that a rank runs at once; it accumulates gradients over the rest of its share. None: its whole share."""
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


class InterpolatorConfig(_Section):
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


class ArchitectureConfig(_Section):
    """Size of a ``WanTransformer3DModel``; its latents are those of :class:`BlockDCTCodec`."""

    num_attention_heads: int = Field(default=3, ge=1)
    """Heads; the width of the model is this times the next."""
    attention_head_dim: int = Field(default=32, ge=8)
    """Width of a head."""
    ffn_dim: int = Field(default=288, ge=1)
    """Width of the feed-forward layers."""
    num_layers: int = Field(default=4, ge=1)
    """Transformer blocks."""
    freq_dim: int = Field(default=64, ge=2)
    """Width of the sinusoidal timestep embedding."""
    text_dim: int = Field(default=32, ge=2)
    """Width of a caption's tokens."""


class TeacherConfig(_Section):
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


Config = TypeVar("Config", TrainConfig, InterpolatorConfig, TeacherConfig)


def presets(kind: type[Config]) -> list[str]:
    """Names of the presets that come with the package."""
    return sorted(f.name.removesuffix(".yaml") for f in _preset_folder(kind).iterdir() if f.name.endswith(".yaml"))


def load_config(
    kind: type[Config],
    source: str,
    overrides: list[str] | None = None,
    replace: Mapping[str, Any] | None = None,
    missing: Mapping[str, Any] | None = None,
) -> Config:
    """Read a preset or a YAML file, apply overrides, validate.

    Args:
        kind: Which configuration to read.
        source: A preset's name, or the path of a YAML file.
        overrides: ``key=value`` with dots in the key, for example ``"objective.regression.weight=0.5"``; the value is
            YAML.
        replace: Top-level values to replace before that.
        missing: Top-level values to take where there are none.

    Raises:
        ConfigError: With one line per wrong field.
    """
    try:
        config = OmegaConf.create(_read(kind, source))
        if not isinstance(config, DictConfig):
            raise ConfigError(f"{source}: expected keys and values, got a list.")
        for key, value in {**(missing or {}), **config, **(replace or {})}.items():
            config[key] = value
        config = OmegaConf.merge(config, OmegaConf.from_dotlist(list(overrides or [])))
        values = OmegaConf.to_container(config, resolve=True)
    except ConfigError:
        raise
    except (OmegaConfBaseException, YAMLError, ValueError) as error:
        raise ConfigError(f"{source}: {error}") from error
    return validate(kind, values, source)


def validate(kind: type[Config], values: Any, source: str) -> Config:
    """Build a configuration, with an error that a person can act on."""
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        lines = [_describe(item) for item in error.errors()]
        raise ConfigError(f"{source} is not a valid configuration:\n" + "\n".join(lines)) from error


def save_config(config: BaseModel, path: Path) -> None:
    """Write a configuration as YAML, complete with defaults."""
    path.write_text(OmegaConf.to_yaml(OmegaConf.create(config.model_dump(mode="json"))))


def _read(kind: type[Config], source: str) -> str:
    preset = _preset_folder(kind) / f"{source}.yaml"
    if source in presets(kind):
        return preset.read_text()
    path = Path(source)
    if not path.is_file():
        raise ConfigError(
            f"{source!r} is neither a preset ({', '.join(presets(kind))}) nor a YAML file. Check the name or the path."
        )
    try:
        return path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{source} cannot be read: {error}.") from error


def _preset_folder(kind: type[Config]) -> Any:
    folders = {TrainConfig: "train", InterpolatorConfig: "interpolator", TeacherConfig: "teacher"}
    return resources.files("avd_trainer") / "presets" / folders[kind]


def _describe(item: Any) -> str:
    # A discriminated union adds its tag to the path, which is no key that a person could set.
    path = ".".join(str(part) for part in item["loc"] if part not in ("shapes", "videos", "shards")) or "(the whole)"
    message = item["msg"].removeprefix("Value error, ")
    if item["type"] == "missing":
        hint = ". Pass --data DIR, a folder that `avd data encode` made" if path == "data" else ""
        return f"  {path}: {message}{hint}"
    if item["type"] == "extra_forbidden":
        return f"  {path}: there is no such field"
    return f"  {path}: {message}, got {item['input']!r}"
