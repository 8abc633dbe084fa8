"""Training data on disk: a folder of Parquet shards, each row a latent, its text embedding and its caption.

The schema is described in ``docs/data.md``. Rows are raw bytes without compression in small row groups, so that any row
can be read from a memory-mapped file without reading its neighbours.
"""

from __future__ import annotations

import math
import os
import re
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.utils.data import Dataset

from avd_trainer.runtime.errors import UserError

SCHEMA_VERSION = 1
SCHEMA = pa.schema(
    [
        pa.field("latent", pa.large_binary()),
        pa.field("shape", pa.list_(pa.int32())),
        pa.field("dtype", pa.string()),
        pa.field("text_embedding", pa.large_binary(), nullable=False),
        pa.field("text_dtype", pa.string(), nullable=False),
        pa.field("text_tokens", pa.int32(), nullable=False),
        pa.field("caption", pa.string(), nullable=False),
        pa.field("source", pa.string(), nullable=False),
    ]
)
UNCONDITIONAL = "unconditional.safetensors"

# A row group is read as a whole, so a larger one would cost more per random read; a smaller one, a larger footer.
ROW_GROUP_BYTES = 2**20

_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
_DTYPE_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
_SHARD_NAME = re.compile(r"(?P<name>.+)-(?P<index>\d{5})-of-(?P<count>\d{5})\.parquet")
_TEMPORARY = ".unfinished"
_REMEDY = "Copy it again from where it came, or make the data set again."


class Example(NamedTuple):
    """One row of a data set.

    Attributes:
        latent: ``[C, F, H, W]`` float32, or None in a data set of prompts.
        text: ``[L, D]`` float32, zeros behind the caption's tokens.
        caption: What the embedding says.
        source: Where the row came from, for example a file's name.
    """

    latent: Tensor | None
    text: Tensor
    caption: str
    source: str


@dataclass(frozen=True)
class _Shard:
    path: Path
    rows: int
    bytes: int
    text_length: int
    text_dim: int
    latent_shape: tuple[int, ...] | None
    group_starts: Sequence[int]


class ShardDataset(Dataset[Example]):
    """A data set of shards, read at random through memory maps.

    Map-style: ``len(dataset)`` rows, ``dataset[i]`` is a :class:`Example`. Files are opened in the process that reads
    them, so it works in the workers of a ``DataLoader``, forked or spawned.

    Args:
        folder: Holds the shards, and no other Parquet files.

    Attributes:
        latent_shape: ``(C, F, H, W)``, or None in a data set of prompts.
        text_length: L, the tokens of a text embedding after padding.
        text_dim: D, the width of a token.

    Raises:
        UserError: If a shard is missing, truncated, empty, of a foreign schema or another version, or if shards
            disagree in the shape of their latents or text embeddings. The message names the file.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._shards = [_open_shard(path) for path in _shard_paths(folder)]
        first = self._shards[0]
        for shard in self._shards[1:]:
            _check_same(first, shard)
        self.latent_shape, self.text_length, self.text_dim = first.latent_shape, first.text_length, first.text_dim
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
        return self._decode(self._read(shard, row), f"{shard.path}, row {row}")

    @property
    def has_latents(self) -> bool:
        """Whether there are latents, or prompts alone."""
        return self.latent_shape is not None

    @property
    def has_unconditional(self) -> bool:
        """Whether the data set has an unconditional text embedding."""
        return (self.folder / UNCONDITIONAL).is_file()

    def unconditional(self) -> Tensor:
        """The text embedding of classifier-free guidance's unconditional prediction, ``[L, D]`` float32.

        Raises:
            UserError: If the data set has none, or its file cannot be read.
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

    def fingerprint(self) -> list[dict[str, Any]]:
        """File name, rows and bytes of each shard: what a resumed run compares. JSON-able."""
        return [{"file": shard.path.name, "rows": shard.rows, "bytes": shard.bytes} for shard in self._shards]

    def check_fingerprint(self, saved: Sequence[Mapping[str, Any]]) -> None:
        """Compare with the :meth:`fingerprint` of an earlier run.

        Raises:
            UserError: If a shard is missing, new or changed; the message names it.
        """
        before, now = ({entry["file"]: dict(entry) for entry in entries} for entries in (saved, self.fingerprint()))
        for name in sorted(before.keys() | now.keys()):
            if name not in now:
                raise UserError(f"{self.folder / name} is missing: the run to be resumed read it. Put it back.")
            if name not in before:
                raise UserError(
                    f"{self.folder / name} is not of the data that the run to be resumed read. Remove it, or start "
                    "a new run."
                )
            if before[name] != now[name]:
                raise UserError(
                    f"{self.folder / name} has changed since the run to be resumed read it: it had "
                    f"{before[name]['rows']} rows in {before[name]['bytes']} bytes, now {now[name]['rows']} rows in "
                    f"{now[name]['bytes']} bytes. Put the old file back, or start a new run."
                )

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
            table = self._file(shard.path).read_row_group(group, use_threads=False)
        return {name: table.column(name)[row - shard.group_starts[group]] for name in SCHEMA.names}

    def _decode(self, values: dict[str, Any], where: str) -> Example:
        tokens = values["text_tokens"].as_py()
        if not 0 <= tokens <= self.text_length:
            raise UserError(f"{where}: expected 0 to {self.text_length} text tokens, got {tokens}. {_REMEDY}")
        text = torch.zeros(self.text_length, self.text_dim)
        text[:tokens] = _to_tensor(
            values["text_embedding"], values["text_dtype"], (tokens, self.text_dim), f"{where}: text_embedding"
        )
        latent = None
        if self.latent_shape is not None:
            latent = _to_tensor(values["latent"], values["dtype"], self.latent_shape, f"{where}: latent")
        return Example(latent, text, values["caption"].as_py(), values["source"].as_py())

    def _read_unconditional(self) -> tuple[Tensor, str]:
        path = self.folder / UNCONDITIONAL
        if not path.is_file():
            raise UserError(
                f"{path} is missing: classifier-free guidance needs the text embedding of its unconditional "
                "prediction. `avd data encode-prompts` writes one with the prompts; copy it here from a data set that "
                "was made with the same model."
            )
        try:
            with safe_open(path, framework="pt") as file:
                text, metadata = file.get_tensor("text_embedding"), file.metadata() or {}
        except (OSError, SafetensorError) as error:
            raise UserError(f"{path} cannot be read: {error}. {_REMEDY}") from error
        if text.ndim != 2 or text.shape[0] > self.text_length or text.shape[1] != self.text_dim:
            raise UserError(
                f"{path} holds a text embedding of shape {list(text.shape)}, the data set has at most "
                f"{self.text_length} tokens of width {self.text_dim}. Take one that was made with the same model."
            )
        padded = torch.zeros(self.text_length, self.text_dim)
        padded[: len(text)] = text
        return padded, metadata.get("prompt", "")


class ShardWriter:
    """Writes a data set; a context manager.

    Shards are written under temporary names and renamed on leaving: only then is their number known, and what was left
    by an error or a killed process is never taken for a data set.

    Args:
        folder: Made if need be; must hold no Parquet files yet.
        text_length: L, the most tokens that a text embedding may have.
        text_dim: D, the width of a token.
        rows_per_shard: 256 latents of Wan2.1 at 832 x 480 x 81 are about 1.3 GB in float16.
        name: The first part of the shards' names.

    Raises:
        UserError: If the folder holds Parquet files, cannot be written or the disk is full, or if no row was added.
    """

    def __init__(
        self, folder: Path, *, text_length: int, text_dim: int, rows_per_shard: int = 256, name: str = "data"
    ) -> None:
        if text_length < 1 or text_dim < 1 or rows_per_shard < 1:
            raise ValueError(
                f"ShardWriter needs text_length, text_dim and rows_per_shard >= 1, got {text_length}, {text_dim} and "
                f"{rows_per_shard}."
            )
        self.folder, self.name, self.rows_per_shard = folder, name, rows_per_shard
        self.text_length, self.text_dim = text_length, text_dim
        self.rows = 0
        self._schema = SCHEMA.with_metadata(
            {"avd_schema_version": str(SCHEMA_VERSION), "text_length": str(text_length), "text_dim": str(text_dim)}
        )
        self._latent_shape: tuple[int, ...] | None = None
        self._unconditional: tuple[Tensor, str] | None = None
        self._group: list[dict[str, Any]] = []
        self._writer: pq.ParquetWriter | None = None
        self._files: list[Path] = []

    def __enter__(self) -> Self:
        with _writable(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
            if found := next(self.folder.glob("*.parquet"), None):
                raise UserError(f"{self.folder} holds shards already ({found.name}). Choose a new folder.")
            for left in self.folder.glob(f"*{_TEMPORARY}"):
                left.unlink()
        return self

    def add(self, latent: Tensor | None, text: Tensor, caption: str, source: str) -> None:
        """Add a row.

        Args:
            latent: ``[C, F, H, W]`` float32, float16 or bfloat16, stored so; of one shape for all rows. None for a
                prompt.
            text: ``[l, D]`` of the same dtypes, with ``l <= L``: only the tokens in use. Stored in bfloat16 where that
                loses nothing, as for an encoder that computes in it.
            caption: What ``text`` embeds.
            source: Where the row comes from.

        Raises:
            UserError: If the latent has another shape than those before, or the disk is full.
            ValueError: If a tensor has another rank, width or dtype.
        """
        text = self._checked_text(text)
        shape = None if latent is None else tuple(latent.shape)
        if latent is not None and (latent.ndim != 4 or latent.dtype not in _DTYPE_NAMES):
            raise ValueError(
                f"A latent must be [C, F, H, W] in {', '.join(_DTYPES)}, got {list(latent.shape)} in {latent.dtype}."
            )
        if self.rows == 0:
            self._latent_shape = shape
        elif shape != self._latent_shape:
            raise UserError(
                f"{source}: all rows of a data set have the same latent shape; those before have "
                f"{_describe(self._latent_shape)}, this one has {_describe(shape)}. Write it to a data set of its own."
            )
        self._group.append(
            {
                "latent": None if latent is None else _to_bytes(latent),
                "shape": shape,
                "dtype": None if latent is None else _DTYPE_NAMES[latent.dtype],
                "text_embedding": _to_bytes(text),
                "text_dtype": _DTYPE_NAMES[text.dtype],
                "text_tokens": len(text),
                "caption": caption,
                "source": source,
            }
        )
        self.rows += 1
        ends_shard = self.rows % self.rows_per_shard == 0
        if ends_shard or sum(map(_row_bytes, self._group)) >= ROW_GROUP_BYTES:
            self._write_group()
        if ends_shard:
            self._end_shard()

    def set_unconditional(self, text: Tensor, prompt: str) -> None:
        """Set the text embedding ``[l, D]`` of classifier-free guidance's unconditional prediction, and its prompt."""
        self._unconditional = self._checked_text(text).contiguous(), prompt

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                self._publish()
        except BaseException:
            self._discard()
            raise
        if kind is not None:
            self._discard()

    def _checked_text(self, text: Tensor) -> Tensor:
        if (
            text.ndim != 2
            or len(text) > self.text_length
            or text.shape[1] != self.text_dim
            or text.dtype not in _DTYPE_NAMES
        ):
            raise ValueError(
                f"A text embedding must be [l <= {self.text_length}, {self.text_dim}] in {', '.join(_DTYPES)}, got "
                f"{list(text.shape)} in {text.dtype}."
            )
        text = text.detach().cpu()
        narrow = text.bfloat16()
        return narrow if torch.equal(narrow.float(), text.float()) else text

    def _write_group(self) -> None:
        if not self._group:
            return
        with _writable(self.folder):
            if self._writer is None:
                self._files.append(self.folder / f"{self.name}-{len(self._files):05d}{_TEMPORARY}")
                self._writer = pq.ParquetWriter(
                    self._files[-1],
                    self._schema,
                    compression="none",
                    use_dictionary=False,
                    write_statistics=False,
                    write_page_checksum=True,
                )
            self._writer.write_batch(pa.RecordBatch.from_pylist(self._group, schema=self._schema))
        self._group = []

    def _end_shard(self) -> None:
        if self._writer is not None:
            with _writable(self.folder):
                self._writer.close()
            self._writer = None

    def _publish(self) -> None:
        self._write_group()
        self._end_shard()
        if not self._files:
            raise UserError(f"{self.folder}: there was nothing to write.")
        shards = len(self._files)
        finals = [self.folder / f"{self.name}-{index:05d}-of-{shards:05d}.parquet" for index in range(shards)]
        with _writable(self.folder):
            if self._unconditional is not None:
                text, prompt = self._unconditional
                finals.insert(0, self.folder / UNCONDITIONAL)
                self._files.insert(0, self.folder / f"{UNCONDITIONAL}{_TEMPORARY}")
                save_file({"text_embedding": text}, self._files[0], metadata={"prompt": prompt})
            for index, final in enumerate(finals):
                self._files[index] = self._files[index].rename(final)

    def _discard(self) -> None:
        if self._writer is not None:
            with suppress(OSError):  # the disk that was full still is
                self._writer.close()
        for path in self._files:
            path.unlink(missing_ok=True)


def _shard_paths(folder: Path) -> list[Path]:
    """The shards of a folder in order, all there."""
    if not folder.is_dir():
        raise UserError(f"{folder} is not a folder. Pass the folder that holds the shards of a data set.")
    paths = sorted(folder.glob("*.parquet"))
    if not paths:
        unfinished = next(folder.glob(f"*{_TEMPORARY}"), None)
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
            raise UserError(f"{path} is missing. {_REMEDY}")
    return paths


def _open_shard(path: Path) -> _Shard:
    """Validate a shard by its footer and its column of shapes."""
    with _readable(path), pq.ParquetFile(path, memory_map=True, pre_buffer=False) as file:
        footer, schema = file.metadata, file.schema_arrow
        length, dim = _check_schema(path, schema)
        if footer.num_rows == 0:
            raise UserError(f"{path} holds no rows. {_REMEDY}")
        shapes = file.read(columns=["shape"], use_threads=False).column("shape")
        starts = np.cumsum([0, *(footer.row_group(group).num_rows for group in range(footer.num_row_groups - 1))])
        return _Shard(
            path=path,
            rows=footer.num_rows,
            bytes=path.stat().st_size,
            text_length=length,
            text_dim=dim,
            latent_shape=_only_shape(path, shapes),
            group_starts=starts.tolist(),
        )


def _check_schema(path: Path, schema: pa.Schema) -> tuple[int, int]:
    """L and D of a shard."""
    metadata = {key.decode(errors="replace"): value for key, value in (schema.metadata or {}).items()}
    try:
        version, length, dim = (int(metadata[key]) for key in ("avd_schema_version", "text_length", "text_dim"))
    except (KeyError, ValueError):
        raise UserError(
            f"{path} is a Parquet file, but no shard of training data: its metadata lacks avd_schema_version, "
            "text_length or text_dim. Move it elsewhere; docs/data.md says how to make shards."
        ) from None
    if version != SCHEMA_VERSION:
        raise UserError(
            f"{path} has version {version} of the schema, this release reads version {SCHEMA_VERSION}. Install the "
            "release that wrote it, or make the data set again."
        )
    for field in SCHEMA:
        found = schema.field(field.name) if field.name in schema.names else None
        if found is None or found.type != field.type or found.nullable > field.nullable:
            raise UserError(f"{path}: expected a column {field}, found {found}. {_REMEDY}")
    return length, dim


def _only_shape(path: Path, shapes: pa.ChunkedArray) -> tuple[int, ...] | None:
    """The shape that all rows of a shard have; None if none has a latent."""
    values = shapes.to_pylist()
    for row, shape in enumerate(values):
        if shape != values[0]:
            raise UserError(
                f"{path}: row 0 has {_describe(values[0])}, row {row} has {_describe(shape)}; all rows of a data set "
                f"must have the same shape. {_REMEDY}"
            )
    shape = values[0]
    if shape is None:
        return None
    if len(shape) != 4 or None in shape or min(shape) < 1:
        raise UserError(f"{path}: latents must have a shape [C, F, H, W], got {shape}. {_REMEDY}")
    return tuple(shape)


def _check_same(first: _Shard, other: _Shard) -> None:
    if other.latent_shape != first.latent_shape:
        raise UserError(
            f"{other.path} has {_describe(other.latent_shape)}, {first.path.name} has "
            f"{_describe(first.latent_shape)}. Give each shape a data set of its own."
        )
    if (other.text_length, other.text_dim) != (first.text_length, first.text_dim):
        raise UserError(
            f"{other.path} has text embeddings of {other.text_length} tokens x {other.text_dim}, {first.path.name} of "
            f"{first.text_length} x {first.text_dim}. Make the whole data set with one text encoder."
        )


def _describe(shape: Sequence[int] | None) -> str:
    return "no latents" if shape is None else f"latents of shape {list(shape)}"


def _row_bytes(row: Mapping[str, Any]) -> int:
    return len(row["latent"] or b"") + len(row["text_embedding"])


def _to_bytes(tensor: Tensor) -> bytes:
    return tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()


def _to_tensor(data: pa.Scalar, dtype_name: pa.Scalar, shape: Sequence[int], where: str) -> Tensor:
    """Raw bytes to float32, with an error that names the place where they do not fit."""
    dtype = _DTYPES.get(dtype_name.as_py())
    if dtype is None:
        raise UserError(f"{where} has dtype {dtype_name.as_py()!r}, known are {', '.join(_DTYPES)}. {_REMEDY}")
    buffer = data.as_buffer() if data.is_valid else b""
    expected, found = math.prod(shape) * dtype.itemsize, len(memoryview(buffer))
    if found != expected:
        raise UserError(f"{where} has {found} bytes, {dtype_name} of shape {list(shape)} takes {expected}. {_REMEDY}")
    if expected == 0:
        return torch.zeros(*shape)
    # A copy, since the buffer is Arrow's and read-only.
    return torch.frombuffer(bytearray(buffer), dtype=dtype).reshape(*shape).float()


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    try:
        yield
    except UserError:
        raise
    except (OSError, pa.ArrowException) as error:
        raise UserError(f"{path} cannot be read, it may be truncated or damaged: {error}. {_REMEDY}") from error


@contextmanager
def _writable(folder: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"{folder} cannot be written: {error}. Free some space there, or choose another folder."
        ) from error
