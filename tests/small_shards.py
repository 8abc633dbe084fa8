"""Data sets of a few rows, whose content is known from the row's number."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from avd_trainer.data.schema import Encoding
from avd_trainer.data.shard_writing import ShardWriter

SHAPE = (2, 3, 4, 4)
LENGTH, DIM = 5, 3


def latent_of(row: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(row)).to(dtype)


def text_of(row: int) -> Tensor:
    return torch.randn(row % (LENGTH + 1), DIM, generator=torch.Generator().manual_seed(1000 + row))


def writer_of(folder: Path, rows_per_shard: int = 3, encoding: Encoding | None = None) -> ShardWriter:
    return ShardWriter(folder, text_length=LENGTH, text_dim=DIM, encoding=encoding, rows_per_shard=rows_per_shard)


def write(
    folder: Path,
    rows: int = 8,
    rows_per_shard: int = 3,
    dtype: torch.dtype | None = torch.float32,
    encoding: Encoding | None = None,
) -> Path:
    with writer_of(folder, rows_per_shard, encoding) as writer:
        for row in range(rows):
            latent = None if dtype is None else latent_of(row, dtype)
            writer.add(latent, text_of(row), f"caption {row}", f"file {row}")
    return folder


def rewrite(path: Path, change: Callable[[list[dict[str, Any]]], None], schema: pa.Schema | None = None) -> None:
    """Put a shard in another's place, as a program that knows less would write it."""
    schema = pq.read_schema(path) if schema is None else schema
    rows = pq.read_table(path).to_pylist()
    change(rows)
    columns = {name: [row.get(name) for row in rows] for name in schema.names}
    pq.write_table(pa.table(columns, schema=schema), path)
