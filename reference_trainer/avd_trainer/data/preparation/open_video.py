"""A video file that is opened once for all that is read from it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Self

import av


class OpenVideo:
    """A video whose first frame is decoded; a context manager.

    Args:
        path: The file.

    Attributes:
        container: The open file.
        stream: Its first video stream.
        first: The first frame.
        rest: The frames behind it, decoded as they are asked for.
        hold: How long the last frame stays on screen, in seconds.

    Raises:
        ValueError: If it has no video or no frame; it says which.
        FFmpegError, OSError: If it cannot be decoded.
    """

    def __init__(self, path: Path) -> None:
        self.container = av.open(path)
        try:
            if not self.container.streams.video:
                raise ValueError("it has no video stream")
            self.stream = self.container.streams.video[0]
            self.stream.codec_context.thread_count = 1  # there are as many processes as cores
            self.hold = float(1 / self.stream.average_rate) if self.stream.average_rate else 0.0
            self.rest: Iterator[av.VideoFrame] = self.container.decode(self.stream)
            first = next(self.rest, None)
            if first is None:
                raise ValueError("it has no frames")
            self.first = first
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the file; once more does no harm."""
        self.container.close()
