"""Writing a data set shard by shard."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from avd_trainer.data.schema import (
    DTYPE_NAMES,
    DTYPES,
    PROVENANCE,
    UNCONDITIONAL,
    UNFINISHED,
    Encoding,
    ImageTokens,
    describe_shape,
    schema_with,
    to_bytes,
)
from avd_trainer.runtime.errors import UserError

ROW_GROUP_BYTES = 2**20
"""A row group is read as a whole, so a larger one would cost more per random read; a smaller one, a larger footer."""


class NewShards:
    """Files of a new data set. They have temporary names until :meth:`publish`, since only then their number is known;
    so what an error or a killed process leaves is never taken for a data set.

    Args:
        folder: Made if need be; must hold no Parquet files yet.
        name: The first part of the shards' names.

    Raises:
        UserError: If the folder holds Parquet files or cannot be written.
    """

    def __init__(self, folder: Path, name: str = "data") -> None:
        self.folder, self.name = folder, name
        self._files: list[Path] = []
        self._unconditional: list[Path] = []
        with writable(folder):
            folder.mkdir(parents=True, exist_ok=True)
            expect_no_shards(folder)
            for left in folder.glob(f"*{UNFINISHED}"):
                if left.is_file():
                    left.unlink()

    def next_shard(self) -> Path:
        """Where the next shard is to be written."""
        self._files.append(self.folder / f"{self.name}-{len(self._files):05d}{UNFINISHED}")
        return self._files[-1]

    def unconditional(self) -> Path:
        """Where the unconditional text embedding is to be written, if there is one."""
        self._unconditional = [self.folder / f"{UNCONDITIONAL}{UNFINISHED}"]
        return self._unconditional[0]

    def publish(self) -> None:
        """Give all files their names.

        Raises:
            UserError: If there is no shard, or the folder cannot be written.
        """
        if not self._files:
            raise UserError(f"{self.folder}: there was nothing to write.")
        shards = len(self._files)
        finals = [self.folder / f"{self.name}-{index:05d}-of-{shards:05d}.parquet" for index in range(shards)]
        with writable(self.folder):
            for files, names in ((self._unconditional, [self.folder / UNCONDITIONAL]), (self._files, finals)):
                for index, file in enumerate(files):
                    files[index] = file.rename(names[index])

    def discard(self) -> None:
        """Remove all files."""
        for path in (*self._unconditional, *self._files):
            path.unlink(missing_ok=True)


class ShardWriter:
    """Writes a data set; a context manager. The shards are there when the context ends; see :class:`NewShards`.

    Args:
        folder: Made if need be; must hold no Parquet files yet.
        text_length: L, the most tokens that a text embedding may have.
        text_dim: D, the width of a token.
        encoding: How clips became latents, which later steps use; None for prompts, or if it is not known.
        image: Size of the image embedding, if rows are for image to video.
        provenance: Whether each row says of which file it was made, and how.
        rows_per_shard: 256 latents of Wan2.1 at 832 x 480 x 81 are about 1.3 GB in float16.
        name: The first part of the shards' names.

    Raises:
        UserError: If the folder holds Parquet files, cannot be written or the disk is full, or if no row was added.
    """

    def __init__(
        self,
        folder: Path,
        *,
        text_length: int,
        text_dim: int,
        encoding: Encoding | None = None,
        image: ImageTokens | None = None,
        provenance: bool = False,
        rows_per_shard: int = 256,
        name: str = "data",
    ) -> None:
        if text_length < 1 or text_dim < 1 or rows_per_shard < 1:
            raise ValueError(
                f"ShardWriter needs text_length, text_dim and rows_per_shard >= 1, got {text_length}, {text_dim} and "
                f"{rows_per_shard}."
            )
        self.folder, self.name, self.rows_per_shard = folder, name, rows_per_shard
        self.text_length, self.text_dim = text_length, text_dim
        self.image = image
        self.rows = 0
        self._provenance = provenance
        self._schema = schema_with(text_length, text_dim, encoding, image, provenance=provenance)
        self._latent_shape: tuple[int, ...] | None = None
        self._unconditional: tuple[Tensor, str] | None = None
        self._group: list[dict[str, Any]] = []
        self._writer: pq.ParquetWriter | None = None

    def __enter__(self) -> Self:
        self._shards = NewShards(self.folder, self.name)
        return self

    def add(
        self,
        latent: Tensor | None,
        text: Tensor,
        caption: str,
        source: str,
        *,
        image_latent: Tensor | None = None,
        image_embedding: Tensor | None = None,
        provenance: str | None = None,
    ) -> None:
        """Add a row.

        Args:
            latent: ``[C, F, H, W]`` float32, float16 or bfloat16, stored so; of one shape for all rows. None for a
                prompt.
            text: ``[l, D]`` of the same dtypes, with ``l <= L``: only the tokens in use. Stored in bfloat16 where that
                loses nothing, as for an encoder that computes in it.
            caption: What ``text`` embeds.
            source: Where the row comes from.
            image_latent: Of shape and dtype of ``latent``: the first frame followed by grey, encoded; where ``image``
                was given, and only there.
            image_embedding: ``[T, D_i]`` of that dtype: the first frame's tokens; where ``image`` has tokens.
            provenance: JSON that says it in full; where the writer was told so, and only there.

        Raises:
            UserError: If the latent has another shape than those before, or the disk is full.
            ValueError: If a tensor has another rank, width or dtype.
        """
        text = self._checked_text(text)
        image = self._checked_image(latent, image_latent, image_embedding)
        if (provenance is not None) != self._provenance:
            raise ValueError("Either all rows of a data set have a provenance, or none; the writer is told before.")
        shape = None if latent is None else tuple(latent.shape)
        if latent is not None and (latent.ndim != 4 or latent.dtype not in DTYPE_NAMES):
            raise ValueError(
                f"A latent must be [C, F, H, W] in {', '.join(DTYPES)}, got {list(latent.shape)} in {latent.dtype}."
            )
        if self.rows == 0:
            self._latent_shape = shape
        elif shape != self._latent_shape:
            raise UserError(
                f"{source}: all rows of a data set have the same latent shape; those before have "
                f"{describe_shape(self._latent_shape)}, this one has {describe_shape(shape)}. Write it to a "
                "data set of its own."
            )
        self._group.append(
            {
                "latent": None if latent is None else to_bytes(latent),
                "shape": shape,
                "dtype": None if latent is None else DTYPE_NAMES[latent.dtype],
                "text_embedding": to_bytes(text),
                "text_dtype": DTYPE_NAMES[text.dtype],
                "text_tokens": len(text),
                "caption": caption,
                "source": source,
                **{name: to_bytes(value) for name, value in image.items()},
                **({} if provenance is None else {PROVENANCE: provenance}),
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
            or text.dtype not in DTYPE_NAMES
        ):
            raise ValueError(
                f"A text embedding must be [l <= {self.text_length}, {self.text_dim}] in {', '.join(DTYPES)}, got "
                f"{list(text.shape)} in {text.dtype}."
            )
        text = text.detach().cpu()
        narrow = text.bfloat16()
        return narrow if torch.equal(narrow.float(), text.float()) else text

    def _checked_image(
        self, latent: Tensor | None, image_latent: Tensor | None, image_embedding: Tensor | None
    ) -> dict[str, Tensor]:
        """What a row holds of its first frame, by column."""
        wanted: dict[str, tuple[int, ...]] = {}
        if self.image is not None and latent is not None:
            wanted["image_latent"] = tuple(latent.shape)
            if self.image.tokens:
                wanted["image_embedding"] = self.image
        given = {"image_latent": image_latent, "image_embedding": image_embedding}
        found = {name: value for name, value in given.items() if value is not None}
        shapes = {name: tuple(value.shape) for name, value in found.items()}
        if shapes != wanted or any(latent is None or value.dtype != latent.dtype for value in found.values()):
            raise ValueError(
                f"A row's image must be {wanted or 'left out'} in the latent's dtype, got "
                f"{ {name: (list(value.shape), value.dtype) for name, value in found.items()} }."
            )
        return found

    def _write_group(self) -> None:
        if not self._group:
            return
        with writable(self.folder):
            if self._writer is None:
                self._writer = open_shard(self._shards.next_shard(), self._schema)
            self._writer.write_batch(pa.RecordBatch.from_pylist(self._group, schema=self._schema))
        self._group = []

    def _end_shard(self) -> None:
        if self._writer is not None:
            with writable(self.folder):
                self._writer.close()
            self._writer = None

    def _publish(self) -> None:
        self._write_group()
        self._end_shard()
        if self._unconditional is not None:
            text, prompt = self._unconditional
            with writable(self.folder):
                save_file({"text_embedding": text}, self._shards.unconditional(), metadata={"prompt": prompt})
        self._shards.publish()

    def _discard(self) -> None:
        if self._writer is not None:
            with suppress(OSError):  # the disk that was full still is
                self._writer.close()
        self._shards.discard()


def open_shard(path: Path, schema: pa.Schema) -> pq.ParquetWriter:
    """A writer of one shard, whose rows can be read at random."""
    return pq.ParquetWriter(
        path, schema, compression="none", use_dictionary=False, write_statistics=False, write_page_checksum=True
    )


def expect_no_shards(folder: Path) -> None:
    """Raise a :class:`UserError` if a folder is not free for a new data set; also before models are loaded for it."""
    if found := next(folder.glob("*.parquet"), None):
        raise UserError(f"{folder} holds shards already ({found.name}). Choose a new folder.")


def _row_bytes(row: Mapping[str, Any]) -> int:
    return sum(len(value) for value in row.values() if isinstance(value, bytes))


@contextmanager
def writable(folder: Path) -> Iterator[None]:
    """Within it, errors of the disk say what to do.

    Raises:
        UserError: In place of them.
    """
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"{folder} cannot be written: {error}. Free some space there, or choose another folder."
        ) from error
