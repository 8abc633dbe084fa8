"""One pass over a file: a stage sees all of its frames, and what clips will need of them is kept on the way.

So a file is decoded once, although where its clips are is known only when the pass is over.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from types import TracebackType
from typing import Self

import av
import numpy as np
from av.error import FFmpegError
from av.video.reformatter import VideoReformatter
from numpy.typing import NDArray

from avd_trainer.data.decoding import ROUNDING, scaled, shown_size
from avd_trainer.data.preparation.clip_reader import ClipFrames
from avd_trainer.data.preparation.open_video import OpenVideo
from avd_trainer.data.preparation.stage import FrameRequest, Frames, Span

_RECENT = 4
"""Frames that stay at hand, since a scene is found to have begun when the frames behind its first one are seen."""


class KeptFrames:
    """Frames of the clips that a file may have.

    They are kept for clips in the order of time until ``most`` bytes are held; later clips have to be decoded again.

    Args:
        fps: Frames per second of clips.
        requests: What stages will want to see of each clip.
        clips_ahead: Clips that a scene would give, by its start in milliseconds and by whether it is the file's first.
        most: Bytes.
    """

    def __init__(
        self,
        fps: float,
        requests: Sequence[FrameRequest],
        clips_ahead: Callable[[int, bool], Iterator[Span]],
        most: int,
    ) -> None:
        self._fps, self._requests, self._clips_ahead, self._most = fps, requests, clips_ahead, most
        self._clips: dict[Span, ClipFrames] = {}
        self._bytes = 0
        self._recent: deque[av.VideoFrame] = deque(maxlen=_RECENT)
        self._origin = 0.0
        self._coming: Iterator[Span] = iter(())
        self._gathering: dict[Span, ClipFrames] = {}

    def see(self, frame: av.VideoFrame) -> None:
        """Take the next frame of the file, which has a time."""
        assert frame.time is not None
        first = not self._recent
        self._recent.append(frame)
        if first:
            self._origin = frame.time
            self.begin_scene(0)
            return
        for span, clip in list(self._gathering.items()):
            with self._or_dropped(span):
                clip.see(frame)
        self._go_on()

    def begin_scene(self, start: int) -> None:
        """Take in that a scene began, in milliseconds; the clip that it ends is dropped."""
        self._gathering.clear()
        self._coming = self._clips_ahead(start, start == 0) if self._requests else iter(())
        self._go_on()

    def end(self, hold: float) -> None:
        """Take in that the file is over, and its last frame stays on screen for ``hold`` seconds."""
        for span, clip in list(self._gathering.items()):
            with self._or_dropped(span):
                clip.end(hold)
        self._put_away()
        self._gathering.clear()
        self._recent.clear()

    def take(self, span: Span, requests: Sequence[FrameRequest]) -> list[Frames] | None:
        """The frames of a clip that each request asks for, ``[F, H, W, 3]``; None if they were not kept."""
        clip = self._clips.get(span)
        if clip is None or not set(requests) <= set(self._requests):
            return None
        return clip.frames(requests)

    def drop(self, span: Span) -> None:
        """Forget a clip."""
        self._clips.pop(span, None)

    def _go_on(self) -> None:
        """Put whole clips away, and begin to gather the next one as soon as the one before it has begun."""
        self._put_away()
        while self._bytes < self._most and all(clip.shown for clip in self._gathering.values()):
            span = next(self._coming, None)
            if span is None:
                return
            start = span.start / 1000
            if (self._recent[0].time or 0.0) - self._origin > start + ROUNDING:
                continue  # what it began with is gone
            clip = ClipFrames(start, self._fps, self._requests, self._origin)
            self._gathering[span] = clip
            with self._or_dropped(span):
                for frame in self._recent:
                    clip.see(frame)
            self._put_away()

    @contextmanager
    def _or_dropped(self, span: Span) -> Iterator[None]:
        """Gather no more of a clip if one of its frames cannot be resized: it will be decoded again, and judged alone,
        where an error here would cost the whole file."""
        try:
            yield
        except (FFmpegError, ValueError):
            del self._gathering[span]

    def _put_away(self) -> None:
        for span in [span for span, clip in self._gathering.items() if clip.whole]:
            self._clips[span] = self._gathering.pop(span)
            self._bytes += self._clips[span].nbytes


class FileScan:
    """A file that stages look at whole: opened once, at the first look, and gone through from there.

    A context manager, which closes the file.

    Args:
        path: The file.
        keep: Makes what is filled while frames are iterated over; asked when that begins.
    """

    def __init__(self, path: Path, keep: Callable[[], KeptFrames]) -> None:
        self._path, self._keep = path, keep
        self._video: OpenVideo | None = None
        self._kept: KeptFrames | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._close()

    def open(self) -> OpenVideo:
        """The file and its first frame.

        Raises:
            FFmpegError, OSError, ValueError: If it cannot be decoded.
        """
        if self._video is None:
            self._video = OpenVideo(self._path)
        return self._video

    def frames(self, short_side: int) -> Iterator[tuple[int, NDArray[np.uint8]]]:
        """Times in milliseconds from the first frame and ``[H, W, 3]`` RGB of all frames, in order and of one size.

        Args:
            short_side: Height or width that they get, whichever is less, in pixels; roughly resized.

        Raises:
            FFmpegError, OSError, ValueError: If they cannot be decoded, have no times, or change their shape.
        """
        video, kept = self.open(), self._keep()
        self._kept = kept
        first: int | None = None
        shape, size = None, None
        by = VideoReformatter()
        try:
            for frame in chain([video.first], video.rest):
                if frame.time is None:
                    raise ValueError("its frames have no times; convert it to MP4")
                kept.see(frame)
                time = round(1000 * frame.time)
                first = time if first is None else first
                pixels = scaled(frame, short_side, by, roughly=True)
                if shape is not None and pixels.shape != shape:
                    raise ValueError(
                        f"its picture changes from {size} to {_size(frame)} at {(time - first) / 1000:g} s; "
                        "split it there"
                    )
                shape, size = pixels.shape, _size(frame)
                yield time - first, pixels
            kept.end(video.hold)
        finally:
            self._close()  # whoever goes through it again begins anew

    def begin_scene(self, start: int) -> None:
        """Tell that a scene was found to begin, in milliseconds from the first frame; the first one does by itself."""
        assert self._kept is not None
        self._kept.begin_scene(start)

    def _close(self) -> None:
        if self._video is not None:
            self._video.close()
            self._video = None


def _size(frame: av.VideoFrame) -> str:
    height, width = shown_size(frame)
    return f"{width}x{height}"
