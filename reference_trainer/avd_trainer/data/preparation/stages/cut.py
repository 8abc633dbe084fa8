"""Scene changes: a clip with a cut in it teaches cuts."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from avd_trainer.data.preparation.needs import package_missing
from avd_trainer.data.preparation.stage import Done, Row, Scan, ScanStage, Span, StageSettings

_AROUND = 2
"""Frames before and behind one, with whose changes its own is compared."""


class CutSettings(StageSettings):
    """Of cuts. Fades and dissolves are not found."""

    time_limit: float = Field(default=3600.0, gt=0)
    """Seconds for one file, all of whose frames are decoded."""
    threshold: float | None = Field(default=3.0, gt=0)
    """How many times the change of its neighbourhood a cut's change is at least, as PySceneDetect's adaptive detector
    has it; None takes each file for one scene, such as clips that were cut before."""
    least_change: float = Field(default=15.0, ge=0)
    """What a cut changes at least, in levels of hue, saturation and luma from 0 to 255, on average."""
    shortest: int = Field(default=15, ge=1)
    """Frames of the file that a scene has at least; cuts that follow each other faster count as one."""
    short_side: int = Field(default=90, ge=16)
    """Height or width of the frames that are compared, whichever is less, in pixels."""


def find_scenes(
    frames: Iterable[tuple[int, NDArray[np.uint8]]],
    settings: CutSettings,
    on_scene: Callable[[int], None] = lambda start: None,
) -> list[Span]:
    """Cut a video where its content changes at once.

    A cut is where the mean change of hue, saturation and luma between two frames stands out from those of the two
    frames before and behind, so that fast motion is none.

    Args:
        frames: Times in milliseconds and ``[H, W, 3]`` uint8 RGB, in order; at least one.
        settings: With a threshold.
        on_scene: Called with the start of each scene but the first, two frames after it.

    Returns:
        Scenes in order, without gaps, from 0 to the end of the last frame.
    """
    import cv2

    assert settings.threshold is not None
    times: list[int] = []
    changes: list[float] = []
    cuts = [0]
    before: cv2.typing.MatLike | None = None
    for time, frame in frames:
        colours = cv2.cvtColor(frame, cv2.COLOR_RGB2HSV)
        changes.append(0.0 if before is None else cv2.norm(colours, before, cv2.NORM_L1) / colours.size)
        times.append(time)
        before = colours
        place = len(times) - 1 - _AROUND
        if place - cuts[-1] >= settings.shortest and _stands_out(changes[-1 - 2 * _AROUND :], settings):
            cuts.append(place)
            on_scene(times[place] - times[0])
    last = times[-1] - times[-2] if len(times) > 1 else 0
    edges = [*(times[cut] for cut in cuts), times[-1] + last]
    return [Span(start - times[0], end - times[0]) for start, end in pairwise(edges)]


def _stands_out(changes: Sequence[float], settings: CutSettings) -> bool:
    """Whether the change in the middle is a cut's, judged by those around it."""
    assert settings.threshold is not None
    if len(changes) <= 2 * _AROUND:
        return False
    change = changes[_AROUND]
    around = (sum(changes) - change) / (2 * _AROUND)
    return change >= settings.least_change and change >= settings.threshold * around


class Cut(ScanStage[CutSettings]):
    """Scenes of a file: ``{"scenes": [[start, end], ...]}`` in milliseconds from its first frame."""

    name = "cut"
    version = 2
    Settings = CutSettings
    reads = ("probe",)

    def missing(self) -> str | None:
        # Without a threshold, nothing is looked for.
        return None if self.settings.threshold is None else package_missing(self.name, "cv2", "prepare")

    def run(self, row: Row, scan: Scan) -> Done:
        if self.settings.threshold is None:
            return Done({"scenes": [[0, row.results["probe"]["milliseconds"]]]})
        found = find_scenes(scan.frames(self.settings.short_side), self.settings, scan.begin_scene)
        return Done({"scenes": [list(scene) for scene in found]})


STAGE = Cut
