"""Latents: clips as the model sees them, encoded once."""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING

from avd_trainer.data.preparation.needs import weights_missing
from avd_trainer.data.preparation.stage import (
    ClipStage,
    Done,
    Failed,
    FrameRequest,
    Frames,
    Outcome,
    Row,
    StageSettings,
)
from avd_trainer.models.pipeline_parts import TINY, WAN

if TYPE_CHECKING:
    from avd_trainer.data.encode import VideoEncoder


class LatentsSettings(StageSettings):
    """Of latents."""

    model: str = WAN
    """The model that the data is for: a Wan pipeline in diffusers' layout (folder or hub id), or tiny for the codec of
    the tiny preset."""
    time_limit: float = 600.0
    """Seconds for one clip."""


class Latents(ClipStage[LatentsSettings]):
    """Normalised latents of all frames in float16: ``{"latent_space": ..., "codec": ..., "size": ...}``."""

    name = "latents"
    Settings = LatentsSettings
    reads = ("framing",)
    of_survivors = True
    makes_arrays = True
    gpu = True

    def missing(self) -> str | None:
        model = self.settings.model
        return None if model == TINY else weights_missing(self.name, "model", model, config="vae/config.json")

    def frames(self, row: Row) -> FrameRequest:
        size = row.results["framing"]
        return FrameRequest(tuple(range(self.clip.frames)), cover=(size["height"], size["width"]))

    def run(self, row: Row, frames: Frames) -> Outcome:
        import torch

        video = torch.from_numpy(frames).permute(3, 0, 1, 2).unsqueeze(0).float() / 255
        with torch.no_grad():
            latent = self._encoder.encode(video)[0].to("cpu", torch.float16)
        if not latent.isfinite().all():
            return Failed("its latent holds NaN or infinity; the VAE computes in float32, so weights may be damaged")
        values = {
            "latent_space": self._encoder.latent_space,
            "codec": self._encoder.source,
            "size": list(frames.shape[1:3]),
        }
        return Done(values, {"latent": latent.numpy()})

    def load(self) -> None:
        _ = self._encoder

    @cached_property
    def _encoder(self) -> VideoEncoder:
        from avd_trainer.data.encoders import load_video_encoder

        return load_video_encoder(self.settings.model)


STAGE = Latents
