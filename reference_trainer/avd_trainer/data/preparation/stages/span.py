"""Spans: the clips of the recipe's length that scenes hold."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import count

from pydantic import Field

from avd_trainer.data.preparation.stage import ClipSettings, Done, FileStage, Row, Span, StageSettings

# Milliseconds by which a frame's time may be off: containers round them.
ROUNDING = 2


class SpanSettings(StageSettings):
    """How clips are cut out of scenes."""

    margin: int = Field(default=100, ge=0)
    """Milliseconds that are left out on both sides of a cut, where frames may be blended."""
    most: int | None = Field(default=None, ge=1)
    """Clips of a file at most, from its start; None for all."""


def find_spans(scenes: Sequence[Span], clip: ClipSettings, settings: SpanSettings) -> list[Span]:
    """Clips without overlap that lie within one scene each; the rest at a scene's end is dropped.

    Args:
        scenes: In order.
        clip: Length of a clip; its last frame is shown ``(frames - 1) / fps`` seconds behind its first.
        settings: How they are cut.

    Returns:
        Spans in order, at least one.

    Raises:
        ValueError: If no scene is long enough; it says how long the longest one is, and which length would fit.
    """
    spans: list[Span] = []
    for start, held in _held(scenes, clip, settings):
        spans += [_span(start, number, clip) for number in range(held // clip.frames)]
    if not spans:
        longest = longest_scene(scenes, clip, settings)
        fitting = fitting_length([longest])
        remedy = "" if fitting is None else f"; clips of {fitting} frames would fit (clip.frames={fitting})"
        raise ValueError(
            f"its longest scene has {longest} frames at {clip.fps:g} fps ({longest / clip.fps:.2f} s), a clip takes "
            f"{clip.frames}{remedy}"
        )
    return spans[: settings.most]


def _span(start: int, number: int, clip: ClipSettings) -> Span:
    """Of a scene from ``start`` on, the clip of this number."""
    begin = start + round(1000 * number * clip.frames / clip.fps)
    return Span(begin, begin + clip.milliseconds)


def longest_scene(scenes: Sequence[Span], clip: ClipSettings, settings: SpanSettings) -> int:
    """Frames of the longest clip that one of the scenes could give, at the clips' frame rate."""
    return max((held for _, held in _held(scenes, clip, settings)), default=0)


def fitting_length(longest: Sequence[int]) -> int | None:
    """The most frames, ``1 + 4 n``, that a clip can have to fit into most files, or at least into one.

    Args:
        longest: Frames of each file's longest scene.
    """
    ordered = sorted(longest, reverse=True)
    candidates = [(ordered[place] - 1) // 4 * 4 + 1 for place in (len(ordered) // 2, 0)]
    return next((frames for frames in candidates if frames > 1), None)


def _held(scenes: Sequence[Span], clip: ClipSettings, settings: SpanSettings) -> Iterator[tuple[int, int]]:
    """Of each scene, without its margins, the start and the number of frames at the clips' frame rate."""
    for number, (start, end) in enumerate(scenes):
        start += _margin(number == 0, settings)
        end -= settings.margin * (number < len(scenes) - 1)
        # Frames at start, start + 1000 / fps, ..., all of them before the scene's end.
        yield start, max(0, math.ceil((end - start - ROUNDING) * clip.fps / 1000))


def _margin(first: bool, settings: SpanSettings) -> int:
    """Milliseconds that are left out of a scene's start, which is no cut where the file begins."""
    return 0 if first else settings.margin


class ClipSpans(FileStage[SpanSettings]):
    """Clips of a file: ``{"clips": [[start, end], ...]}`` in milliseconds from its first frame."""

    name = "span"
    Settings = SpanSettings
    reads = ("cut",)
    reads_clip = True

    def run(self, row: Row) -> Done:
        scenes = [Span(*scene) for scene in row.results["cut"]["scenes"]]
        return Done({"clips": [list(span) for span in find_spans(scenes, self.clip, self.settings)]})

    def clips_ahead(self, start: int, first: bool) -> Iterator[Span]:
        return (_span(start + _margin(first, self.settings), number, self.clip) for number in count())


STAGE = ClipSpans
