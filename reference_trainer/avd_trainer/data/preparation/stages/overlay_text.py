"""Overlay text: finds clips with subtitles, titles and watermarks, which a student learns to draw."""

from __future__ import annotations

import logging
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from avd_trainer.data.preparation.frames import spread
from avd_trainer.data.preparation.needs import package_missing
from avd_trainer.data.preparation.stage import ClipStage, Done, FrameRequest, Frames, Limits, Row, Score


class OverlayTextSettings(Limits):
    """Of text in the picture. The paper has no such step."""

    LOW_IS_GOOD = True

    frames: int = Field(default=3, ge=1)
    """Frames of a clip that are read, evenly spread; each takes about a second of a core."""
    short_side: int = Field(default=480, ge=32)
    """Height or width of these frames, whichever is less, in pixels."""
    confidence: float = Field(default=0.5, ge=0, le=1)
    """What the reader is to give a line of text at least for it to count."""


def text_share(boxes: NDArray[np.float32], height: int, width: int) -> float:
    """Share of a frame that quadrilaterals cover, those that overlap counted once.

    Args:
        boxes: ``[N, 4, 2]`` corners, x and y in pixels, in order around each.
        height: Of the frame, in pixels.
        width: Likewise.
    """
    import cv2

    covered = np.zeros((height, width), np.uint8)
    for box in boxes:
        cv2.fillConvexPoly(covered, np.round(box).astype(np.int32), 1)
    return float(covered.mean())


class OverlayText(ClipStage[OverlayTextSettings]):
    """How much of the picture is text, and what it says. Text of the scene, such as on a sign, counts too."""

    name = "overlay_text"
    Settings = OverlayTextSettings
    score = Score("area", "share of the picture that is text; mean over the frames")

    def missing(self) -> str | None:
        return package_missing(self.name, "rapidocr", "ocr") or package_missing(self.name, "onnxruntime", "ocr")

    def frames(self, row: Row) -> FrameRequest:
        return FrameRequest(spread(self.clip.frames, self.settings.frames), self.settings.short_side)

    def run(self, row: Row, frames: Frames) -> Done:
        found = [self._reader(frame[..., ::-1].copy(), text_score=self.settings.confidence) for frame in frames]
        height, width = frames.shape[1:3]
        areas = [0.0 if one.boxes is None else text_share(one.boxes, height, width) for one in found]
        return Done({"frames": areas, "area": float(np.mean(areas)), "text": [list(one.txts or ()) for one in found]})

    def load(self) -> None:
        _ = self._reader

    @cached_property
    def _reader(self) -> Any:
        # It says at level INFO for each file that it loads it.
        logging.getLogger("RapidOCR").setLevel(logging.ERROR)
        from rapidocr import RapidOCR

        # As many threads as a worker has: one. Upright text needs no classifier of its direction.
        return RapidOCR(
            params={
                "Global.log_level": "error",
                "Global.use_cls": False,
                "EngineConfig.onnxruntime.intra_op_num_threads": 1,
                "EngineConfig.onnxruntime.inter_op_num_threads": 1,
            }
        )


STAGE = OverlayText
