"""Stillness: finds clips in which nothing moves."""

from __future__ import annotations

from avd_trainer.data.decoding import STILL, movement
from avd_trainer.data.preparation.stage import ClipStage, Done, FrameRequest, Frames, Limits, Row, Score


class StillSettings(Limits):
    """Of clips that stand still. The paper measures optical flow instead."""

    min: float | None = STILL
    """Clips below it are left out: nothing moves in them but the compression's noise."""


class Still(ClipStage[StillSettings]):
    """How far pixels stray from their mean over time, at the size that training sees."""

    name = "still"
    Settings = StillSettings
    reads = ("framing",)
    score = Score("movement", "deviation of pixels from their mean over time, as a share of their range")

    def frames(self, row: Row) -> FrameRequest:
        size = row.results["framing"]
        step = max(1, self.clip.frames // 8)  # about eight of them say it
        return FrameRequest(tuple(range(0, self.clip.frames, step)), cover=(size["height"], size["width"]))

    def run(self, row: Row, frames: Frames) -> Done:
        return Done({"movement": movement(frames)})


STAGE = Still
