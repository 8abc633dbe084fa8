"""A clip's first frame as an image-to-video model reads it: latents of the padded frame, below a mask."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from avd_trainer.models.architecture import MASK_CHANNELS

GREY = 0.5
"""Pixels of the frames that are not given: 0 in the [-1, 1] of Wan's VAE."""


def encode_first_frame(encode: Callable[[Tensor], Tensor], image: Tensor, frames: int) -> Tensor:
    """The image latents of clips that begin with an image, as diffusers' ``WanImageToVideoPipeline`` makes them.

    Args:
        encode: A codec's ``encode``.
        image: ``[B, 3, H, W]`` in [0, 1], RGB, of the clips' size.
        frames: Frames of the clips, ``1 + 4 n``.

    Returns:
        ``[B, 4 + C, 1 + n, h, w]``: the mask, then the latents of the image followed by grey frames.
    """
    return with_mask(encode(pad_first_frame(image, frames)))


def pad_first_frame(image: Tensor, frames: int) -> Tensor:
    """``[B, 3, H, W]`` in [0, 1] to videos ``[B, 3, frames, H, W]`` that begin with it and go on in grey."""
    video = torch.full((*image.shape[:2], frames, *image.shape[2:]), GREY, dtype=image.dtype, device=image.device)
    video[:, :, 0] = image
    return video


def with_mask(latents: Tensor) -> Tensor:
    """``[..., C, F, h, w]`` of a padded first frame to ``[..., 4 + C, F, h, w]``: 1 where a frame is given.

    The first latent frame stands for one frame, which counts for all four mask channels.
    """
    mask = torch.zeros_like(latents[..., :1, :, :, :]).repeat_interleave(MASK_CHANNELS, dim=-4)
    mask[..., 0, :, :] = 1.0
    return torch.cat([mask, latents], dim=-4)
