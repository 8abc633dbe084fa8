"""Repeated frames: finds clips that show fewer pictures a second than they say."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from avd_trainer.data.preparation.stage import ClipStage, Done, FrameRequest, Frames, Limits, Row, Score

SAME = 0.3
"""Mean change in grey levels below which a frame is the one before it again: what compression alone changes."""
CLEARLY = 5.0
"""How many times as much the other frames change at least; a slow clip changes a little in every frame instead."""
JUMP = 0.1
"""Share of the typical large change from which on a change is a jump. Where bits are few, frames behind a new picture
still refine it, by up to a tenth of what it changed."""


def shown_rate(frames: Frames, fps: float) -> float:
    """Pictures a second that a clip really shows, by some of its frames.

    A video of 2 fps that was converted to 16 repeats each picture eight times; it teaches to move in jerks.

    Args:
        frames: ``[F, H, W, 3]`` uint8, consecutive ones, small.
        fps: Its frames per second.

    Returns:
        At most ``fps``; just that where next to nothing changes, and repeated frames cannot be told from a still scene.
    """
    changes = np.array([np.abs(one.astype(np.int16) - other).mean() for one, other in pairwise(frames)])
    moved = changes >= SAME
    jumps = moved & (changes >= JUMP * _typical(changes))
    # Pictures that are repeated jump one by one. A fast move amid slow ones does so frame after frame; a cut, once.
    if jumps.sum() > 1 and not (jumps[1:] & jumps[:-1]).any():
        moved = jumps
    if moved.all() or not moved.any() or np.median(changes[moved]) < CLEARLY * max(SAME, changes[~moved].mean()):
        return fps
    return float(fps * moved.mean())


def _typical(changes: NDArray[np.float64]) -> float:
    """The mean of changes, each with its own size for a weight: that of the large ones, however few they are."""
    return float((changes**2).sum() / changes.sum()) if changes.any() else 0.0


class RepeatsSettings(Limits):
    """Of repeated frames. The paper has no such step."""

    short_side: int = Field(default=64, ge=16)
    """Height or width of the frames that are compared, whichever is less, in pixels."""
    frames: int = Field(default=33, ge=2)
    """Consecutive frames that are compared, from the middle of the clip; all, if it has fewer. Two seconds show a rate
    of half a picture per second and more."""


class Repeats(ClipStage[RepeatsSettings]):
    """How many pictures a second a clip shows."""

    name = "repeats"
    version = 2
    Settings = RepeatsSettings
    score = Score("shown", "pictures per second that differ from the one before")

    def frames(self, row: Row) -> FrameRequest:
        start = max(0, self.clip.frames - self.settings.frames) // 2
        end = min(self.clip.frames, start + self.settings.frames)
        return FrameRequest(tuple(range(start, end)), self.settings.short_side)

    def run(self, row: Row, frames: Frames) -> Done:
        return Done({"shown": shown_rate(frames, self.clip.fps)})


STAGE = Repeats
