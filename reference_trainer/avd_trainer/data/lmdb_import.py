"""Importer for the LMDB data of CausVid, Self-Forcing and the released AVD code."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from avd_trainer.data.encode import TextEncoder
from avd_trainer.data.shards import ShardWriter
from avd_trainer.runtime.errors import UserError

logger = logging.getLogger(__name__)

# Captions that are embedded at once.
BATCH = 8

_DATA_FILE = "data.mdb"


def import_lmdb(
    path: Path,
    output: Path,
    *,
    text: TextEncoder,
    negative_prompt: str,
    width: int | None = None,
    on_row: Callable[[], None] = lambda: None,
) -> int:
    """Turn an LMDB of captioned latents into shards.

    Row ``i`` is ``latents_{i}_data`` (raw float16 of shape ``[F, C, H, W]``, or ``[S, F, C, H, W]`` for an ODE
    trajectory from noise to clean, of which the last state is taken) with ``prompts_{i}_data`` (UTF-8);
    ``latents_shape`` holds the number of rows and their shape. The latents are normalised as those of this package.
    A row that is not finite is logged and left out.

    Args:
        path: An LMDB (a folder with ``data.mdb``, or a file), or a folder of such: the sharded form.
        output: Folder of the new data set.
        text: Embeds the captions.
        negative_prompt: Embedded for the unconditional prediction of classifier-free guidance.
        width: Latent columns to keep, from the left; None keeps all. The released AVD code stores 106 (848 pixels) and
            trains on the first 104.
        on_row: Called after each row.

    Returns:
        Rows that were written.

    Raises:
        UserError: If the package lmdb is not installed, or the LMDB is missing, truncated, of another layout, or lacks
            a row.
    """
    with _opened(path) as parts, ShardWriter(output, text_length=text.length, text_dim=text.dim) as writer:
        writer.set_unconditional(text([negative_prompt])[0], negative_prompt)
        for part in parts:
            for start in range(0, part.rows, BATCH):
                rows = range(start, min(part.rows, start + BATCH))
                captions = [part.caption(row) for row in rows]
                for row, caption, embedding in zip(rows, captions, text(captions), strict=True):
                    latent = part.latent(row)[..., :width]
                    if latent.isfinite().all():
                        writer.add(latent, embedding, caption, f"{part.path.name}/{row}")
                    else:
                        logger.warning("Left out row %d of %s: its latent is not finite.", row, part.path)
                    on_row()
        return writer.rows


def count_rows(path: Path) -> int:
    """Rows of an LMDB, sharded or not.

    Raises:
        UserError: As :func:`import_lmdb`.
    """
    with _opened(path) as parts:
        return sum(part.rows for part in parts)


@dataclass(frozen=True)
class _Part:
    """One open LMDB."""

    path: Path
    transaction: Any
    rows: int
    shape: tuple[int, ...]

    def caption(self, row: int) -> str:
        return bytes(_get(self.path, self.transaction, f"prompts_{row}_data")).decode(errors="replace")

    def latent(self, row: int) -> Tensor:
        """``[C, F, H, W]`` float16."""
        key = f"latents_{row}_data"
        data = _get(self.path, self.transaction, key)
        if len(data) != 2 * math.prod(self.shape):
            raise UserError(
                f"{self.path}: {key} has {len(data)} bytes, float16 of shape {list(self.shape)} takes "
                f"{2 * math.prod(self.shape)}. Was it written with latents of another shape, or in another precision?"
            )
        latent = torch.from_numpy(np.frombuffer(data, dtype="<f2").reshape(self.shape).copy())
        clean = latent[-1] if latent.ndim == 5 else latent
        return clean.transpose(0, 1)


@contextmanager
def _opened(path: Path) -> Iterator[list[_Part]]:
    try:
        import lmdb
    except ImportError as error:
        raise UserError('Reading LMDB needs the package lmdb: pip install "avd-core[lmdb]".') from error
    with ExitStack() as stack:
        parts = []
        try:
            for folder in _databases(path):
                environment = stack.enter_context(
                    lmdb.open(
                        str(folder), subdir=folder.is_dir(), readonly=True, lock=False, readahead=False, meminit=False
                    )
                )
                _check_size(folder, environment)
                transaction = stack.enter_context(environment.begin(buffers=True))
                parts.append(_Part(folder, transaction, *_read_shape(folder, transaction)))
            yield parts
        except lmdb.Error as error:
            raise UserError(
                f"{path} cannot be read as LMDB, it may be damaged: {error}. Copy it again from where it came."
            ) from error


def _databases(path: Path) -> list[Path]:
    """The LMDB itself, or those in a folder."""
    if path.is_file() or (path / _DATA_FILE).is_file():
        return [path]
    found = sorted(file.parent for file in path.glob(f"*/{_DATA_FILE}"))
    if not found:
        raise UserError(
            f"{path} is no LMDB: expected a folder with {_DATA_FILE}, or with sub-folders that have one each. Check "
            "the path."
        )
    return found


def _check_size(path: Path, environment: Any) -> None:
    """Refuse a truncated file: reading behind its end through the memory map would kill the process."""
    file = path / _DATA_FILE if path.is_dir() else path
    expected = (environment.info()["last_pgno"] + 1) * environment.stat()["psize"]
    if file.stat().st_size < expected:
        raise UserError(
            f"{file} is truncated: it should have at least {expected} bytes and has {file.stat().st_size}. Copy it "
            "again from where it came."
        )


def _read_shape(path: Path, transaction: Any) -> tuple[int, tuple[int, ...]]:
    """Number of rows, and the shape of a row."""
    stored = bytes(_get(path, transaction, "latents_shape")).decode(errors="replace")
    numbers = stored.split()
    if len(numbers) not in (5, 6) or not all(number.isdecimal() for number in numbers) or "0" in numbers[1:]:
        raise UserError(
            f"{path}: latents_shape should be 'N F C H W' or 'N S F C H W', got {stored!r}. The script that wrote this "
            "LMDB stores the shape of the last file it read, which is wrong where that held nothing new. Write the "
            "right shape under that key."
        )
    rows, *shape = map(int, numbers)
    return rows, tuple(shape)


def _get(path: Path, transaction: Any, key: str) -> Any:
    data = transaction.get(key.encode())
    if data is None:
        raise UserError(
            f"{path} has no key {key}. Expected the keys latents_shape, latents_0_data, prompts_0_data, ... of CausVid "
            "and Self-Forcing; was the script that wrote it interrupted?"
        )
    return data
