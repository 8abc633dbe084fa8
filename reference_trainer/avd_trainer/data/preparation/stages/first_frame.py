"""First frames: what a model of image to video reads besides the caption, encoded once."""

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
    from avd_trainer.data.encode import ImageCondition, VideoEncoder


class FirstFrameSettings(StageSettings):
    """Of first frames."""

    model: str = WAN
    """As of latents: its VAE encodes the frame, and its image encoder too, where it has one."""
    time_limit: float = 600.0
    """Seconds for one clip."""


class FirstFrame(ClipStage[FirstFrameSettings]):
    """Latents of a clip's first frame followed by grey, and the frame's embedding, in float16: ``{"tokens": ..., "dim":
    ...}``, the size of the embedding; 0 and 0 where the model has none."""

    name = "first_frame"
    Settings = FirstFrameSettings
    reads = ("framing",)
    of_survivors = True
    makes_arrays = True
    gpu = True

    def missing(self) -> str | None:
        model = self.settings.model
        return None if model == TINY else weights_missing(self.name, "model", model, config="vae/config.json")

    def frames(self, row: Row) -> FrameRequest:
        size = row.results["framing"]
        return FrameRequest((0,), cover=(size["height"], size["width"]))

    def run(self, row: Row, frames: Frames) -> Outcome:
        import torch

        image = torch.from_numpy(frames[0]).permute(2, 0, 1).float() / 255
        with torch.no_grad():
            found = self._condition.encode(self._codec, image, self.clip.frames)
        if not all(tensor.isfinite().all() for tensor in found.values()):
            return Failed("what was made of its first frame holds NaN or infinity; weights may be damaged")
        return Done(self._condition.tokens._asdict(), {name: tensor.numpy() for name, tensor in found.items()})

    def load(self) -> None:
        _ = self._codec, self._condition

    @cached_property
    def _codec(self) -> VideoEncoder:
        from avd_trainer.data.encoders import load_video_encoder

        return load_video_encoder(self.settings.model)

    @cached_property
    def _condition(self) -> ImageCondition:
        from avd_trainer.data.encoders import load_image_condition

        return load_image_condition(self.settings.model)


STAGE = FirstFrame
