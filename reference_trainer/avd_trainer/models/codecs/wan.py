"""The parts of a Wan pipeline that training needs beside the transformer: its video codec and its text encoder."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Self

import torch
from diffusers import AutoencoderKLWan
from torch import Tensor, nn

from avd_trainer.models.codecs.latent_space import PATCH_SIZE, LatentSpace
from avd_trainer.models.pipeline_parts import load_part


class WanCodec(nn.Module):
    """Encodes video to Wan's normalised latents and back.

    Latents are those that diffusers' ``WanPipeline`` denoises: ``(z - latents_mean) / latents_std`` of the VAE's
    configuration, z being the mode of the posterior, so that encoding draws nothing.

    Videos of a batch are taken one by one, and each four frames at a time by the VAE itself; both are exact. Nothing is
    trained: weights are frozen and no gradient passes.

    Args:
        vae: The autoencoder.
        source: Where it came from: a folder or hub id, for those who need it again.
        tiling: Also cut frames into overlapping tiles of 256 x 256 pixels. Saves memory at some loss: latents of tiles
            are blended and differ from those of the whole.

    Attributes:
        temporal_stride: Frames per latent frame after the first, 4.
        spatial_stride: Pixels per latent pixel and side, 8.
        channels: Latent channels, 16.
        source: As given.
    """

    latent_space: LatentSpace = "wan"

    mean: Tensor
    std: Tensor

    def __init__(self, vae: AutoencoderKLWan, *, source: str | None = None, tiling: bool = False) -> None:
        super().__init__()
        self.source = source
        self.vae = vae.eval().requires_grad_(False)
        self.vae.enable_slicing()
        if tiling:
            self.vae.enable_tiling()
        self.temporal_stride: int = vae.config.scale_factor_temporal
        self.spatial_stride: int = vae.config.scale_factor_spatial
        self.channels: int = vae.config.z_dim
        device = vae.device
        self.register_buffer("mean", _per_channel(vae.config.latents_mean, device), persistent=False)
        self.register_buffer("std", _per_channel(vae.config.latents_std, device), persistent=False)

    @classmethod
    def from_pretrained(
        cls,
        source: str,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.bfloat16,
        *,
        tiling: bool = False,
    ) -> Self:
        """Load the VAE of a pipeline.

        Args:
            source: A folder that diffusers saved, with ``vae/`` in it, or the name of one on the Hugging Face hub.
            device: Where to encode and decode.
            dtype: The type of the VAE's weights and computation.
            tiling: See the class.

        Raises:
            UserError: If there is no such VAE.
        """
        vae = load_part(AutoencoderKLWan, source, "vae", use_safetensors=True, torch_dtype=dtype)
        # A folder is to be found again from anywhere.
        found = str(Path(source).resolve()) if Path(source).is_dir() else source
        return cls(vae.to(device), source=found, tiling=tiling)

    @torch.no_grad()
    def encode(self, video: Tensor) -> Tensor:
        """Video to latents.

        Args:
            video: ``[B, 3, 1 + 4 n, 16 h, 16 w]`` floating point in [0, 1], RGB, on any device.

        Returns:
            ``[B, 16, 1 + n, 2 h, 2 w]`` float32 on the codec's device, about zero mean and unit variance per channel.

        Raises:
            ValueError: If the shape is not of that form.
        """
        if video.ndim != 5 or video.shape[1] != 3:
            raise ValueError(f"encode needs video of shape [B, 3, F, H, W], got {list(video.shape)}.")
        _, _, frames, height, width = video.shape
        side = PATCH_SIZE * self.spatial_stride
        if (frames - 1) % self.temporal_stride or height % side or width % side:
            raise ValueError(
                f"encode needs 1 + {self.temporal_stride} n frames and a height and width divisible by {side}, got "
                f"{frames} frames of {height} x {width}. Cut or resize the video first."
            )
        centered = 2.0 * video.to(self.vae.device, torch.float32) - 1.0
        posterior = self.vae.encode(centered.to(self.vae.dtype)).latent_dist
        latents: Tensor = (posterior.mode().float() - self.mean) / self.std
        return latents

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Latents to video.

        Args:
            latents: ``[B, 16, 1 + n, h, w]`` floating point, on any device.

        Returns:
            ``[B, 3, 1 + 4 n, 8 h, 8 w]`` float32 in [0, 1] on the codec's device.

        Raises:
            ValueError: If the shape is not of that form.
        """
        if latents.ndim != 5 or latents.shape[1] != self.channels:
            raise ValueError(f"decode needs latents of shape [B, {self.channels}, F, h, w], got {list(latents.shape)}.")
        scaled = latents.to(self.vae.device, torch.float32) * self.std + self.mean
        video: Tensor = self.vae.decode(scaled.to(self.vae.dtype)).sample
        return (video.float() + 1.0) / 2.0  # The VAE clamps to [-1, 1].


def _per_channel(values: Sequence[float], device: torch.device) -> Tensor:
    return torch.tensor(values, device=device).view(1, -1, 1, 1, 1)
