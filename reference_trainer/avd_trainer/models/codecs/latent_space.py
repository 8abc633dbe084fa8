"""Which latents a model makes, or a codec gives: codecs of one geometry mean different things by a channel."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from avd_trainer.models.weight_files import BUNDLED

LatentSpace = Literal["wan", "block-dct"]

LATENT_SPACES: dict[LatentSpace, str] = {"wan": "Wan's VAE", "block-dct": "the tiny preset's block DCT"}
"""Each space's codec, for messages."""


def latent_space_of(teacher: str) -> LatentSpace | None:
    """Whose latents a teacher makes, by the codec that lies beside it; None where nothing says so.

    Args:
        teacher: As :func:`avd_trainer.models.weights.open_weights` takes it. Nothing is downloaded.
    """
    if teacher.startswith(BUNDLED):
        return "block-dct"
    vae = any((Path(teacher) / name).exists() for name in ("vae", "Wan2.1_VAE.pth"))
    return "wan" if vae else None
