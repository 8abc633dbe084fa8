"""Optical flow: finds clips in which too little moves."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from avd_trainer.data.preparation.frames import luma
from avd_trainer.data.preparation.needs import package_missing
from avd_trainer.data.preparation.stage import ClipStage, Done, FrameRequest, Frames, Limits, Row, Score

Algorithm = Literal["farneback", "dis"]

ITERATIONS = 3
"""Of Farneback at each level, and further settings, those of OpenCV's tutorial, which public filters took over."""
_PYRAMID_LEVELS_WINDOW = (0.5, 3, 15)
_NEIGHBOURHOOD_SMOOTHING_FLAGS = (5, 1.2, 0)


def flow_field(
    one: NDArray[np.uint8], other: NDArray[np.uint8], algorithm: Algorithm, iterations: int = ITERATIONS
) -> NDArray[np.float32]:
    """The optical flow from one frame to another.

    Args:
        one: ``[H, W]`` grey levels.
        other: Likewise.
        algorithm: ``farneback`` (Farneback 2003) or ``dis`` (Kroeger et al. 2016, OpenCV's fast preset).
        iterations: Of Farneback at each level of its pyramid.

    Returns:
        ``[H, W, 2]``: where each pixel goes, to the right and down, in pixels of these frames.
    """
    import cv2

    field = np.zeros((*one.shape, 2), np.float32)
    if algorithm == "dis":
        flow = cv2.DISOpticalFlow.create(cv2.DISOPTICAL_FLOW_PRESET_FAST).calc(one, other, field)
    else:
        flow = cv2.calcOpticalFlowFarneback(
            one, other, field, *_PYRAMID_LEVELS_WINDOW, iterations, *_NEIGHBOURHOOD_SMOOTHING_FLAGS
        )
    return np.asarray(flow, np.float32)


def flow_magnitude(
    one: NDArray[np.uint8], other: NDArray[np.uint8], algorithm: Algorithm, iterations: int = ITERATIONS
) -> float:
    """Mean over the pixels of the length of the optical flow, in pixels; arguments as :func:`flow_field`."""
    right, down = np.moveaxis(flow_field(one, other, algorithm, iterations), -1, 0)
    return float(np.sqrt(right**2 + down**2).mean())


def pair_starts(frames: int, pairs: int) -> tuple[int, ...]:
    """First frames of ``pairs`` pairs of neighbours, evenly spread over a clip; of all pairs if there are fewer."""
    starts = np.linspace(0, frames - 2, min(pairs, frames - 1)).round().astype(int)
    return tuple(int(start) for start in starts)


class FlowSettings(Limits):
    """Of optical flow. The paper's Sec. 6.2 rejects below 0.2, and names neither algorithm, size nor rate."""

    algorithm: Algorithm = "farneback"
    """By which the flow is found. At 480p the two differ sixfold on fast clips, where Farneback loses track; at 120p
    they agree within a third on most."""
    iterations: int = Field(default=ITERATIONS, ge=1)
    """Of Farneback. With 2 it takes a fifth less time, and hardly a score differs; only motion of more than 16 pixels
    of 480p from frame to frame looks slower."""
    short_side: int = Field(default=120, ge=32)
    """Height or width of the frames that are compared, whichever is less, in pixels. Time grows with its square."""
    pairs: int = Field(default=8, ge=1)
    """Pairs of consecutive frames that are compared, evenly spread over the clip."""
    unit_side: int = Field(default=480, ge=1)
    """The score is in pixels of frames of this short side, whatever the size it is measured at. The paper measures
    videos that were resized to 480p."""


class Flow(ClipStage[FlowSettings]):
    """How much moves from one frame of the clip to the next."""

    name = "flow"
    Settings = FlowSettings
    score = Score("motion", "mean length of the optical flow between consecutive frames, in pixels")

    def missing(self) -> str | None:
        return package_missing(self.name, "cv2", "prepare")

    def frames(self, row: Row) -> FrameRequest:
        starts = self._starts()
        return FrameRequest(tuple(sorted({*starts, *(start + 1 for start in starts)})), self.settings.short_side)

    def run(self, row: Row, frames: Frames) -> Done:
        shown = dict(zip(self.frames(row).indices, luma(frames), strict=True))
        scale = self.settings.unit_side / self.settings.short_side
        how = self.settings.algorithm, self.settings.iterations
        pairs = [scale * flow_magnitude(shown[start], shown[start + 1], *how) for start in self._starts()]
        return Done({"pairs": pairs, "motion": float(np.mean(pairs))})

    def _starts(self) -> Sequence[int]:
        return pair_starts(self.clip.frames, self.settings.pairs)


STAGE = Flow
