"""Temporal consistency: finds clips whose things or whose background change beyond recognition."""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING

from pydantic import Field

from avd_trainer.data.preparation.frames import spread
from avd_trainer.data.preparation.needs import package_missing, weights_missing
from avd_trainer.data.preparation.stage import ClipStage, Done, FrameRequest, Frames, Limits, Row, Score

if TYPE_CHECKING:
    from torch import Tensor

    from avd_trainer.data.preparation.image_models import ImageEmbedder


class ConsistencySettings(Limits):
    """Of temporal consistency. The paper keeps the better half by VBench's, which is no single number: VBench names
    subject consistency (DINO) and background consistency (CLIP) under that heading. The score is the mean of both."""

    clip: str = "openai/clip-vit-base-patch32"
    """CLIP: a folder or hub id."""
    dino: str = "facebook/dino-vitb16"
    """DINO: a folder or hub id."""
    side: int = Field(default=224, ge=8)
    """Height and width of the frames that both models take, in pixels. The centre is cut out."""
    frames: int | None = Field(default=None, ge=2)
    """Frames of a clip that are compared, evenly spread; None for all, as in VBench. Fewer are faster, and farther
    apart, so that scores are lower."""


def temporal_consistency(vectors: Tensor) -> float:
    """Mean over frames, but the first, of their cosines to the frame before and to the first one.

    ``mean_i (max(0, v_i . v_{i-1}) + max(0, v_i . v_0)) / 2``, as in VBench (Huang et al. 2024, Sec. 4.1).

    Args:
        vectors: ``[F, D]`` of length 1, at least two.

    Returns:
        In [0, 1]; 1 for a still.
    """
    before = (vectors[1:] * vectors[:-1]).sum(dim=-1).clamp(0, 1)
    first = (vectors[1:] @ vectors[0]).clamp(0, 1)
    return float((before + first).mean() / 2)


class Consistency(ClipStage[ConsistencySettings]):
    """How alike the frames of a clip are."""

    name = "consistency"
    Settings = ConsistencySettings
    score = Score("consistency", "mean of the cosines of CLIP and DINO vectors to the frame before and to the first")
    gpu = True

    def missing(self) -> str | None:
        return (
            package_missing(self.name, "transformers", "wan")
            or weights_missing(self.name, "clip", self.settings.clip)
            or weights_missing(self.name, "dino", self.settings.dino)
        )

    def frames(self, row: Row) -> FrameRequest:
        indices = spread(self.clip.frames, self.settings.frames or self.clip.frames)
        return FrameRequest(indices, cover=(self.settings.side, self.settings.side))

    def run(self, row: Row, frames: Frames) -> Done:
        found = {name: temporal_consistency(model(frames)) for name, model in self._models.items()}
        return Done({**found, "consistency": sum(found.values()) / len(found)})

    def load(self) -> None:
        _ = self._models

    @cached_property
    def _models(self) -> dict[str, ImageEmbedder]:
        from avd_trainer.data.preparation.image_models import ImageEmbedder

        side = self.settings.side
        return {
            "clip": ImageEmbedder("clip", self.settings.clip, side),
            "dino": ImageEmbedder("dino", self.settings.dino, side),
        }


STAGE = Consistency
