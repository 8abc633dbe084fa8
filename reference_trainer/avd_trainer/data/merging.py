"""Several data sets as one: shards are linked or copied as they are, and no clip is in the new one twice."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from avd_trainer.data.schema import PROVENANCE, REMEDY, UNCONDITIONAL
from avd_trainer.data.shard_reading import ShardDataset
from avd_trainer.data.shard_writing import NewShards, open_shard, writable
from avd_trainer.runtime.errors import UserError


class Merged(NamedTuple):
    """What a merge came to.

    Attributes:
        rows: Of the new data set.
        twice: Rows that were left out because another one is of the same clip, each with both places.
        linked: Shards that are hard links, and take no room.
        copied: Shards that were copied: those on another disk, and those of which rows were left out.
    """

    rows: int
    twice: tuple[str, ...]
    linked: int
    copied: int


def merge(folders: Sequence[Path], output: Path, on_folder: Callable[[], None] = lambda: None) -> Merged:
    """Join data sets, in their order.

    Rows are of the same clip if their provenance names the same file, by its SHA-256, and the same span of it; without
    provenance, if their latents are the same; without latents, if their captions are. The first of them is kept.

    Args:
        folders: Of data sets of one latent shape, codec, frame rate, text encoder and image condition; two or more.
        output: Folder of the new data set.
        on_folder: Called after each folder.

    Raises:
        UserError: If they are not alike, one is damaged, or the output holds a data set or cannot be written. The
            message names the folders and what differs.
    """
    if len(folders) < 2:
        raise UserError("Name two data sets or more to join them.")
    _expect_alike(folders)
    shards = NewShards(output)
    try:
        merged = _merge(folders, shards, on_folder)
        shards.publish()
    except BaseException:
        shards.discard()
        raise
    return merged


def _expect_alike(folders: Sequence[Path]) -> None:
    every = ShardDataset(*folders)
    if every.has_unconditional:
        every.unconditional()  # says so where folders disagree
    first = ShardDataset(folders[0])
    for folder in folders[1:]:
        other = ShardDataset(folder)
        if other.image != first.image:
            known = ["nothing of first frames" if each.image is None else "first frames" for each in (first, other)]
            raise UserError(
                f"{folder} has {known[1]}, {folders[0]} has {known[0]}. What is joined needs one image condition: "
                "encode one of them again, with or without --image-condition."
            )


def _merge(folders: Sequence[Path], shards: NewShards, on_folder: Callable[[], None]) -> Merged:
    known: dict[str, str] = {}
    twice: list[str] = []
    rows = linked = copied = 0
    for folder in folders:
        for path in ShardDataset(folder).paths:
            keep = []
            for key, source in _rows(path):
                place = f"{source} ({folder})"
                keep.append(key not in known)
                if key in known:
                    twice.append(f"{place}, as {known[key]}")
                else:
                    known[key] = place
            rows += sum(keep)
            if all(keep):
                is_link = _link(path, shards.next_shard())
                linked, copied = linked + is_link, copied + (not is_link)
            elif any(keep):
                _copy_rows(path, shards.next_shard(), keep)
                copied += 1
        on_folder()
    unconditional = [folder / UNCONDITIONAL for folder in folders if (folder / UNCONDITIONAL).is_file()]
    if unconditional:
        _link(unconditional[0], shards.unconditional())
    return Merged(rows, tuple(twice), linked, copied)


def _rows(path: Path) -> Iterator[tuple[str, str]]:
    """Key and source of each row of a shard; large columns are read a row group at a time."""
    with _shard(path) as file:
        names = file.schema_arrow.names
        column = PROVENANCE if PROVENANCE in names else "latent"
        for group in range(file.num_row_groups):
            table = file.read_row_group(group, columns=[column, "caption", "source"], use_threads=False)
            columns = [table.column(name) for name in (column, "caption", "source")]
            for value, caption, source in zip(*columns, strict=True):
                yield _key(column, value, caption.as_py()), source.as_py()


def _key(column: str, value: pa.Scalar, caption: str) -> str:
    if not value.is_valid:
        return f"prompt {caption}"
    if column == PROVENANCE:
        of = json.loads(value.as_py())
        return f"clip {of['sha256']} {of['span']}"
    return f"latent {hashlib.sha256(value.as_buffer()).hexdigest()}"


def _link(path: Path, new: Path) -> bool:
    """Link a file, or copy it where that cannot be; whether it is a link."""
    try:
        os.link(path.resolve(), new)
    except OSError:  # another disk, or one that knows no links
        with writable(new.parent):
            shutil.copyfile(path, new)
        return False
    return True


def _copy_rows(path: Path, new: Path, keep: Sequence[bool]) -> None:
    """Write some rows of a shard, in the row groups that they had."""
    with _shard(path) as file, _new_shard(new, file.schema_arrow) as writer:
        start = 0
        for group in range(file.num_row_groups):
            table = file.read_row_group(group, use_threads=False)
            kept = table.filter(pa.array(keep[start : start + len(table)]))
            start += len(table)
            if len(kept):
                with writable(new.parent):
                    writer.write_table(kept)


@contextmanager
def _new_shard(path: Path, schema: pa.Schema) -> Iterator[pq.ParquetWriter]:
    with writable(path.parent):
        writer = open_shard(path, schema)
    try:
        yield writer
    except BaseException:
        with suppress(OSError):  # the disk that was full still is
            writer.close()
        raise
    with writable(path.parent):
        writer.close()


@contextmanager
def _shard(path: Path) -> Iterator[pq.ParquetFile]:
    try:
        with pq.ParquetFile(path, memory_map=True, pre_buffer=False, page_checksum_verification=True) as file:
            yield file
    except (OSError, pa.ArrowException) as error:
        raise UserError(f"{path} cannot be read, it may be truncated or damaged: {error}. {REMEDY}") from error
