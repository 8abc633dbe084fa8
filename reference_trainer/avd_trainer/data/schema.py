"""What a shard looks like inside: its columns, its metadata, and how tensors become bytes.

``docs/data.md`` describes it for those who write shards with other programs.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple, get_args

import pyarrow as pa
import torch
from torch import Tensor

from avd_trainer.models.codecs.latent_space import LATENT_SPACES, LatentSpace
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
IMAGE_COLUMNS = ("image_latent", "image_embedding")
"""Columns of shards for image to video, of type ``large_binary``: what was made of a clip's first frame, in the row's
``dtype``. Other readers can leave them alone, so they are no other version of the schema."""
PROVENANCE = "provenance"
"""Column of shards that were made from raw videos: for each row, JSON that says of which file and how. Other readers
can leave it alone, so it is no other version of the schema."""
UNCONDITIONAL = "unconditional.safetensors"
UNFINISHED = ".unfinished"
"""Ending of what a writer has not finished."""
REMEDY = "Copy it again from where it came, or make the data set again."

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


class Encoding(NamedTuple):
    """How clips became latents.

    Attributes:
        latent_space: Whose latents they are.
        codec: Folder or hub id of the pipeline whose VAE made them, where that is known and there is one.
        fps: Frames per second of the clips, where that is known.
    """

    latent_space: LatentSpace
    codec: str | None = None
    fps: float | None = None

    def __str__(self) -> str:
        codec = LATENT_SPACES[self.latent_space] + (f" of {self.codec}" if self.codec is not None else "")
        return codec + (f", {self.fps:g} frames per second" if self.fps is not None else "")


class ImageTokens(NamedTuple):
    """Size of an image embedding.

    Attributes:
        tokens: T; 0 where there are none, as for models that read image latents alone.
        dim: The width of a token; 0 where there are none.
    """

    tokens: int = 0
    dim: int = 0


class Layout(NamedTuple):
    """What all rows of a shard, and of all data that is read together, have in common.

    Attributes:
        latent_shape: ``(C, F, H, W)``, or None for prompts.
        text_length: L, the tokens of a text embedding after padding.
        text_dim: D, the width of a token.
        encoding: How clips became latents; None for prompts, and for shards that do not say.
        image: What was made of first frames besides latents of the latents' shape; None for shards without any.
    """

    latent_shape: tuple[int, int, int, int] | None
    text_length: int
    text_dim: int
    encoding: Encoding | None
    image: ImageTokens | None = None


def schema_with(
    text_length: int,
    text_dim: int,
    encoding: Encoding | None,
    image: ImageTokens | None = None,
    *,
    provenance: bool = False,
) -> pa.Schema:
    """The schema of a new shard; the shape of latents is a column of it."""
    schema = SCHEMA
    if image is not None:
        for name in IMAGE_COLUMNS if image.tokens else IMAGE_COLUMNS[:1]:
            schema = schema.append(pa.field(name, pa.large_binary(), nullable=False))
    if provenance:
        schema = schema.append(pa.field(PROVENANCE, pa.string(), nullable=False))
    values = {
        "avd_schema_version": SCHEMA_VERSION,
        "text_length": text_length,
        "text_dim": text_dim,
        **({} if encoding is None else encoding._asdict()),
        **({} if image is None else {"image_tokens": image.tokens, "image_dim": image.dim}),
    }
    return schema.with_metadata({key: str(value) for key, value in values.items() if value is not None})


def read_schema(path: Path, schema: pa.Schema) -> tuple[int, int, Encoding | None, ImageTokens | None]:
    """``text_length``, ``text_dim``, the encoding and the image of a shard, as :class:`Layout` has them.

    Raises:
        UserError: If it is no shard, of another version, or lacks a column.
    """
    stored = {key.decode(errors="replace"): value for key, value in (schema.metadata or {}).items()}
    try:
        version, length, dim = (int(stored[key]) for key in ("avd_schema_version", "text_length", "text_dim"))
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
            raise UserError(f"{path}: expected the column {_describe(field)}, found {_describe(found)}. {REMEDY}")
    texts = {key: value.decode(errors="replace") for key, value in stored.items()}
    return length, dim, _encoding(path, texts), _image(path, schema, texts)


def check_alike(first: Layout, first_name: object, other: Layout, other_name: object) -> None:
    """Refuse to join two shards or data sets that a batch or a model cannot mix.

    A codec or frame rate that one of them does not record counts as equal.

    Raises:
        UserError: With both names.
    """
    if other.latent_shape != first.latent_shape:
        raise UserError(
            f"{other_name} has {describe_shape(other.latent_shape)}, {first_name} has "
            f"{describe_shape(first.latent_shape)}. What is read together needs one shape: leave one out, or encode it "
            "again."
        )
    if (other.text_length, other.text_dim) != (first.text_length, first.text_dim):
        raise UserError(
            f"{other_name} has text embeddings of {other.text_length} tokens x {other.text_dim}, {first_name} of "
            f"{first.text_length} x {first.text_dim}. What is read together needs one text encoder: leave one out, or "
            "encode it again."
        )
    if None not in (first.image, other.image) and first.image != other.image:
        raise UserError(
            f"{other_name} has image embeddings of {list(other.image or ())} (tokens, width), {first_name} of "
            f"{list(first.image or ())}. What is read together needs one image encoder: leave one out, or encode it "
            "again."
        )
    if first.encoding is None or other.encoding is None:
        return
    if first.encoding.latent_space != other.encoding.latent_space:
        raise UserError(
            f"{other_name} is encoded by {other.encoding}; {first_name} by {first.encoding}. What is read together "
            "needs one codec: leave one out, or encode it again."
        )
    if None not in (first.encoding.fps, other.encoding.fps) and first.encoding.fps != other.encoding.fps:
        raise UserError(
            f"{other_name} has clips of {other.encoding.fps:g} frames per second, {first_name} of "
            f"{first.encoding.fps:g}: the same movement would have two speeds. Leave one out, or encode it again with "
            f"--fps {first.encoding.fps:g}."
        )


def describe_shape(shape: Sequence[int] | None) -> str:
    """For messages; None is the shape of prompts."""
    return "no latents" if shape is None else f"latents of shape {list(shape)}"


def to_bytes(tensor: Tensor) -> bytes:
    """The values of a tensor, row-major."""
    return tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()


def to_tensor(data: pa.Scalar, dtype_name: pa.Scalar, shape: Sequence[int], where: str) -> Tensor:
    """Raw bytes to float32.

    Raises:
        UserError: If they do not fit the shape; the message begins with ``where``.
    """
    dtype = DTYPES.get(dtype_name.as_py())
    if dtype is None:
        raise UserError(f"{where} has dtype {dtype_name.as_py()!r}, known are {', '.join(DTYPES)}. {REMEDY}")
    buffer = data.as_buffer() if data.is_valid else b""
    expected, found = math.prod(shape) * dtype.itemsize, len(memoryview(buffer))
    if found != expected:
        raise UserError(f"{where} has {found} bytes, {dtype_name} of shape {list(shape)} takes {expected}. {REMEDY}")
    if expected == 0:
        return torch.zeros(*shape)
    # A copy, since the buffer is Arrow's and read-only.
    return torch.frombuffer(bytearray(buffer), dtype=dtype).reshape(*shape).float()


def _encoding(path: Path, stored: dict[str, str]) -> Encoding | None:
    space = next((space for space in get_args(LatentSpace) if space == stored.get("latent_space")), None)
    if space is None and "latent_space" in stored:
        raise UserError(
            f"{path} holds latents of the space {stored['latent_space']!r}, this release knows "
            f"{', '.join(LATENT_SPACES)}. Install the release that wrote it, or encode the videos again."
        )
    try:
        fps = float(stored["fps"]) if "fps" in stored else None
    except ValueError:
        fps = math.nan
    if fps is not None and not 0 < fps < math.inf:
        raise UserError(f"{path}: expected a positive number as fps in its metadata, got {stored['fps']!r}. {REMEDY}")
    return None if space is None else Encoding(space, stored.get("codec"), fps)


def _image(path: Path, schema: pa.Schema, stored: dict[str, str]) -> ImageTokens | None:
    if "image_tokens" not in stored:
        return None
    try:
        image = ImageTokens(int(stored["image_tokens"]), int(stored["image_dim"]))
    except (KeyError, ValueError):
        raise UserError(
            f"{path}: expected whole numbers as image_tokens and image_dim in its metadata. {REMEDY}"
        ) from None
    for name in IMAGE_COLUMNS if image.tokens else IMAGE_COLUMNS[:1]:
        if name not in schema.names or schema.field(name).type != pa.large_binary():
            raise UserError(f"{path}: expected the column {name}: large_binary, which its metadata tells of. {REMEDY}")
    return image


def _describe(field: pa.Field | None) -> str:
    if field is None:
        return "none of that name"
    return f"{field.name}: {field.type}" + ("" if field.nullable else " not null")
