"""Clips of the student while it trains."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from avd_trainer.config.sections import ShardsData
from avd_trainer.data.video_files import save_clip, save_grid
from avd_trainer.models.codecs.block_dct import BlockDCTCodec
from avd_trainer.runtime.errors import UserError
from avd_trainer.training.config import TrainConfig

Decode = Callable[[Tensor], Tensor]


class SampleWriter:
    """Decodes latents and writes them as MP4 and GIF.

    Args:
        config: The run: whose codec, how many frames per second.
        folder: Gets ``step-00000100/0.mp4``, ``0.gif`` and so on, and ``all.mp4``, ``all.gif`` with captions.
        device: Where to decode.

    Raises:
        UserError: If samples are asked for and there is no codec to decode them.
    """

    def __init__(self, config: TrainConfig, folder: Path, device: torch.device) -> None:
        self.folder = folder
        self._config, self._device = config, device
        # Before the run starts, so that a missing VAE is not found out about hours later.
        self._decode = self._load() if config.samples.every is not None else None

    def write(self, step: int, latents: Tensor, captions: Sequence[str]) -> Path:
        """Write clips ``[N, C, F, H, W]`` of a step; returns their folder.

        Raises:
            UserError: If they cannot be written.
        """
        decode = self._decode or self._load()
        videos = torch.cat([decode(latent.unsqueeze(0)).cpu() for latent in latents])
        folder = self.folder / f"step-{step:08d}"
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"{folder} cannot be written: {error}. Free space or mend its permissions.") from error
        fps = self._config.samples.fps
        for number, video in enumerate(videos):
            save_clip(video, folder / str(number), fps)
        save_grid(videos, captions, folder / "all", fps)
        return folder

    def _load(self) -> Decode:
        source = self._config.codec or self._config.teacher or ""
        if not isinstance(self._config.data, ShardsData):
            # Clips that are encoded at the start are in this latent space, whoever the teacher is.
            codec = BlockDCTCodec()
            return lambda latents: codec.decode(latents.cpu())
        from avd_trainer.models.codecs.wan import WanCodec

        try:
            wan = WanCodec.from_pretrained(source, "cpu")
        except UserError as error:
            raise UserError(
                f"samples.every asks for clips, but {source} has no VAE to decode them ({error}). Set codec to a "
                "diffusers Wan pipeline, or samples.every=null."
            ) from error

        def decode(latents: Tensor) -> Tensor:
            # On the accelerator for as long as it is needed: training wants the memory.
            try:
                return wan.to(self._device).decode(latents)
            finally:
                wan.to("cpu")

        return decode
