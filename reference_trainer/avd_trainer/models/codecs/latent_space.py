"""Which latents a model makes, or a codec gives, and their sizes; each codec means other things by a channel."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from avd_trainer.models.weight_files import BUNDLED
from avd_trainer.runtime.errors import UserError

LatentSpace = Literal["wan", "block-dct-4"]

LATENT_SPACES: dict[LatentSpace, str] = {"wan": "Wan's VAE", "block-dct-4": "the tiny preset's block DCT"}
"""Each space's codec, for messages."""
SIZES: dict[LatentSpace, str] = {"wan": "832x480x81", "block-dct-4": "32x32x17"}
"""What the models of each space were trained on, as ``WIDTHxHEIGHTxFRAMES``: Wan2.1, and the tiny preset's teacher."""
TINY = "tiny"
"""Stands for the codec and the text embedding of the tiny preset, which have no weights, where a pipeline is named."""
WAN = "Wan-AI/Wan2.1-T2V-1.3B-Diffusers"
"""The least pipeline of Wan2.1; all of them have the same VAE and text encoder."""
TEMPORAL_STRIDE = 4
"""Frames per latent frame after the first."""
SPATIAL_STRIDES: dict[LatentSpace, int] = {"wan": 8, "block-dct-4": 4}
"""Pixels per latent pixel and side."""
PATCH_SIZE = 2
"""Latent pixels per token and side in the transformers; a video's sides divide by the codec's stride times this."""


def latent_shape_of(size: str, space: LatentSpace) -> tuple[int, int, int, int]:
    """The latent ``(16, F, H, W)`` of a video.

    Args:
        size: Of the video, as ``WIDTHxHEIGHTxFRAMES``.
        space: Whose latents.

    Raises:
        UserError: If codec and transformer of that space cannot take it.
    """
    stride = SPATIAL_STRIDES[space]
    side = stride * PATCH_SIZE
    parts = size.lower().split("x")
    if len(parts) == 3 and all(part.isdigit() and int(part) > 0 for part in parts):
        width, height, frames = map(int, parts)
        if width % side == 0 and height % side == 0 and frames % TEMPORAL_STRIDE == 1:
            return 16, 1 + (frames - 1) // TEMPORAL_STRIDE, height // stride, width // stride
    raise UserError(
        f"{size!r} is no size for latents of {LATENT_SPACES[space]}: expected WIDTHxHEIGHTxFRAMES, width and height "
        f"divisible by {side} and 1 + {TEMPORAL_STRIDE} n frames, for example {SIZES[space]}."
    )


def latent_space_of(teacher: str) -> LatentSpace | None:
    """Whose latents a teacher makes, by the codec that lies beside it; None where nothing says so.

    Args:
        teacher: As :func:`avd_trainer.models.weights.open_weights` takes it. Nothing is downloaded.
    """
    if teacher.startswith(BUNDLED):
        return "block-dct-4"
    vae = any((Path(teacher) / name).exists() for name in ("vae", "Wan2.1_VAE.pth"))
    return "wan" if vae else None
