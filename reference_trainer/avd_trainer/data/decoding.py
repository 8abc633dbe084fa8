"""Frames of video files by PyAV, without PyTorch, which processes that only decode need not load."""

from __future__ import annotations

import codecs
from collections.abc import Iterable, Iterator
from itertools import count
from pathlib import Path
from typing import NamedTuple, cast

import av
import numpy as np
from av.error import FFmpegError
from numpy.typing import NDArray

from avd_trainer.runtime.errors import UserError

# Named, because FFmpeg would also play text files and pictures.
VIDEO_SUFFIXES = frozenset(
    [".avi", ".flv", ".gif", ".m2ts", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".mts", ".ogv", ".ts", ".webm"]
)
# Seconds by which a frame's time may be off: containers round to milliseconds.
ROUNDING = 2e-3
# Below this :func:`movement` nothing moves but the compression's noise.
STILL = 1e-3
UTF_8 = "utf-8"


def video_files(folder: Path) -> list[Path]:
    """Files below ``folder`` that look like videos, sorted.

    Raises:
        UserError: If there are none.
    """
    if not folder.is_dir():
        raise UserError(f"{folder} is not a folder. Pass the folder that holds your video files.")
    paths = sorted(p for p in folder.rglob("*") if p.suffix.lower() in VIDEO_SUFFIXES and p.is_file())
    if not paths:
        raise UserError(f"{folder} holds no video files. Looked for {', '.join(sorted(VIDEO_SUFFIXES))}.")
    return paths


class FoundCaption(NamedTuple):
    """Caption of a video.

    Attributes:
        text: What it says; nothing where the text file is empty.
        file: Name of the text file; None where there is none, and the video's name is the caption.
        encoding: How the text file was read.
    """

    text: str
    file: str | None = None
    encoding: str = UTF_8


def find_caption(path: Path) -> FoundCaption:
    """The ``.txt`` file beside a video, in UTF-8 or what else it seems to be; without one, the video's name with
    separators as blanks. An empty text file is an empty caption.

    Raises:
        OSError: If the text file is there and cannot be read.
    """
    beside = path.with_suffix(".txt")
    if not beside.is_file():
        return FoundCaption(path.stem.replace("_", " ").replace("-", " "))
    text, encoding = _decode_text(beside.read_bytes())
    return FoundCaption(text.strip(), beside.name, encoding)


def caption_of(path: Path) -> str:
    """The text of :func:`find_caption`."""
    return find_caption(path).text


def _decode_text(content: bytes) -> tuple[str, str]:
    """The text, and the encoding in which it was read."""
    if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return content.decode("utf-16", errors="replace"), "utf-16"
    try:
        return content.decode("utf-8-sig"), UTF_8
    except UnicodeDecodeError:
        pass
    try:
        # What old Windows programs write: Latin-1, and curly quotes where that has control characters.
        return content.decode("windows-1252"), "windows-1252"
    except UnicodeDecodeError:
        return content.decode("latin-1"), "latin-1"  # has a letter for every byte


def movement(frames: NDArray[np.uint8]) -> float:
    """How far pixels stray from their mean over time, as a share of their range: the mean of their standard deviations
    over some frames ``[F, ...]``, about eight of a clip."""
    return float(frames.astype(np.float32).std(axis=0).mean() / 255)


def reason(error: Exception) -> str:
    """Why a video could not be decoded, without FFmpeg's number and the file's name."""
    return (error.strerror if isinstance(error, FFmpegError | OSError) else None) or str(error)


def at_rate(frames: Iterator[av.VideoFrame], fps: float) -> Iterator[av.VideoFrame]:
    """The frame that is on screen at each of 0, 1 / fps, 2 / fps, ... seconds from the first one."""
    return at_times(frames, (number / fps for number in count()))


def at_times(
    frames: Iterable[av.VideoFrame], times: Iterable[float], *, origin: float | None = None, hold: float = 0.0
) -> Iterator[av.VideoFrame]:
    """The frame that is on screen at each of some times.

    Args:
        frames: In order.
        times: Ascending, in seconds.
        origin: Time of the video's first frame, which counts as 0; None if ``frames`` begin with it.
        hold: Seconds that the last frame stays on screen.

    Yields:
        As many frames as there are times, or fewer if the video ends before.

    Raises:
        ValueError: If frames have no times.
    """
    wanted = iter(times)
    time = next(wanted, None)
    shown: av.VideoFrame | None = None
    since = 0.0  # when it came on screen
    for frame in frames:
        if frame.time is None:
            raise ValueError("its frames have no times; convert it to MP4")
        origin = frame.time if origin is None else origin
        while shown is not None and time is not None and time < frame.time - origin - ROUNDING:
            yield shown
            time = next(wanted, None)
        if time is None:  # before another frame is decoded
            return
        shown, since = frame, frame.time - origin
    while shown is not None and time is not None and time < since + max(ROUNDING, hold):
        yield shown
        time = next(wanted, None)


def fit(frame: av.VideoFrame, height: int, width: int) -> NDArray[np.uint8]:
    """Resize a frame to cover ``height`` x ``width``, and cut out its centre; ``[height, width, 3]`` RGB."""
    turns = _turns(frame)
    if turns % 2:
        height, width = width, height
    scale = max(height / frame.height, width / frame.width)
    pixels = _resized(frame, max(height, round(frame.height * scale)), max(width, round(frame.width * scale)))
    top, left = (pixels.shape[0] - height) // 2, (pixels.shape[1] - width) // 2
    return np.rot90(pixels[top : top + height, left : left + width], turns)


def scaled(frame: av.VideoFrame, short_side: int | None) -> NDArray[np.uint8]:
    """Resize a frame so that its lesser side has ``short_side`` pixels, or not at all; ``[H, W, 3]`` RGB."""
    scale = 1.0 if short_side is None else short_side / min(frame.height, frame.width)
    return np.rot90(_resized(frame, round(frame.height * scale), round(frame.width * scale)), _turns(frame))


def shown_size(frame: av.VideoFrame) -> tuple[int, int]:
    """Height and width in which a frame is to be shown."""
    return (frame.width, frame.height) if _turns(frame) % 2 else (frame.height, frame.width)


def _turns(frame: av.VideoFrame) -> int:
    # Phones store upright videos sideways, with a note of how to turn them.
    return round(frame.rotation / 90)


def _resized(frame: av.VideoFrame, height: int, width: int) -> NDArray[np.uint8]:
    return cast(NDArray[np.uint8], frame.reformat(width=width, height=height, format="rgb24").to_ndarray())
