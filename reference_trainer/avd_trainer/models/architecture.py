"""What a transformer's configuration says of its inputs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from avd_trainer.models.codecs.latent_space import TEMPORAL_STRIDE
from avd_trainer.runtime.errors import UserError

MASK_CHANNELS = TEMPORAL_STRIDE
"""Of image latents, before the latents: the frames of a latent frame, 1 where a frame is given and 0 elsewhere."""


class ImageInput(NamedTuple):
    """What an image-to-video transformer reads of the image.

    Attributes:
        channels: C', of the image latents beside the noised sample: 4 of the mask, then those of the padded frame.
        embedding_dim: Width of the image embedding's tokens; None for a model that reads none.
    """

    channels: int
    embedding_dim: int | None


def latent_channels(architecture: Mapping[str, Any]) -> int:
    """C, the channels of the latents that a transformer makes."""
    channels: int = architecture.get("out_channels") or architecture["in_channels"]
    return channels


def image_input(architecture: Mapping[str, Any]) -> ImageInput | None:
    """What a transformer reads of an image; None for text to video.

    Its channels say which kind it is, in accordance with diffusers' ``WanImageToVideoPipeline``: those that go in
    beyond those that come out are the image's.

    Raises:
        UserError: If the channels are those of neither kind.
    """
    out, more = latent_channels(architecture), architecture["in_channels"] - latent_channels(architecture)
    embedding_dim: int | None = architecture.get("image_dim")
    if more == 0 and embedding_dim is None:
        return None
    if more == MASK_CHANNELS + out:
        return ImageInput(more, embedding_dim)
    raise UserError(
        f"a transformer with {architecture['in_channels']} channels in, {out} out and image_dim {embedding_dim} is "
        f"neither text to video ({out} in, no image_dim) nor image to video ({2 * out + MASK_CHANNELS} in). Pass a "
        "model of one of these kinds, such as Wan2.1-T2V or Wan2.1-I2V."
    )
