"""What a file says about itself: size, rate, length and codec."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from avd_trainer.data.preparation.stage import Done, FileStage, Row, StageSettings


def probe(path: Path) -> dict[str, Any]:
    """Read a file's header and its first frame.

    Returns:
        ``width`` and ``height`` in pixels, upright; ``fps``, the average rate; ``milliseconds`` it lasts; ``codec`` and
        ``pixel_format`` by FFmpeg's names.

    Raises:
        ValueError: If it has no video, no frame or no length; it says which.
        FFmpegError, OSError: If it cannot be decoded.
    """
    import av

    with av.open(path) as container:
        if not container.streams.video:
            raise ValueError("it has no video stream")
        stream = container.streams.video[0]
        stream.codec_context.thread_count = 1  # there are as many processes as cores
        frame = next(container.decode(stream), None)
        if frame is None:
            raise ValueError("it has no frames")
        width, height = frame.width, frame.height
        if round(frame.rotation / 90) % 2:
            # Phones store upright videos sideways, with a note of how to turn them.
            width, height = height, width
        fps = stream.average_rate or stream.guessed_rate
        seconds = _seconds(stream.duration, stream.time_base) or _seconds(container.duration, 1 / av.time_base)
        if not fps or not seconds:
            raise ValueError("it does not say how long it is or how fast; convert it to MP4")
        return {
            "width": width,
            "height": height,
            "fps": float(fps),
            "milliseconds": round(1000 * seconds),
            "codec": stream.codec_context.name,
            "pixel_format": frame.format.name,
        }


def _seconds(duration: int | None, unit: Any) -> float:
    return float(duration * unit) if duration and unit else 0.0


class Probe(FileStage[StageSettings]):
    """What :func:`probe` reads."""

    name = "probe"
    version = 2
    Settings = StageSettings

    def run(self, row: Row) -> Done:
        return Done(probe(row.path))


STAGE = Probe
