"""Whether a folder has what a suite will look for, before a night on a GPU is spent on judging it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal, NamedTuple

import av
import numpy as np

from avd_trainer.evaluation.vbench.folder import Record, present

Kind = Literal["missing", "extra", "empty", "unreadable", "frames", "fps", "size", "blank", "frozen"]
"""What can be wrong: the file is not there, is none of the suite's, has no bytes, cannot be decoded; has another number
of frames, rate or size than the record says; shows one grey value; shows one picture."""

UNSEEN = 1
"""Of 255: luma that differs by no more does not differ to the eye."""
CELL, ENCODED = 8, 3
"""Side of a cell in pixels, and of 255: frames whose means over cells differ by no more are one picture. An encoder
writes the frames of a still clip anew: libx264 at our quality changes single pixels by 8 there, and cells by 1.9."""
LOOKED_AT = frozenset({"blank", "frozen"})
"""Kinds that are the student's own doing: made again, the videos are the same. The suite judges them as any others."""
STILL_IS_RIGHT = frozenset({"temporal_flickering"})
"""Dimensions whose prompts ask for pictures that stand still."""


class Fault(NamedTuple):
    """What is wrong with a file.

    Attributes:
        file: Within the student's folder.
        kind: One of :data:`Kind`.
        found: What came in place of what was expected.
        dimensions: Which judge it; none for a file that is not the suite's.
    """

    file: str
    kind: Kind
    found: str
    dimensions: tuple[str, ...]


def check_videos(folder: Path, record: Record, on_video: Callable[[], None] = lambda: None) -> list[Fault]:
    """Decode all videos of a folder, and look for those that are missing or too many.

    Args:
        folder: A student's.
        record: What it is for.
        on_video: Called after each video.

    Returns:
        All faults, at most one of a file: none if the folder is as the suite wants it.
    """
    faults = []
    there = present(folder, record)
    for each in record.videos:
        file, dimensions = each.video.file, each.video.dimensions
        if file not in there:
            faults.append(Fault(file, "missing", "no file", dimensions))
        elif wrong := _look_at(folder / file, record, still=not STILL_IS_RIGHT.isdisjoint(dimensions)):
            faults.append(Fault(file, *wrong, dimensions))
        on_video()
    extra = there - {each.video.file for each in record.videos}
    return faults + [Fault(file, "extra", "none of the suite's", ()) for file in sorted(extra)]


def count_faults(record: Record, faults: Sequence[Fault]) -> dict[str, Counter[str]]:
    """How many faults of each kind the videos of each dimension have; files of no dimension are under ``""``."""
    counts: dict[str, Counter[str]] = {dimension: Counter() for dimension in record.dimensions}
    for fault in faults:
        for dimension in fault.dimensions or ("",):
            counts.setdefault(dimension, Counter())[fault.kind] += 1
    return counts


def _look_at(path: Path, record: Record, *, still: bool) -> tuple[Kind, str] | None:
    """What is wrong with a file: its kind and what was found; None if nothing is."""
    expected = record.settings
    if path.stat().st_size == 0:
        return "empty", "no bytes"
    frames, least, most, moves = 0, 255, 0, False
    first: np.ndarray | None = None
    try:
        with av.open(path) as container:
            stream = container.streams.video[0]
            rate = float(stream.average_rate or 0)
            size = (stream.width, stream.height)
            for frame in container.decode(stream):
                luma = frame.to_ndarray(format="gray").astype(np.int16)
                cells = _cells(luma)
                first = cells if first is None else first
                least, most = min(least, int(luma.min())), max(most, int(luma.max()))
                moves = moves or float(abs(cells - first).max(initial=0)) > ENCODED
                frames += 1
    except (OSError, IndexError, av.FFmpegError) as error:
        return "unreadable", str(error) or type(error).__name__
    if frames != expected["frames"]:
        return "frames", f"{frames}, not {expected['frames']}"
    if abs(rate - expected["fps"]) > 0.01:
        return "fps", f"{rate:g}, not {expected['fps']:g}"
    if size != (expected["width"], expected["height"]):
        return "size", f"{size[0]}x{size[1]}, not {expected['width']}x{expected['height']}"
    if most - least <= UNSEEN:
        return "blank", f"luma {least} to {most} everywhere"
    if frames > 1 and not moves and not still:
        return "frozen", "all frames are the first one"
    return None


def _cells(luma: np.ndarray) -> np.ndarray:
    """Means over cells, ``[H // 8, W // 8]``; what is left at the right and at the bottom is not looked at."""
    height, width = (side // CELL for side in luma.shape)
    parts = luma[: height * CELL, : width * CELL].reshape(height, CELL, width, CELL)
    means: np.ndarray = parts.mean(axis=(1, 3))
    return means
