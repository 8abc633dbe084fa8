"""What a file says about itself: size, rate, length and codec."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from avd_trainer.data.preparation.stage import Done, Row, Scan, ScanStage, StageSettings

if TYPE_CHECKING:
    from avd_trainer.data.preparation.open_video import OpenVideo


def probe(video: OpenVideo) -> dict[str, Any]:
    """Read a file's header and its first frame.

    Returns:
        ``width`` and ``height`` in pixels, upright; ``fps``, the average rate; ``milliseconds`` it lasts; ``codec`` and
        ``pixel_format`` by FFmpeg's names.

    Raises:
        ValueError: If it has no length.
    """
    import av

    from avd_trainer.data.decoding import shown_size

    stream, container = video.stream, video.container
    height, width = shown_size(video.first)
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
        "pixel_format": video.first.format.name,
    }


def _seconds(duration: int | None, unit: Any) -> float:
    return float(duration * unit) if duration and unit else 0.0


class Probe(ScanStage[StageSettings]):
    """What :func:`probe` reads."""

    name = "probe"
    version = 2
    Settings = StageSettings

    def run(self, row: Row, scan: Scan) -> Done:
        return Done(probe(scan.open()))


STAGE = Probe
