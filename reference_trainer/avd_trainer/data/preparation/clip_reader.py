"""Frames of clips, each clip decoded once for all stages that want some of it."""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import chain
from pathlib import Path
from types import TracebackType
from typing import Protocol, Self

import av
import numpy as np
from av.video.reformatter import VideoReformatter
from numpy.typing import NDArray

from avd_trainer.data.decoding import ROUNDING, OnScreen, fit, scaled
from avd_trainer.data.preparation.open_video import OpenVideo
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
        clip = ClipFrames(start, self._clip.fps, requests, video.origin)
        for frame in video.frames():
            clip.see(frame)
            if clip.whole:
                break
        else:
            clip.end(video.hold)
        if not clip.whole:
            raise ValueError(
                f"it ends {clip.shown} frames behind {start:g} s; a clip has {self._clip.frames} at "
                f"{self._clip.fps:g} per second"
            )
        return clip.frames(requests)

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
            self._video.close()
            self._video = None


class _Video:
    """An open video whose clips are read; times are in seconds from its first frame.

    Attributes:
        origin: The first frame's own time.
        hold: How long the last frame stays on screen.
        jumps: Whether :meth:`jump` can be relied on.
    """

    def __init__(self, path: Path) -> None:
        self._video = OpenVideo(path)
        first = self._video.first
        if first.time is None:
            self.close()
            raise ValueError("its frames have no times; convert it to MP4")
        self.origin, self.hold = first.time, self._video.hold
        self.jumps = any(name in self._video.container.format.name for name in _EXACT)
        self._decoded = self._video.rest
        # The frame on screen and the one that says how long: the next clip may begin between them.
        self._recent = deque([first], maxlen=2)

    def close(self) -> None:
        """Close the file."""
        self._video.close()

    @property
    def now(self) -> float:
        """Time of the earliest frame that is still at hand."""
        return (self._recent[0].time or 0.0) - self.origin

    def skip(self) -> bool:
        """Decode one more frame; False if there is none."""
        return next(self._more(), None) is not None

    def jump(self, time: float) -> bool:
        """Go to the last key frame that is not later; False if that did not succeed."""
        container, stream = self._video.container, self._video.stream
        assert stream.time_base is not None
        container.seek(int((time + self.origin) / stream.time_base), stream=stream)
        self._decoded = container.decode(stream)
        self._recent.clear()
        return self.skip() and self.now <= time + ROUNDING

    def frames(self) -> Iterator[av.VideoFrame]:
        """Those at hand, and all that follow."""
        return chain(list(self._recent), self._more())

    def _more(self) -> Iterator[av.VideoFrame]:
        for frame in self._decoded:
            self._recent.append(frame)
            yield frame


class ClipFrames:
    """What requests want to see of a clip, gathered as the frames of its file come.

    Args:
        start: Of the clip, in seconds from the file's first frame.
        fps: Frames per second of clips.
        requests: At least one.
        origin: The first frame's own time.

    Attributes:
        shown: Frames of the clip that were on screen so far.
        nbytes: That what was gathered takes.
    """

    def __init__(self, start: float, fps: float, requests: Sequence[FrameRequest], origin: float) -> None:
        last = max(index for request in requests for index in request.indices)
        self._screen = OnScreen([start + index / fps for index in range(last + 1)], origin)
        self._found: dict[FrameRequest, list[NDArray[np.uint8]]] = {request: [] for request in requests}
        self._resizing = defaultdict[tuple[object, ...], VideoReformatter](VideoReformatter)
        self.shown = 0
        self.nbytes = 0

    @property
    def whole(self) -> bool:
        """Whether all that was asked for is there."""
        return self._screen.done

    def see(self, frame: av.VideoFrame) -> None:
        """Take the next frame of the file.

        Raises:
            FFmpegError, ValueError: If it has no time or cannot be resized.
        """
        self._add(self._screen.see(frame))

    def end(self, hold: float) -> None:
        """Take in that the file is over, and its last frame stays on screen for ``hold`` seconds."""
        self._add(self._screen.end(hold))

    def frames(self, requests: Sequence[FrameRequest]) -> list[Frames]:
        """What some of the requests asked for, if all is there; equal requests get one array."""
        found = {request: np.stack(self._found[request]) for request in set(requests)}
        return [found[request] for request in requests]

    def _add(self, frames: Iterable[av.VideoFrame]) -> None:
        for frame in frames:
            resized: dict[tuple[object, ...], NDArray[np.uint8]] = {}
            for request, found in self._found.items():
                if self.shown in request.indices:
                    how = request[1:]
                    if how not in resized:
                        resized[how] = np.ascontiguousarray(
                            _resize(frame, request, self._resizing[how])
                        )  # no part of a larger one
                        self.nbytes += resized[how].nbytes
                    found.append(resized[how])
            self.shown += 1


def _resize(frame: av.VideoFrame, request: FrameRequest, by: VideoReformatter) -> NDArray[np.uint8]:
    return scaled(frame, request.short_side, by) if request.cover is None else fit(frame, *request.cover, by)
