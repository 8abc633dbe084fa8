"""What a file says about itself: size, rate, length, codec and licence."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from avd_trainer.data.preparation.stage import Done, FileStage, Row, StageSettings

LICENSE_FILES = ("LICENSE", "LICENSE.txt")


def probe(path: Path) -> dict[str, Any]:
    """Read a file's header and its first frame.

    Returns:
        ``width`` and ``height`` in pixels, upright; ``fps``, the average rate; ``milliseconds`` it lasts; ``codec`` and
        ``pixel_format`` by FFmpeg's names; ``licence``, see :func:`licence_of`.

    Raises:
        ValueError: If it has no video, no frame or no length; it says which.
        FFmpegError, OSError: If it cannot be decoded.
    """
    import av

    with av.open(path) as container:
        if not container.streams.video:
            raise ValueError("it has no video stream")
        stream = container.streams.video[0]
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
            "licence": licence_of(path),
        }


def licence_of(path: Path) -> str | None:
    """Licence of a video: ``license`` in ``NAME.json`` or ``NAME.info.json`` beside it (as yt-dlp writes it), or else
    the first line of a file ``LICENSE`` or ``LICENSE.txt`` in its folder; None if there is neither."""
    for beside in (path.with_suffix(".json"), path.with_suffix(".info.json")):
        if beside.is_file():
            try:
                said = json.loads(beside.read_text(encoding="utf-8"))
            except ValueError as error:
                raise ValueError(f"the file {beside.name} beside it is no JSON: {error}") from error
            if isinstance(said, dict) and said.get("license"):
                return str(said["license"])
    for name in LICENSE_FILES:
        if (file := path.parent / name).is_file():
            words = file.read_text(encoding="utf-8", errors="replace").strip().splitlines()
            if words:
                return words[0].strip()
    return None


def _seconds(duration: int | None, unit: Any) -> float:
    return float(duration * unit) if duration and unit else 0.0


class Probe(FileStage[StageSettings]):
    """What :func:`probe` reads."""

    name = "probe"
    Settings = StageSettings

    def run(self, row: Row) -> Done:
        return Done(probe(row.path))


STAGE = Probe
