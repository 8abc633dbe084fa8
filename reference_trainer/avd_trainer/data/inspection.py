"""What is in a data set, and what looks wrong with it."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor

from avd_core import temporal_variance
from avd_trainer.data.schema import PROVENANCE, Encoding, ImageTokens
from avd_trainer.data.shard_reading import ShardDataset
from avd_trainer.runtime.errors import UserError

NO_LICENCE = "not given"
# Of the latents' variance the share along frames below which a clip stands still.
STILL = 0.01
# Normalised latents have about unit scale; Wan2.1's raw ones have a standard deviation of about 2.3.
UNIT_SCALE = (0.5, 1.6)


class Provenance(BaseModel):
    """Of which videos rows were made, and how; see the column ``provenance`` in ``docs/data.md``."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    files: int
    """Different files, by their SHA-256."""
    licences: dict[str, int]
    """Rows of each licence; :data:`NO_LICENCE` where none was found beside the video."""
    versions: tuple[str, ...]
    """Versions of this package that prepared them."""
    stages: dict[str, str]
    """What the first row's stages were, by name: version and settings."""
    alike: bool
    """Whether all rows have these stages and settings."""


class DataReport(BaseModel):
    """What :func:`inspect` found."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    files: int
    """Shards."""
    rows: int
    """Examples, of all shards."""
    bytes: int
    """Size of all shards."""
    latent_shape: tuple[int, ...] | None
    """``(C, F, H, W)``; None for prompts alone."""
    encoding: Encoding | None
    """How clips became latents; None for prompts alone, and where the data does not say."""
    latent_dtypes: tuple[str, ...]
    """How latents are stored."""
    image: ImageTokens | None
    """Size of the image embeddings; None where there is nothing of first frames."""
    text_length: int
    """L, tokens after padding."""
    text_dim: int
    """D, width of a token."""
    text_dtypes: tuple[str, ...]
    """How text embeddings are stored."""
    tokens_min: int
    """Fewest tokens of a caption, before padding."""
    tokens_mean: float
    """Mean tokens of a caption."""
    tokens_max: int
    """Most tokens of a caption."""
    sources: int
    """Different sources."""
    provenance: Provenance | None
    """Of rows that were prepared from raw videos; None for others."""
    empty_captions: int
    """Rows without a caption."""
    captions: tuple[str, ...]
    """A few captions, evenly spread."""
    unconditional_prompt: str | None
    """Prompt of the unconditional text embedding; None if the data set has no such embedding."""
    measured: int
    """Rows whose latents were read for what follows."""
    not_finite: int
    """Of these, rows with NaN or infinity, which the figures below leave out."""
    standing_still: int
    """Of these, rows with less than 1% of their variance along frames."""
    latent_mean: float | None
    """Mean of the latents; None without a finite latent, as all below."""
    latent_std: float | None
    """Standard deviation of the latents."""
    channel_means: tuple[float, ...] | None
    """Mean per channel."""
    channel_stds: tuple[float, ...] | None
    """Standard deviation per channel."""
    temporal_loss: float | None
    """``-log E[Var_t]`` in nats. Lower is more motion. None for latents of one frame."""
    warnings: tuple[str, ...]
    """What looks wrong, in words."""


def inspect(path: Path, latents: int = 256) -> DataReport:
    """Describe a data set.

    Small columns are read in full; latents of at most ``latents`` evenly spread rows, one at a time.

    Args:
        path: Folder of the data set.
        latents: Rows whose latents are read, at least 1.

    Raises:
        UserError: As :class:`ShardDataset`, if a row that is read is damaged, or if the folder holds a data set for
            each of several sizes.
    """
    if latents < 1:
        raise ValueError(f"inspect needs latents >= 1, got {latents}.")
    _expect_one_size(path)
    dataset = ShardDataset(path)
    (files,) = dataset.fingerprint()
    tokens = np.fromiter(dataset.column("text_tokens"), dtype=np.int64)
    statistics = _LatentStatistics()
    for row in _spread(len(dataset), latents) if dataset.has_latents else ():
        latent = dataset[row].latent
        assert latent is not None
        statistics.add(latent)
    report = DataReport(
        files=len(files),
        rows=len(dataset),
        bytes=sum(entry["bytes"] for entry in files),
        latent_shape=dataset.latent_shape,
        encoding=dataset.encoding,
        latent_dtypes=tuple(sorted({name for name in dataset.column("dtype") if name is not None})),
        image=dataset.image,
        text_length=dataset.text_length,
        text_dim=dataset.text_dim,
        text_dtypes=tuple(sorted(set(dataset.column("text_dtype")))),
        tokens_min=int(tokens.min()),
        tokens_mean=float(tokens.mean()),
        tokens_max=int(tokens.max()),
        sources=len(set(dataset.column("source"))),
        provenance=_provenance(dataset),
        empty_captions=sum(not caption.strip() for caption in dataset.column("caption")),
        captions=tuple(dataset[row].caption for row in _spread(len(dataset), 3)),
        unconditional_prompt=dataset.unconditional_prompt() if dataset.has_unconditional else None,
        measured=statistics.measured,
        not_finite=statistics.not_finite,
        standing_still=statistics.standing_still,
        latent_mean=statistics.mean,
        latent_std=statistics.std,
        channel_means=statistics.channel_means,
        channel_stds=statistics.channel_stds,
        temporal_loss=statistics.temporal_loss,
        warnings=(),
    )
    return report.model_copy(update={"warnings": tuple(_warnings(report))})


def find_rows(path: Path, clip: str) -> list[dict[str, Any]]:
    """Where rows come from and how they were made, by the column ``provenance`` of ``docs/data.md``.

    Args:
        path: Folder of the data set.
        clip: Path of a video as its rows have it, or a clip's id, as the report of the preparation has it.

    Returns:
        Of each row, ``id`` and ``caption`` besides what its provenance says; in order of the data set.

    Raises:
        UserError: As :func:`inspect`, if the data set says nothing of its videos, or no row is of this clip; then it
            says which stage left it out, and why, if that is known.
    """
    from avd_trainer.data.preparation.left_out import why_left_out
    from avd_trainer.data.preparation.schedule import clip_id
    from avd_trainer.data.preparation.stage import Span

    _expect_one_size(path)
    dataset = ShardDataset(path)
    if not dataset.has_provenance:
        raise UserError(f"{path} does not say of which videos it was made. `avd data prepare` makes data sets that do.")
    rows = []
    for text, caption in zip(dataset.column(PROVENANCE), dataset.column("caption"), strict=True):
        row = json.loads(text)
        id_ = clip_id(row["sha256"], Span(*row["span"]))
        if clip in (row["file"], id_):
            rows.append({"id": id_, **row, "caption": caption})
    if not rows and (why := why_left_out(path, clip)):
        raise UserError(f"{path} has no clip {clip}:\n" + "\n".join(f"  {each}" for each in why))
    if not rows:
        raise UserError(
            f"{path} has no clip {clip}. Pass a video's path below the folder of videos, such as "
            f"{json.loads(next(iter(dataset.column(PROVENANCE))))['file']}, or a clip's id from the report; "
            "or it was left out: report.html says why."
        )
    return rows


def _expect_one_size(path: Path) -> None:
    if any(path.glob("*.parquet")) or not (sizes := sorted({shard.parent for shard in path.rglob("*.parquet")})):
        return
    if len(sizes) == 1:
        raise UserError(f"{path} is no data set: the data set is {sizes[0]}. Pass that folder.")
    raise UserError(
        f"{path} is no data set, but holds {', '.join(str(size.relative_to(path)) for size in sizes)}; with several "
        f"framing.sizes there is one for each, since training reads one size at a time. Look at one: avd data inspect "
        f"{sizes[0]}"
    )


def _provenance(dataset: ShardDataset) -> Provenance | None:
    """Row by row, since it is long; None if there is none."""
    if not dataset.has_provenance:
        return None
    files: set[str] = set()
    licences: Counter[str] = Counter()
    versions: set[str] = set()
    first: dict[str, str] | None = None
    alike = True
    for text in dataset.column(PROVENANCE):
        row = json.loads(text)
        files.add(row["sha256"])
        licences[row["licence"] or NO_LICENCE] += 1
        versions.add(row["avd_core"])
        stages = {name: describe_stage(stage) for name, stage in row["stages"].items()}
        first = stages if first is None else first
        alike = alike and stages == first
    return Provenance(
        files=len(files),
        licences=dict(sorted(licences.items())),
        versions=tuple(sorted(versions)),
        stages=first or {},
        alike=alike,
    )


def describe_stage(stage: Mapping[str, Any]) -> str:
    """Version and settings of a stage, as provenance has them, in one line."""
    settings = " ".join(f"{name}={json.dumps(value)}" for name, value in stage["settings"].items() if value is not None)
    return f"version {stage['version']} {settings}".strip()


class _LatentStatistics:
    """Sums over latents that come one at a time."""

    def __init__(self) -> None:
        self.measured = self.not_finite = self.standing_still = 0
        self._count = 0
        # Per clip: mean and mean square of each channel, and the temporal variance.
        self._sums: tuple[Tensor, Tensor] | None = None
        self._temporal = 0.0

    def add(self, latent: Tensor) -> None:
        """Count ``[C, F, H, W]`` in."""
        self.measured += 1
        if not latent.isfinite().all():
            self.not_finite += 1
            return
        self._count += 1
        values = latent.double().flatten(1)
        means, squares = values.mean(1), values.square().mean(1)
        before = self._sums or (torch.zeros_like(means), torch.zeros_like(squares))
        self._sums = before[0] + means, before[1] + squares
        if latent.shape[1] > 1:
            temporal = float(temporal_variance(latent.unsqueeze(0)))
            self._temporal += temporal
            self.standing_still += temporal < STILL * float(latent.var(correction=0))

    @property
    def mean(self) -> float | None:
        return None if self._sums is None else float(self._moments()[0].mean())

    @property
    def std(self) -> float | None:
        if self._sums is None:
            return None
        means, squares = self._moments()
        return math.sqrt(max(0.0, float(squares.mean() - means.mean() ** 2)))

    @property
    def channel_means(self) -> tuple[float, ...] | None:
        return None if self._sums is None else tuple(self._moments()[0].tolist())

    @property
    def channel_stds(self) -> tuple[float, ...] | None:
        if self._sums is None:
            return None
        means, squares = self._moments()
        return tuple((squares - means**2).clamp_min(0).sqrt().tolist())

    @property
    def temporal_loss(self) -> float | None:
        return -math.log(self._temporal / self._count) if self._temporal > 0 else None

    def _moments(self) -> tuple[Tensor, Tensor]:
        assert self._sums is not None
        return self._sums[0] / self._count, self._sums[1] / self._count


def _spread(length: int, count: int) -> list[int]:
    """At most ``count`` of ``range(length)``, evenly spread."""
    count = min(length, count)
    return [(2 * number + 1) * length // (2 * count) for number in range(count)]


def _is_unit(std: float) -> bool:
    low, high = UNIT_SCALE
    return low <= std <= high


def _warnings(report: DataReport) -> Iterator[str]:
    if report.not_finite:
        yield (
            f"{report.not_finite} of {report.measured} latents hold NaN or infinity. Encode those clips again; "
            "bfloat16 or float32 in the VAE avoids overflow."
        )
    # The tiny preset's codec is scaled for its shapes, and gives natural footage several times that.
    scaled_for_footage = report.encoding is None or report.encoding.latent_space != "block-dct-4"
    if scaled_for_footage and report.latent_std is not None and not _is_unit(report.latent_std):
        yield (
            f"The latents have a standard deviation of {report.latent_std:.2f}, expected about 1: they may not be "
            "normalised, (z - mean) / std with the VAE's latents_mean and latents_std."
        )
    if report.latent_shape is not None and report.encoding is None:
        yield (
            "The data does not say which codec made its latents; training takes them for the teacher's. Data sets of "
            "`avd data encode` say it."
        )
    if report.standing_still:
        yield (
            f"{report.standing_still} of {report.measured} clips stand still. A student learns that too: leave out "
            "clips with little optical flow."
        )
    if report.empty_captions:
        yield f"{report.empty_captions} of {report.rows} rows have an empty caption."
    if report.tokens_max == report.text_length:
        yield f"Some captions fill all {report.text_length} tokens; longer ones were cut."
    if report.unconditional_prompt is None:
        yield (
            "There is no unconditional text embedding. Data for the matching term needs one; "
            "`avd data encode-prompts` writes it."
        )
