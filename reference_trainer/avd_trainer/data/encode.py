"""What encodes videos, captions and first frames, and prompts to shards."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from avd_trainer.data.schema import ImageTokens
from avd_trainer.data.shard_writing import ShardWriter
from avd_trainer.models.codecs.first_frame import pad_first_frame
from avd_trainer.models.codecs.latent_space import (
    LATENT_SPACES,
    PATCH_SIZE,
    SPATIAL_STRIDES,
    TEMPORAL_STRIDE,
    LatentSpace,
)
from avd_trainer.models.text_encoders.hashed import HashTextEmbedding
from avd_trainer.runtime.errors import UserError


class ClipFormat(NamedTuple):
    """Size of a clip.

    Attributes:
        frames: Number of them, ``1 + 4 n``.
        height: In pixels, a multiple of 16, or 8 for the tiny preset's codec.
        width: In pixels, likewise.
        fps: Frames per second.
    """

    frames: int
    height: int
    width: int
    fps: float

    def check(self, space: LatentSpace) -> None:
        """Raise a :class:`UserError` if codec and transformer of a space cannot take it."""
        frames, height, width, fps = self
        side = SPATIAL_STRIDES[space] * PATCH_SIZE
        whole = frames > 1 and frames % TEMPORAL_STRIDE == 1 and not height % side and not width % side
        if not whole or min(height, width) < side or fps <= 0:
            own = FORMATS[space]
            raise UserError(
                f"Clips for {LATENT_SPACES[space]} need 1 + {TEMPORAL_STRIDE} n frames with n >= 1, a height and a "
                f"width that are multiples of {side}, and fps above 0; got {frames} frames of height {height} and "
                f"width {width} at {fps:g} fps. The usual ones are {own.frames}, {own.height}, {own.width} and "
                f"{own.fps:g}."
            )


WAN_FORMAT = ClipFormat(81, 480, 832, fps=16.0)
"""Wan2.1's training data and samples; 16 is its ``sample_fps``, so 81 frames are 5 seconds."""
FORMATS: dict[LatentSpace, ClipFormat] = {"wan": WAN_FORMAT, "block-dct-4": ClipFormat(17, 32, 32, fps=16.0)}
"""What the models of each space were trained on; the tiny preset's teacher on a second."""

# What Wan2.1 takes where no negative prompt is given: `sample_neg_prompt` in wan/configs/shared_config.py of
# https://github.com/Wan-Video/Wan2.1; CausVid, Self-Forcing and the released AVD code distil with the same one.
# In English: vivid tones, overexposed, static, blurred details, subtitles, style, works, paintings, images, still,
# overall gray, worst quality, low quality, JPEG residue, ugly, incomplete, extra fingers, poorly drawn hands, poorly
# drawn faces, deformed, disfigured, misshapen limbs, fused fingers, motionless picture, messy background, three legs,
# many people in the background, walking backwards.
WAN_NEGATIVE_PROMPT = (
    "色调艳丽，过曝，静态，细节模糊不清，字幕，风格，作品，画作，画面，静止，整体发灰，最差质量，低质量，"  # noqa: RUF001
    "JPEG压缩残留，丑陋的，残缺的，多余的手指，画得不好的手部，画得不好的脸部，畸形的，毁容的，形态畸形的肢体，"  # noqa: RUF001
    "手指融合，静止不动的画面，杂乱的背景，三条腿，背景人很多，倒着走"  # noqa: RUF001
)

# Prompts that are embedded at once.
BATCH = 8


class VideoEncoder(Protocol):
    """What makes latents of videos, such as a VAE.

    Attributes:
        latent_space: Whose latents it makes.
        source: Folder or hub id of the pipeline that it belongs to, if any.
    """

    @property
    def latent_space(self) -> LatentSpace: ...
    @property
    def source(self) -> str | None: ...

    def encode(self, video: Tensor, /) -> Tensor:
        """``[B, 3, F, H, W]`` in [0, 1] to normalised latents ``[B, C, f, h, w]``."""


class TextEncoder(Protocol):
    """What makes embeddings of captions.

    Attributes:
        length: The most tokens of an embedding.
        dim: The width of a token.
    """

    length: int
    dim: int

    def __call__(self, captions: list[str], /) -> list[Tensor]:
        """An embedding ``[l, dim]`` for each caption, only the tokens in use."""


class ImageEncoder(Protocol):
    """What makes embeddings of images.

    Attributes:
        tokens: Of an image.
        dim: The width of a token.
    """

    tokens: int
    dim: int

    def __call__(self, image: Tensor, /) -> Tensor:
        """``[3, H, W]`` in [0, 1] to ``[tokens, dim]``."""


class ImageCondition(NamedTuple):
    """What is kept of a clip's first frame, for image to video.

    Attributes:
        encoder: Makes the image embedding; None for models that read image latents alone.
    """

    encoder: ImageEncoder | None = None

    @property
    def tokens(self) -> ImageTokens:
        """Size of the embedding."""
        return ImageTokens() if self.encoder is None else ImageTokens(self.encoder.tokens, self.encoder.dim)

    def encode(self, codec: VideoEncoder, image: Tensor, frames: int) -> dict[str, Tensor]:
        """A first frame ``[3, H, W]`` in [0, 1] as :meth:`ShardWriter.add` takes it, in float16 on the CPU."""
        found = {"image_latent": codec.encode(pad_first_frame(image.unsqueeze(0), frames))[0]}
        if self.encoder is not None:
            found["image_embedding"] = self.encoder(image)
        return {name: tensor.to("cpu", torch.float16) for name, tensor in found.items()}


class HashTextEncoder:
    """The weight-free :class:`HashTextEmbedding` as a :class:`TextEncoder`: one token per word."""

    def __init__(self, length: int, dim: int) -> None:
        self.length, self.dim = length, dim
        self._embedding = HashTextEmbedding(length, dim)

    def __call__(self, captions: list[str], /) -> list[Tensor]:
        # A word's vector is drawn from a normal distribution: rows of zeros are padding.
        return [row[row.any(dim=1)] for row in self._embedding(captions)]


def encode_prompts(
    file: Path,
    output: Path,
    text: TextEncoder,
    negative_prompt: str,
    on_prompt: Callable[[], None] = lambda: None,
) -> int:
    """Embed prompts, one a line; a data set without latents.

    Args:
        file: UTF-8; empty lines are left out.
        output: Folder of the new data set.
        text: Embeds the prompts.
        negative_prompt: Embedded for the unconditional prediction of classifier-free guidance.
        on_prompt: Called after each prompt.

    Returns:
        Prompts that were written.

    Raises:
        UserError: If the file cannot be read or holds no prompt, or the output cannot be written.
    """
    prompts = read_prompts(file)
    with ShardWriter(output, text_length=text.length, text_dim=text.dim) as writer, torch.no_grad():
        writer.set_unconditional(text([negative_prompt])[0], negative_prompt)
        for start in range(0, len(prompts), BATCH):
            lines, batch = zip(*prompts[start : start + BATCH], strict=True)
            for line, prompt, embedding in zip(lines, batch, text(list(batch)), strict=True):
                writer.add(None, embedding, prompt, f"{file.name}, line {line}")
                on_prompt()
        return writer.rows


def read_prompts(file: Path) -> Sequence[tuple[int, str]]:
    """Line numbers from 1 and prompts of a text file.

    Raises:
        UserError: If it cannot be read or holds no prompt.
    """
    try:
        lines = file.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{file} cannot be read: {error}. Pass a text file in UTF-8 with one prompt a line.") from error
    prompts = [(number, line.strip()) for number, line in enumerate(lines, 1) if line.strip()]
    if not prompts:
        raise UserError(f"{file} holds no prompts. Write one a line.")
    return prompts
