"""Sections of a configuration that methods, engine and commands share."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Literal, Self, get_args

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

MOST_SATURATION = 1.5
"""Of moving shapes: beyond it, colours of the palette would leave [0, 1]."""


def _as_sequence(value: object) -> object:
    return [value] if isinstance(value, str | Path) else value


class Section(BaseModel):
    """Frozen, keyword only; refuses keys that it does not know.

    A section inside another one that is given in part has the outer one's defaults for the rest, not its own class's.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _complete(cls, values: object) -> object:
        if not isinstance(values, Mapping):
            return values
        fields = cls.model_fields
        return {
            name: complete(fields[name].default, value)
            if name in fields and _is_plain(fields[name].annotation)
            else value
            for name, value in values.items()
        }


def complete(default: object, given: object) -> object:
    """A section's values that are given in part, with a default's for the rest; anything else as it is given."""
    if not isinstance(default, Section) or not isinstance(given, Mapping):
        return given
    own = {name: getattr(default, name) for name in type(default).model_fields}
    return own | {name: complete(own.get(name), value) for name, value in given.items()}


def _is_plain(annotation: object) -> bool:
    """Whether a field is a section of one kind, or None; of several kinds the default may be another than was given."""
    return len([part for part in (get_args(annotation) or (annotation,)) if part is not type(None)]) == 1


ShapeCaptions = Literal["full", "subjects"]
"""How much captions of moving shapes say."""


class ShapesData(Section):
    """Generated clips of two moving shapes; needs no files."""

    kind: Literal["shapes"] = "shapes"
    clips: int = Field(default=1024, ge=2)
    """Number of clips to train on."""
    held_out: int = Field(default=768, ge=2)
    """Number of further clips that only evaluation sees."""
    seed: int = Field(default=0, ge=0)
    """Which clips to train on; held-out clips have captions that no seed trains on. Data and training have separate
    seeds, so that runs can differ in one alone."""
    saturation: float = Field(default=1.0, gt=0, le=MOST_SATURATION)
    """Of their colours, relative to the clips that the bundled teacher was trained on: another style."""
    captions: ShapeCaptions = "full"
    """How much of a clip they say: ``full`` says everything; ``subjects`` names the two shapes, colour and kind, and
    leaves layout, background, directions and speeds open."""
    wrong_captions: float | None = Field(default=None, gt=0, le=1)
    """Share of the clips to train on that have one another's captions, as a captioner that errs would have it; None:
    each has its own. Held-out clips always have theirs."""

    @model_validator(mode="after")
    def _check_wrong_captions(self) -> Self:
        if self.wrong_captions is not None and self.misfits < 2:
            raise ValueError(
                f"wrong_captions={self.wrong_captions} of {self.clips} clips are {self.misfits}, and two are needed to "
                "exchange their captions"
            )
        return self

    @property
    def misfits(self) -> int:
        """How many clips have another one's caption."""
        return round((self.wrong_captions or 0.0) * self.clips)


class VideosData(Section):
    """The user's own video files."""

    kind: Literal["videos"] = "videos"
    path: Path
    """A folder; it is searched recursively for files that PyAV can decode."""


class ShardsData(Section):
    """Encoded clips in Parquet shards, as ``avd data`` makes them."""

    kind: Literal["shards"] = "shards"
    path: Annotated[tuple[Path, ...], BeforeValidator(_as_sequence), Field(min_length=1)]
    """The folder of a data set, or a list of several that are joined."""
    workers: int = Field(default=2, ge=0)
    """Processes per rank that read ahead; 0 reads in the training process."""


DataSection = Annotated[ShapesData | VideosData | ShardsData, Field(discriminator="kind")]
"""Where real clips come from."""


class OptimizerConfig(Section):
    """AdamW."""

    lr: float = Field(gt=0)
    """Learning rate."""
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = (0.9, 0.999)
    """Decay of the first and second moment. Paper: (0.9, 0.999)."""
    weight_decay: float = Field(default=0.0, ge=0)
    """Decoupled weight decay."""
    schedule: Literal["constant", "cosine", "one_cycle"] = "constant"
    """``cosine`` lets the learning rate fall along half a cosine, from ``lr`` in the first step to 0 behind the last.
    ``one_cycle`` rises to ``lr`` over the first 30% of the steps and falls behind that, and moves the first beta from
    0.95 to 0.85 and back (Smith and Topin 2018; PyTorch's ``OneCycleLR``)."""


class ScoreTimestepsConfig(Section):
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


class LoRAConfig(Section):
    """Low-rank adapters in place of full fine-tuning, by peft."""

    rank: int = Field(default=64, ge=1)
    """Rank of the update of each weight matrix."""
    alpha: float = Field(default=64.0, gt=0)
    """The update is scaled by ``alpha / rank``."""
    target_modules: tuple[str, ...] = ("to_q", "to_k", "to_v", "to_out.0", "ffn.net.0.proj", "ffn.net.2")
    """Linear layers that get an adapter, by the end of their names."""


class ParallelConfig(Section):
    """How a run spreads over its ranks, and what it trades for memory."""

    timeout_minutes: float = Field(default=30.0, gt=0)
    """How long a rank waits for the others before it says that one is gone."""
    replicate: int = Field(default=1, ge=1)
    """Groups of ranks that each hold all shards (hybrid sharding: usually one per node). 1 shards over all ranks."""
    activation_checkpointing: bool = True
    """Keep only the inputs of transformer blocks for the backward pass, and compute the rest again."""
    compile: bool = False
    """``torch.compile`` of each transformer block; needs a C++ compiler."""


class CheckpointConfig(Section):
    """When to save, and what to keep."""

    every: int = Field(default=100, ge=1)
    """Steps between two checkpoints; the last step is always saved."""
    keep_latest: int = Field(default=2, ge=1)
    """How many to keep. One that holds a file named ``keep`` is never removed, and does not count."""
    keep_every: int | None = Field(default=None, ge=1)
    """Checkpoints of steps that this divides are kept for good."""


class SamplesConfig(Section):
    """Clips of what is trained, with averaged weights, while it trains."""

    every: int | None = Field(default=None, ge=1)
    """Steps between two looks; None for none."""
    count: int = Field(default=4, ge=1)
    """Number of prompts: the first of the data."""
    fps: float | None = Field(default=None, gt=0)
    """Frames per second of the files; None: those of the data, or Wan2.1's 16 where it does not say."""


class WandbConfig(Section):
    """Where Weights & Biases shows a run; needs ``pip install wandb``."""

    project: str = Field(min_length=1)
    """Project that the run appears in."""
    entity: str | None = None
    """User or team; None is the account's own."""
    name: str | None = None
    """Name of the run; None is that of its folder."""
    mode: Literal["online", "offline"] | None = None
    """``offline`` needs no account and keeps everything in the run's folder, for ``wandb sync`` to upload later. None
    is what ``WANDB_MODE`` says, and online without it."""


class LoggingConfig(Section):
    """Where metrics go, besides ``metrics.jsonl``."""

    tensorboard: bool = True
    """Event files in the run's ``tensorboard`` folder."""
    wandb: WandbConfig | None = None
    """Weights & Biases, if wanted."""


class ArchitectureConfig(Section):
    """Size of a ``WanTransformer3DModel``; its latents are those of :class:`BlockDCTCodec`."""

    num_attention_heads: int = Field(default=3, ge=1)
    """Heads; the width of the model is this times the next."""
    attention_head_dim: int = Field(default=32, ge=8)
    """Width of a head."""
    ffn_dim: int = Field(default=384, ge=1)
    """Width of the feed-forward layers."""
    num_layers: int = Field(default=6, ge=1)
    """Transformer blocks."""
    freq_dim: int = Field(default=64, ge=2)
    """Width of the sinusoidal timestep embedding."""
    text_dim: int = Field(default=32, ge=2)
    """Width of a caption's tokens."""
    image_to_video: bool = False
    """Whether the model is given the first frame: as in Wan2.2's image to video by further input channels alone."""
