"""Frames of clips, each clip decoded once for all stages that want some of it."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from itertools import chain
from pathlib import Path
from types import TracebackType
from typing import Protocol, Self

import av
import numpy as np

from avd_trainer.data.decoding import ROUNDING, at_times, fit, scaled
from avd_trainer.data.preparation.stage import ClipSettings, FrameRequest, Frames, Span

_SEEK_BEYOND = 20.0
"""Seconds of video that are decoded and thrown away rather than jumped over: key frames may be as far apart."""
_CLOSE = 1.0
"""Seconds before a clip from which on frames count as the clip's work, and no longer as the way to it."""
_EXACT = ("mp4", "matroska")
"""Containers with an index, in which a jump lands on a key frame at or before the time asked for."""


class Reader(Protocol):
    """Reads clips of one file; a context manager."""

    def read(self, span: Span, requests: Sequence[FrameRequest]) -> list[Frames]:
        """The frames of a clip that each request asks for, ``[F, H, W, 3]`` RGB uint8.

        Raises:
            FFmpegError, OSError, ValueError: If it cannot be decoded, or ends before the clip does.
        """

    def __enter__(self) -> Self: ...
    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


OpenReader = Callable[[Path, ClipSettings, Callable[[], None]], Reader]
"""From a file, the clips' settings and what to call while frames are skipped, to a reader."""


class VideoReader:
    """Reads clips of a video file; faster if they are asked for in their order.

    Args:
        path: The file.
        clip: Frames and frame rate of clips.
        on_frame: Called for each frame that is decoded before a clip begins.
    """

    def __init__(self, path: Path, clip: ClipSettings, on_frame: Callable[[], None] = lambda: None) -> None:
        self._path, self._clip, self._on_frame = path, clip, on_frame
        self._video: _Video | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._close()

    def read(self, span: Span, requests: Sequence[FrameRequest]) -> list[Frames]:
        try:
            return self._collect(self._video_at(span.start / 1000), span.start / 1000, requests)
        except BaseException:
            self._close()  # the next clip begins with a fresh decoder
            raise

    def _collect(self, video: _Video, start: float, requests: Sequence[FrameRequest]) -> list[Frames]:
        found: list[list[Frames]] = [[] for _ in requests]
        count = 1 + max(index for request in requests for index in request.indices)
        times = [start + index / self._clip.fps for index in range(count)]
        shown = 0
        for index, frame in enumerate(at_times(video.frames(), times, origin=video.origin, hold=video.hold)):
            resized: dict[tuple[object, ...], Frames] = {}
            for request, frames in zip(requests, found, strict=True):
                if index in request.indices:
                    how = request[1:]
                    if how not in resized:
                        resized[how] = _resize(frame, request)
                    frames.append(resized[how])
            shown += 1
        if shown < count:
            raise ValueError(
                f"it ends {shown} frames behind {start:g} s; a clip has {self._clip.frames} at {self._clip.fps:g} per "
                "second"
            )
        return [np.stack(frames) for frames in found]

    def _video_at(self, start: float) -> _Video:
        """The video, at a frame that is not later than ``start`` seconds."""
        video = self._video
        if video is None or start + ROUNDING < video.now:
            video = self._open()
        if video.jumps and start - video.now > _SEEK_BEYOND and not video.jump(start):
            video = self._open()
        while video.now < start - _CLOSE:
            self._on_frame()
            if not video.skip():
                break
        return video

    def _open(self) -> _Video:
        self._close()
        self._video = _Video(self._path)
        return self._video

    def _close(self) -> None:
        if self._video is not None:
            self._video.container.close()
            self._video = None


class _Video:
    """An open video; times are in seconds from its first frame.

    Attributes:
        container: To be closed.
        origin: The first frame's own time.
        hold: How long the last frame stays on screen.
        jumps: Whether :meth:`jump` can be relied on.
    """

    def __init__(self, path: Path) -> None:
        self.container = av.open(path)
        try:
            if not self.container.streams.video:
                raise ValueError("it has no video stream")
            self._stream = self.container.streams.video[0]
            self._stream.codec_context.thread_count = 1  # there are as many processes as cores
            self.hold = float(1 / self._stream.average_rate) if self._stream.average_rate else 0.0
            self.jumps = any(name in self.container.format.name for name in _EXACT)
            self._decoded = self.container.decode(self._stream)
            first = next(self._decoded, None)
            if first is None:
                raise ValueError("it has no frames")
            if first.time is None:
                raise ValueError("its frames have no times; convert it to MP4")
        except BaseException:
            self.container.close()
            raise
        self.origin = first.time
        # The frame on screen and the one that says how long: the next clip may begin between them.
        self._recent = deque([first], maxlen=2)

    @property
    def now(self) -> float:
        """Time of the earliest frame that is still at hand."""
        return (self._recent[0].time or 0.0) - self.origin

    def skip(self) -> bool:
        """Decode one more frame; False if there is none."""
        return next(self._more(), None) is not None

    def jump(self, time: float) -> bool:
        """Go to the last key frame that is not later; False if that did not succeed."""
        time_base = self._stream.time_base
        assert time_base is not None
        self.container.seek(int((time + self.origin) / time_base), stream=self._stream)
        self._decoded = self.container.decode(self._stream)
        self._recent.clear()
        return self.skip() and self.now <= time + ROUNDING

    def frames(self) -> Iterator[av.VideoFrame]:
        """Those at hand, and all that follow."""
        return chain(list(self._recent), self._more())

    def _more(self) -> Iterator[av.VideoFrame]:
        for frame in self._decoded:
            self._recent.append(frame)
            yield frame


def _resize(frame: av.VideoFrame, request: FrameRequest) -> Frames:
    return scaled(frame, request.short_side) if request.cover is None else fit(frame, *request.cover)
