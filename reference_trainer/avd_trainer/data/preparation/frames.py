"""What stages that look at single frames have in common."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable
from typing import Annotated, ClassVar, TypeVar

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from avd_trainer.data.preparation.needs import package_missing
from avd_trainer.data.preparation.stage import ClipSettings, ClipStage, Done, FrameRequest, Frames, Limits, Row, Score
from avd_trainer.runtime.errors import UserError


class NamedFrames(Limits):
    """Settings of a stage that measures the same few frames of each clip."""

    at: Annotated[tuple[Annotated[int, Field(ge=1)], ...], Field(min_length=1)] | None = (1, 21, 41, 61)
    """Which frames of the clip, from 1. The paper's Sec. 6.2: the 1st, 21st, 41st and 61st. None for four that are
    evenly spread, however long the clip is."""
    short_side: int = Field(default=480, ge=16)
    """Their height or width, whichever is less, in pixels: frames are resized first. The paper resizes all videos to
    480p before it looks at frames."""


S = TypeVar("S", bound=NamedFrames)


class NamedFramesStage(ClipStage[S]):
    """A number for each of a few frames, and one of these for the clip.

    Values are ``frames``, the number of each, and the clip's score, under its own key.
    """

    score: ClassVar[Score]
    settings: S

    def __init__(self, settings: S, clip: ClipSettings) -> None:
        super().__init__(settings, clip)
        if settings.at is None:
            self._indices = spread(clip.frames, 4)
        elif max(settings.at) <= clip.frames:
            self._indices = tuple(sorted(number - 1 for number in set(settings.at)))
        else:
            raise UserError(
                f"{self.name}.at names frame {max(settings.at)}, the recipe's clips have {clip.frames}. Name frames "
                f"from 1 to {clip.frames}, or null for four that are evenly spread."
            )

    def missing(self) -> str | None:
        return package_missing(self.name, "cv2", "prepare")

    @staticmethod
    @abstractmethod
    def measure(frames: Frames) -> list[float]:
        """A number for each frame."""

    @staticmethod
    def choose(measured: Iterable[float]) -> float:
        """The clip's score: the lowest, since each of the frames has to pass."""
        return min(measured)

    def frames(self, row: Row) -> FrameRequest:
        return FrameRequest(self._indices, self.settings.short_side)

    def run(self, row: Row, frames: Frames) -> Done:
        measured = self.measure(frames)
        return Done({"frames": measured, self.score.key: self.choose(measured)})


def luma(frames: Frames) -> list[NDArray[np.uint8]]:
    """``[H, W]`` grey levels of each frame, by the weights of BT.601."""
    import cv2

    return [np.asarray(cv2.cvtColor(frame, cv2.COLOR_RGB2GRAY), np.uint8) for frame in frames]


def spread(frames: int, count: int) -> tuple[int, ...]:
    """``count`` indices of a clip of ``frames``, the middles of as many equal parts; all, if there are fewer.

    >>> spread(81, 8)
    (5, 15, 25, 35, 45, 55, 65, 75)
    """
    if count >= frames:
        return tuple(range(frames))
    return tuple((2 * part + 1) * frames // (2 * count) for part in range(count))
