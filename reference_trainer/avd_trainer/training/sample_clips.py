"""Clips of the student while it trains."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from avd_trainer.config.sections import SamplesConfig
from avd_trainer.data.encode import WAN_FORMAT
from avd_trainer.data.schema import Encoding
from avd_trainer.data.video_files import save_clip, save_grid
from avd_trainer.models.codecs.block_dct import BlockDCTCodec
from avd_trainer.runtime.errors import UserError

Decode = Callable[[Tensor], Tensor]


class SampleWriter:
    """Decodes latents and writes them as MP4 and GIF.

    Args:
        options: Whether there will be samples, and how many frames per second they have.
        encoding: How the run's clips became latents: of Wan's, the VAE that made them decodes.
        codec: A Wan pipeline (folder or hub id) whose VAE decodes in its place.
        teacher: Whose VAE decodes where the data does not say which made its latents, or that one is gone.
        folder: Gets ``step-00000100/0.mp4``, ``0.gif`` and so on, and ``all.mp4``, ``all.gif`` with captions.
        device: Where to decode.

    Raises:
        UserError: If samples are asked for and there is no codec to decode them.
    """

    def __init__(
        self,
        options: SamplesConfig,
        encoding: Encoding,
        *,
        codec: str | None,
        teacher: str | None,
        folder: Path,
        device: torch.device,
    ) -> None:
        self.folder = folder
        self._fps = frames_per_second(options, encoding)
        self._encoding, self._device = encoding, device
        self._sources = (
            [codec] if codec is not None else [name for name in (encoding.codec, teacher) if name is not None]
        )
        # Before the run starts, so that a missing VAE is not found out about hours later.
        self._decode = self._load() if options.every is not None else None

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
        for number, video in enumerate(videos):
            save_clip(video, folder / str(number), self._fps)
        save_grid(videos, captions, folder / "all", self._fps)
        return folder

    def _load(self) -> Decode:
        if self._encoding.latent_space == "block-dct-4":
            codec = BlockDCTCodec()
            return lambda latents: codec.decode(latents.cpu())
        from avd_trainer.models.codecs.wan import WanCodec

        reasons = []
        for source in dict.fromkeys(self._sources):
            try:
                wan = WanCodec.from_pretrained(source, "cpu")
                break
            except UserError as error:
                reasons.append(str(error))
        else:
            raise UserError(
                f"samples.every asks for clips, but {' and '.join(self._sources)} has no VAE to decode them "
                f"({'; '.join(reasons)}). Set codec to a diffusers Wan pipeline, or samples.every=null."
            )

        def decode(latents: Tensor) -> Tensor:
            # On the accelerator for as long as it is needed: training wants the memory.
            try:
                return wan.to(self._device).decode(latents)
            finally:
                wan.to("cpu")

        return decode


def frames_per_second(options: SamplesConfig, encoding: Encoding) -> float:
    """Of the files with a run's samples: as asked for, or else as the data has them, or else as Wan2.1's."""
    return options.fps or encoding.fps or WAN_FORMAT.fps
