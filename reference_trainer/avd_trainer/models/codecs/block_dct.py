"""A video codec without weights: a truncated block DCT, as Wan2.1's VAE in time and in channels."""

from __future__ import annotations

import math

import torch
from einops import rearrange
from torch import Tensor, nn

from avd_trainer.models.codecs.latent_space import SPATIAL_STRIDES, TEMPORAL_STRIDE, LatentSpace

SPATIAL_STRIDE = SPATIAL_STRIDES["block-dct-4"]

# One latent channel is one coefficient (colour axis, frequency in time, in y, in x). Of each colour axis the mean, the
# slopes in x and y and the change in time, and four of the five strongest of the rest on clips of moving shapes: two
# pairs that treat x and y alike.
COEFFICIENTS: tuple[tuple[int, int, int, int], ...] = (
    (0, 0, 0, 0), (0, 0, 0, 1), (0, 0, 1, 0), (0, 1, 0, 0),
    (1, 0, 0, 0), (1, 0, 0, 1), (1, 0, 1, 0), (1, 1, 0, 0),
    (2, 0, 0, 0), (2, 0, 0, 1), (2, 0, 1, 0), (2, 1, 0, 0),
    (1, 0, 0, 2), (1, 0, 2, 0), (1, 1, 0, 1), (1, 1, 1, 0),
)  # fmt: skip

# Orthonormal colour axes: luma, red against blue, green against magenta.
_COLOR_AXES = torch.tensor([[1.0, 1.0, 1.0], [1.0, 0.0, -1.0], [-1.0, 2.0, -1.0]])
_COLOR_AXES = _COLOR_AXES / _COLOR_AXES.norm(dim=1, keepdim=True)

# Mean and standard deviation of each coefficient over 512 clips of MovingShapes(seed=0), so that latents have about
# unit scale, as Wan's have after its own latents_mean and latents_std. Of changes in time, over all frames but the
# first. Only the means of constant coefficients and of symmetric ones differ from zero.
LATENT_MEAN: tuple[float, ...] = (0.0871, 0, 0, 0, 0.0541, 0, 0, 0, 0.0031, 0, 0, 0, 0.0011, 0.0014, 0, 0)
LATENT_STD: tuple[float, ...] = (
    0.1113, 0.0293, 0.0284, 0.0165,
    0.2004, 0.0546, 0.0526, 0.0308,
    0.1269, 0.0341, 0.0326, 0.0193,
    0.0197, 0.0206, 0.0196, 0.0186,
)  # fmt: skip


class BlockDCTCodec(nn.Module):
    """Encodes video to latents and back by a truncated block DCT.

    A block is 4 x 4 pixels by 4 frames; the first frame stands alone, as in Wan2.1's VAE, so ``1 + 4 n`` frames become
    ``1 + n`` latent frames. Each of the 16 channels is one DCT coefficient of the block, scaled to unit variance.
    Coefficients that describe change in time are zero in the first latent frame. Decoding is linear, and
    ``encode(decode(z))`` is ``z`` up to rounding for every ``z`` whose first frame has zeros there.

    Buffers only, nothing to train.
    """

    mean: Tensor
    std: Tensor
    basis_first: Tensor
    basis_rest: Tensor

    channels = len(COEFFICIENTS)
    latent_space: LatentSpace = "block-dct-4"
    source: None = None

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor(LATENT_MEAN).view(1, -1, 1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(LATENT_STD).view(1, -1, 1, 1, 1), persistent=False)
        self.register_buffer("basis_first", _basis(frames=1), persistent=False)
        self.register_buffer("basis_rest", _basis(frames=TEMPORAL_STRIDE), persistent=False)

    def encode(self, video: Tensor) -> Tensor:
        """Video to latents.

        Args:
            video: ``[B, 3, 1 + 4 n, 4 h, 4 w]`` float32 in [0, 1], RGB.

        Returns:
            ``[B, 16, 1 + n, h, w]`` float32, about zero mean and unit variance per channel.

        Raises:
            ValueError: If the shape is not of that form.
        """
        if video.ndim != 5 or video.shape[1] != 3:
            raise ValueError(f"encode needs video of shape [B, 3, F, H, W], got {list(video.shape)}.")
        _, _, frames, height, width = video.shape
        if (frames - 1) % TEMPORAL_STRIDE or height % SPATIAL_STRIDE or width % SPATIAL_STRIDE:
            raise ValueError(
                f"encode needs 1 + 4 n frames and a height and width divisible by 4, got {frames} frames of "
                f"{height} x {width}. Cut or resize the video first."
            )
        centered = 2.0 * video - 1.0
        first = self._analyse(centered[:, :, :1], self.basis_first)
        rest = self._analyse(centered[:, :, 1:], self.basis_rest)
        return (torch.cat([first, rest], dim=2) - self.mean) / self.std

    def decode(self, latents: Tensor) -> Tensor:
        """Latents to video.

        Args:
            latents: ``[B, 16, 1 + n, h, w]`` floating point.

        Returns:
            ``[B, 3, 1 + 4 n, 4 h, 4 w]`` float32, about [0, 1] but not clamped: a clamp would hide oversaturation.

        Raises:
            ValueError: If the shape is not of that form.
        """
        if latents.ndim != 5 or latents.shape[1] != self.channels:
            raise ValueError(f"decode needs latents of shape [B, {self.channels}, F, h, w], got {list(latents.shape)}.")
        coefficients = latents.float() * self.std + self.mean
        first = self._synthesise(coefficients[:, :, :1], self.basis_first)
        rest = self._synthesise(coefficients[:, :, 1:], self.basis_rest)
        return (torch.cat([first, rest], dim=2) + 1.0) / 2.0

    def keep_first_frame(self, latents: Tensor) -> Tensor:
        """Latents ``[..., 16, F, h, w]`` of clips to those of clips whose other frames are grey.

        The first frame is encoded alone, so its latents are there already.
        """
        grey = (-self.mean / self.std).squeeze(0).expand_as(latents[..., 1:, :, :])
        return torch.cat([latents[..., :1, :, :], grey], dim=-3)

    def _analyse(self, video: Tensor, basis: Tensor) -> Tensor:
        blocks = rearrange(
            video, "b c (f t) (h y) (w x) -> b f h w (c t y x)", t=basis.shape[2], y=SPATIAL_STRIDE, x=SPATIAL_STRIDE
        )
        # The basis is orthogonal and decode applies it as it is, so analysis divides by its squared norm.
        norms = basis.flatten(1).square().sum(1).clamp_min(1e-12)
        return rearrange(blocks @ (basis.flatten(1) / norms[:, None]).T, "b f h w k -> b k f h w")

    def _synthesise(self, coefficients: Tensor, basis: Tensor) -> Tensor:
        blocks = torch.einsum("bkfhw,kn->bfhwn", coefficients, basis.flatten(1))
        return rearrange(
            blocks,
            "b f h w (c t y x) -> b c (f t) (h y) (w x)",
            t=basis.shape[2],
            y=SPATIAL_STRIDE,
            x=SPATIAL_STRIDE,
            c=3,
        )


def _basis(frames: int) -> Tensor:
    """The basis vectors of a block, ``[16, 3, frames, 4, 4]``, orthogonal to each other."""
    rows = []
    for color, kt, ky, kx in COEFFICIENTS:
        # A block of one frame has no change in time: those coefficients have no basis vector there.
        in_time = _cosine(kt, frames) if kt < frames else torch.zeros(frames)
        rows.append(
            torch.einsum(
                "c,t,y,x->ctyx", _COLOR_AXES[color], in_time, _cosine(ky, SPATIAL_STRIDE), _cosine(kx, SPATIAL_STRIDE)
            )
        )
    return torch.stack(rows)


def _cosine(frequency: int, length: int) -> Tensor:
    """A DCT-II vector whose mean square is one, so a still block has the same coefficients at any block length."""
    vector = torch.cos(math.pi * frequency * (torch.arange(length) + 0.5) / length)
    return vector * (math.sqrt(2.0) if frequency else 1.0)
