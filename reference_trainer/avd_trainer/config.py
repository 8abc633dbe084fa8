"""Everything that a run depends on, validated before it starts."""

from __future__ import annotations

from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeVar

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from yaml import YAMLError

from avd_core import AVDConfig
from avd_trainer.errors import UserError


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


class EvaluationConfig(_Section):
    """How a demo measures what came out."""

    samples: int = Field(default=144, ge=2)
    """Clips per model, and real clips to compare with."""
    teacher_steps: int = Field(default=25, ge=1)
    """Euler steps of the teacher."""


class TrainConfig(_Section):
    """A distillation run: Algorithm 1 of the paper."""

    teacher: str
    """``bundled:tiny``, or a folder that holds a diffusers ``WanTransformer3DModel`` (config.json and safetensors)."""
    data: Annotated[ShapesData | VideosData, Field(discriminator="kind")]
    """Real clips with captions: the regression's data and, by their captions, the prompts of the matching term."""
    max_steps: int = Field(ge=1)
    """Generator updates."""
    batch_size: int = Field(ge=1)
    """Samples per update."""
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
    evaluation: EvaluationConfig = EvaluationConfig()
    """What ``avd demo`` measures."""

    @model_validator(mode="after")
    def _check_few_steps(self) -> Self:
        steps = self.objective.timesteps
        if self.objective.motion is not None and self.objective.motion.frame_dim != 2:
            raise ValueError("objective.motion.frame_dim must be 2: this trainer's latents are [B, C, F, H, W]")
        if steps[0] < steps[-1] or not 0 < steps[-1] <= steps[0] <= 1000:
            raise ValueError(f"objective.timesteps must fall from at most 1000 to above 0, got {steps}")
        return self


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


Config = TypeVar("Config", TrainConfig, TeacherConfig)


def presets(kind: type[TrainConfig] | type[TeacherConfig]) -> list[str]:
    """Names of the presets that come with the package."""
    return sorted(f.name.removesuffix(".yaml") for f in _preset_folder(kind).iterdir() if f.name.endswith(".yaml"))


def load_config(kind: type[Config], source: str, overrides: list[str] | None = None) -> Config:
    """Read a preset or a YAML file, apply overrides, validate.

    Args:
        kind: Which configuration to read.
        source: A preset's name, or the path of a YAML file.
        overrides: ``key=value`` with dots in the key, for example ``"objective.regression.weight=0.5"``; the value is
            YAML.

    Raises:
        ConfigError: With one line per wrong field.
    """
    try:
        config = OmegaConf.create(_read(kind, source))
        if not isinstance(config, DictConfig):
            raise ConfigError(f"{source}: expected keys and values, got a list.")
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


def _preset_folder(kind: type[TrainConfig] | type[TeacherConfig]) -> Any:
    return resources.files("avd_trainer") / "presets" / ("train" if kind is TrainConfig else "teacher")


def _describe(item: Any) -> str:
    # A discriminated union adds its tag to the path, which is no key that a person could set.
    path = ".".join(str(part) for part in item["loc"] if part not in ("shapes", "videos")) or "(the whole)"
    message = item["msg"].removeprefix("Value error, ")
    if item["type"] == "missing":
        return f"  {path}: {message}"
    if item["type"] == "extra_forbidden":
        return f"  {path}: there is no such field"
    return f"  {path}: {message}, got {item['input']!r}"
