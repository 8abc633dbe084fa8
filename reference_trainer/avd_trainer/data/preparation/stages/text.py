"""Text embeddings of captions, as the model reads them."""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING

from avd_trainer.data.preparation.needs import weights_missing
from avd_trainer.data.preparation.stage import ClipStage, Done, Frames, Row, StageSettings
from avd_trainer.models.pipeline_parts import TINY, WAN

if TYPE_CHECKING:
    from avd_trainer.data.encode import TextEncoder


class TextSettings(StageSettings):
    """Of text embeddings."""

    DECIDES = StageSettings.DECIDES | {"negative_prompt"}

    model: str = WAN
    """As of latents; tiny for the text embedding of the tiny preset."""
    negative_prompt: str | None = None
    """Prompt of classifier-free guidance's unconditional prediction. None: the one that Wan2.1 comes with; for tiny,
    nothing."""


class Text(ClipStage[TextSettings]):
    """Embedding of a clip's caption: ``{"length": ..., "dim": ...}``, the most tokens and their width."""

    name = "text"
    Settings = TextSettings
    reads = ("caption",)
    reads_clip = False
    of_survivors = True
    makes_arrays = True
    gpu = True

    def missing(self) -> str | None:
        model = self.settings.model
        return None if model == TINY else weights_missing(self.name, "model", model, config="text_encoder/config.json")

    def run(self, row: Row, frames: Frames) -> Done:
        import torch

        with torch.no_grad():
            embedding = self._encoder([row.results["caption"]["caption"]])[0].float().cpu()
        return Done({"length": self._encoder.length, "dim": self._encoder.dim}, {"embedding": embedding.numpy()})

    def load(self) -> None:
        _ = self._encoder

    @cached_property
    def _encoder(self) -> TextEncoder:
        from avd_trainer.data.encoders import load_text_encoder

        return load_text_encoder(self.settings.model)


STAGE = Text
