"""Stages that need neither videos nor weights. In a file that other processes can import."""

from __future__ import annotations

from typing import ClassVar

import numpy as np
from pydantic import Field

from avd_trainer.data.preparation.stage import (
    SPAN,
    ClipStage,
    Done,
    FileStage,
    FrameRequest,
    Frames,
    Limits,
    Outcome,
    Row,
    Score,
    StageSettings,
)


class ToySpanSettings(StageSettings):
    clips: int = Field(default=3, ge=0)


class ToySpan(FileStage[ToySpanSettings]):
    """A few clips of half a second each, whatever the file holds."""

    name = SPAN
    Settings = ToySpanSettings

    def run(self, row: Row) -> Outcome:
        return Done({"clips": [[500 * number, 500 * number + 500] for number in range(self.settings.clips)]})


class BrightnessSettings(Limits):
    at: tuple[int, ...] = (0, 2)


class Brightness(ClipStage[BrightnessSettings]):
    """Mean of all values of some frames, in 0 to 255."""

    name = "brightness"
    Settings = BrightnessSettings
    score: ClassVar = Score("mean", "mean of all values, 0 to 255")

    def frames(self, row: Row) -> FrameRequest:
        return FrameRequest(self.settings.at, short_side=16)

    def run(self, row: Row, frames: Frames) -> Outcome:
        return Done({"mean": float(np.mean(frames))})


class ContrastSettings(Limits):
    gain: float = 1.0


class Contrast(ClipStage[ContrastSettings]):
    """A stage that reads another one and no frames."""

    name = "contrast"
    Settings = ContrastSettings
    reads = (Brightness.name,)
    score: ClassVar = Score("value", "gain times distance of the brightness from grey")

    def run(self, row: Row, frames: Frames) -> Outcome:
        assert not frames.size
        return Done({"value": self.settings.gain * abs(row.results[Brightness.name]["mean"] - 127.5)})
