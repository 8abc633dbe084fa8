"""Training data on disk: folders of Parquet shards, each row a latent, its text embedding and its caption.

Rows are raw bytes without compression in small row groups, so that any row can be read from a memory-mapped file
without reading its neighbours.
"""

from __future__ import annotations

import os
import re
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.utils.data import Dataset

from avd_trainer.data.examples import Example
from avd_trainer.data.schema import (
    IMAGE_COLUMNS,
    PROVENANCE,
    REMEDY,
    SCHEMA,
    UNCONDITIONAL,
    UNFINISHED,
    ImageTokens,
    Layout,
    check_alike,
    describe_shape,
    read_schema,
    to_tensor,
)
from avd_trainer.models.architecture import ImageInput
from avd_trainer.models.codecs.first_frame import with_mask
from avd_trainer.runtime.errors import UserError

_SHARD_NAME = re.compile(r"(?P<name>.+)-(?P<index>\d{5})-of-(?P<count>\d{5})\.parquet")


@dataclass(frozen=True)
class _Shard:
    path: Path
    rows: int
    bytes: int
    layout: Layout
    group_starts: Sequence[int]


class _Folder(NamedTuple):
    path: Path
    shards: list[_Shard]


class ShardDataset(Dataset[Example]):
    """The shards of one folder or of several in a row, read at random through memory maps.

    Map-style: ``len(dataset)`` rows, ``dataset[i]`` is an :class:`Example`. Files are opened in the process that reads
    them, so it works in the workers of a ``DataLoader``, forked or spawned.

    Args:
        folders: One or more; each holds the shards of one data set, and no other Parquet files. Their order is that of
            the rows.
        image: What a model reads of first frames; None for one of text to video, and the columns for that are left
            alone.

    Attributes:
        latent_shape: ``(C, F, H, W)``, or None in a data set of prompts.
        text_length: L, the tokens of a text embedding after padding.
        text_dim: D, the width of a token.
        encoding: How clips became latents; None for prompts, and where no shard says it.
        image: Size of the image embeddings; None where there is nothing of first frames.

    Raises:
        UserError: If a shard is missing, truncated, empty, of a foreign schema or another version, or if shards
            disagree in the shape of their latents or text embeddings, in their codec or their frame rate. The message
            names the file.
    """

    def __init__(self, *folders: Path, image: ImageInput | None = None) -> None:
        if not folders:
            raise ValueError("ShardDataset needs at least one folder, got none.")
        self._folders = [_Folder(folder, [_open_shard(path) for path in _shard_paths(folder)]) for folder in folders]
        self._shards = [shard for folder in self._folders for shard in folder.shards]
        reference = max(self._shards, key=_tells)
        for shard in self._shards:
            check_alike(reference.layout, reference.path, shard.layout, shard.path)
            if image is not None:
                _expect_image(shard, image)
        self.latent_shape, self.text_length, self.text_dim, self.encoding, self.image = reference.layout
        self._reads = image
        self._ends = np.cumsum([shard.rows for shard in self._shards]).tolist()
        self._files: dict[Path, pq.ParquetFile] = {}
        self._owner = os.getpid()

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, index: int) -> Example:
        if not 0 <= index < len(self):
            raise IndexError(f"row {index} of a data set of {len(self)} rows")
        number = bisect_right(self._ends, index)
        shard = self._shards[number]
        row = index - (self._ends[number] - shard.rows)
        return self._decode(self._read(shard, row), shard.layout.image, f"{shard.path}, row {row}")

    @property
    def paths(self) -> list[Path]:
        """The shards, in the order of their rows."""
        return [shard.path for shard in self._shards]

    @property
    def has_latents(self) -> bool:
        """Whether there are latents, or prompts alone."""
        return self.latent_shape is not None

    @property
    def has_unconditional(self) -> bool:
        """Whether there is an unconditional text embedding."""
        return any((folder.path / UNCONDITIONAL).is_file() for folder in self._folders)

    @property
    def has_provenance(self) -> bool:
        """Whether each row says of which file it was made, and how."""
        return all(PROVENANCE in self._file(shard.path).schema_arrow.names for shard in self._shards)

    def unconditional(self) -> Tensor:
        """The text embedding of classifier-free guidance's unconditional prediction, ``[L, D]`` float32.

        Raises:
            UserError: If no folder has one, a file cannot be read, or folders disagree.
        """
        text, _ = self._read_unconditional()
        return text

    def unconditional_prompt(self) -> str:
        """What :meth:`unconditional` embeds: a negative prompt, or nothing.

        Raises:
            UserError: As :meth:`unconditional`.
        """
        _, prompt = self._read_unconditional()
        return prompt

    def fingerprint(self) -> list[list[dict[str, Any]]]:
        """File name, rows and bytes of each shard of each folder: what a resumed run compares. JSON-able."""
        return [
            [{"file": shard.path.name, "rows": shard.rows, "bytes": shard.bytes} for shard in folder.shards]
            for folder in self._folders
        ]

    def check_fingerprint(self, saved: Sequence[Sequence[Mapping[str, Any]]]) -> None:
        """Compare with the :meth:`fingerprint` of an earlier run.

        Raises:
            UserError: If a folder or a shard is missing, new or changed; the message names it.
        """
        if len(saved) != len(self._folders):
            raise UserError(
                f"The run to be resumed read {len(saved)} data set(s), this one {len(self._folders)} "
                f"({', '.join(str(folder.path) for folder in self._folders)}). Pass the same ones in the same order, "
                "or start a new run."
            )
        for folder, before, now in zip(self._folders, saved, self.fingerprint(), strict=True):
            _check_files(folder.path, before, now)

    def column(self, name: str) -> Iterator[Any]:
        """The values of one small column, row by row; latents are not read."""
        for shard in self._shards:
            with _readable(shard.path):
                table = self._file(shard.path).read(columns=[name], use_threads=False)
            yield from table.column(name).to_pylist()

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_files": {}}

    def _file(self, path: Path) -> pq.ParquetFile:
        if self._owner != os.getpid():  # forked: the parent's handles stay the parent's
            self._files, self._owner = {}, os.getpid()
        if path not in self._files:
            self._files[path] = pq.ParquetFile(path, memory_map=True, pre_buffer=False, page_checksum_verification=True)
        return self._files[path]

    def _read(self, shard: _Shard, row: int) -> dict[str, Any]:
        group = bisect_right(shard.group_starts, row) - 1
        with _readable(shard.path):
            table = self._file(shard.path).read_row_group(group, columns=self._columns, use_threads=False)
        return {name: table.column(name)[row - shard.group_starts[group]] for name in self._columns}

    @property
    def _columns(self) -> list[str]:
        """Those that are read."""
        if self._reads is None:
            return list(SCHEMA.names)
        return [*SCHEMA.names, *(IMAGE_COLUMNS if self._reads.embedding_dim else IMAGE_COLUMNS[:1])]

    def _decode(self, values: dict[str, Any], image: ImageTokens | None, where: str) -> Example:
        tokens = values["text_tokens"].as_py()
        if not 0 <= tokens <= self.text_length:
            raise UserError(f"{where}: expected 0 to {self.text_length} text tokens, got {tokens}. {REMEDY}")
        text = torch.zeros(self.text_length, self.text_dim)
        text[:tokens] = to_tensor(
            values["text_embedding"], values["text_dtype"], (tokens, self.text_dim), f"{where}: text_embedding"
        )
        latent = None
        if self.latent_shape is not None:
            latent = to_tensor(values["latent"], values["dtype"], self.latent_shape, f"{where}: latent")
        example = Example(latent, text, values["caption"].as_py(), values["source"].as_py())
        if self._reads is None:
            return example
        assert self.latent_shape is not None
        assert image is not None
        shapes: dict[str, tuple[int, ...]] = {"image_latent": self.latent_shape, "image_embedding": image}
        read = {
            name: to_tensor(values[name], values["dtype"], shape, f"{where}: {name}")
            for name, shape in shapes.items()
            if name in values
        }
        return example._replace(
            image_latents=with_mask(read["image_latent"]), image_embedding=read.get("image_embedding")
        )

    def _read_unconditional(self) -> tuple[Tensor, str]:
        paths = [folder.path / UNCONDITIONAL for folder in self._folders]
        found = [path for path in paths if path.is_file()]
        if not found:
            raise UserError(
                f"{paths[0]} is missing: classifier-free guidance needs the text embedding of its unconditional "
                "prediction. `avd data encode-prompts` writes one with the prompts; copy it here from a data set that "
                "was made with the same model."
            )
        text, prompt = self._read_embedding(found[0])
        for other in found[1:]:
            if not torch.equal(self._read_embedding(other)[0], text):
                raise UserError(
                    f"{other} and {found[0]} embed different negative prompts, and guidance needs one. Copy the one "
                    "that you want over the other, or make both data sets with the same --negative-prompt."
                )
        return text, prompt

    def _read_embedding(self, path: Path) -> tuple[Tensor, str]:
        """The padded embedding ``[L, D]`` in a file, and its prompt."""
        try:
            with safe_open(path, framework="pt") as file:
                text, metadata = file.get_tensor("text_embedding"), file.metadata() or {}
        except (OSError, SafetensorError) as error:
            raise UserError(f"{path} cannot be read: {error}. {REMEDY}") from error
        if text.ndim != 2 or text.shape[0] > self.text_length or text.shape[1] != self.text_dim:
            raise UserError(
                f"{path} holds a text embedding of shape {list(text.shape)}, the data set has at most "
                f"{self.text_length} tokens of width {self.text_dim}. Take one that was made with the same model."
            )
        padded = torch.zeros(self.text_length, self.text_dim)
        padded[: len(text)] = text
        return padded, metadata.get("prompt", "")


def _tells(shard: _Shard) -> int:
    """How much a shard says of its encoding."""
    encoding = shard.layout.encoding
    return 0 if encoding is None else sum(value is not None for value in encoding)


def _expect_image(shard: _Shard, image: ImageInput) -> None:
    remedy = "Encode the videos for the teacher, with `avd data encode --image-condition --model TEACHER`."
    if shard.layout.latent_shape is None:
        raise UserError(
            f"{shard.path} holds prompts only, and the teacher makes videos of an image and a prompt. Leave --prompts "
            "out: the captions of clips are read together with their first frames."
        )
    if shard.layout.image is None:
        raise UserError(f"{shard.path} holds nothing of first frames, which the image-to-video teacher reads. {remedy}")
    if image.embedding_dim and shard.layout.image.dim != image.embedding_dim:
        raise UserError(
            f"{shard.path} has image embeddings of width {shard.layout.image.dim}, the teacher expects "
            f"{image.embedding_dim}. {remedy}"
        )


def _check_files(folder: Path, saved: Sequence[Mapping[str, Any]], found: Sequence[Mapping[str, Any]]) -> None:
    before, now = ({entry["file"]: dict(entry) for entry in entries} for entries in (saved, found))
    for name in sorted(before.keys() | now.keys()):
        if name not in now:
            raise UserError(f"{folder / name} is missing: the run to be resumed read it. Put it back.")
        if name not in before:
            raise UserError(
                f"{folder / name} is not of the data that the run to be resumed read. Remove it, or start a new run."
            )
        if before[name] != now[name]:
            raise UserError(
                f"{folder / name} is not the file that the run to be resumed read: that had {before[name]['rows']} "
                f"rows in {before[name]['bytes']} bytes, this has {now[name]['rows']} in {now[name]['bytes']}. Pass "
                "the folder that it read, with its old files, or start a new run."
            )


def _shard_paths(folder: Path) -> list[Path]:
    """The shards of a folder in order, all there."""
    if not folder.is_dir():
        raise UserError(f"{folder} is not a folder. Pass the folder that holds the shards of a data set.")
    paths = sorted(folder.glob("*.parquet"))
    if not paths:
        unfinished = next(folder.glob(f"*{UNFINISHED}"), None)
        found = f"; {unfinished.name} was left by a command that did not finish" if unfinished else ""
        raise UserError(f"{folder} holds no shards{found}. `avd data encode` makes a data set; see docs/data.md.")
    sets = set()
    for path in paths:
        match = _SHARD_NAME.fullmatch(path.name)
        if match is None:
            raise UserError(f"{path} is not named as a shard (data-00000-of-00004.parquet). Move it elsewhere.")
        sets.add((match["name"], int(match["count"])))
    if len(sets) > 1:
        listed = ", ".join(f"{name}-*-of-{count:05d}" for name, count in sorted(sets))
        raise UserError(f"{folder} holds shards of several data sets ({listed}). Give each a folder of its own.")
    name, count = sets.pop()
    for index in range(count):
        path = folder / f"{name}-{index:05d}-of-{count:05d}.parquet"
        if path not in paths:
            raise UserError(f"{path} is missing. {REMEDY}")
    return paths


def _open_shard(path: Path) -> _Shard:
    """Validate a shard by its footer and its column of shapes."""
    with _readable(path), pq.ParquetFile(path, memory_map=True, pre_buffer=False) as file:
        footer, schema = file.metadata, file.schema_arrow
        metadata = read_schema(path, schema)
        if footer.num_rows == 0:
            raise UserError(f"{path} holds no rows. {REMEDY}")
        shapes = file.read(columns=["shape"], use_threads=False).column("shape")
        starts = np.cumsum([0, *(footer.row_group(group).num_rows for group in range(footer.num_row_groups - 1))])
        return _Shard(
            path=path,
            rows=footer.num_rows,
            bytes=path.stat().st_size,
            layout=Layout(_only_shape(path, shapes), *metadata),
            group_starts=starts.tolist(),
        )


def _only_shape(path: Path, shapes: pa.ChunkedArray) -> tuple[int, int, int, int] | None:
    """The shape that all rows of a shard have; None if none has a latent."""
    values = shapes.to_pylist()
    for row, shape in enumerate(values):
        if shape != values[0]:
            raise UserError(
                f"{path}: row 0 has {describe_shape(values[0])}, row {row} has {describe_shape(shape)}; all rows of "
                f"a data set must have the same shape. {REMEDY}"
            )
    shape = values[0]
    if shape is None:
        return None
    if len(shape) != 4 or None in shape or min(shape) < 1:
        raise UserError(f"{path}: latents must have a shape [C, F, H, W], got {shape}. {REMEDY}")
    channels, frames, height, width = shape
    return channels, frames, height, width


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    try:
        yield
    except UserError:
        raise
    except (OSError, pa.ArrowException) as error:
        raise UserError(f"{path} cannot be read, it may be truncated or damaged: {error}. {REMEDY}") from error
