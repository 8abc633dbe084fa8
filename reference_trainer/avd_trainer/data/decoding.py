"""Frames of video files by PyAV, without PyTorch, which processes that only decode need not load."""

from __future__ import annotations

import codecs
import re
from collections.abc import Iterable, Iterator
from fractions import Fraction
from itertools import count
from pathlib import Path
from typing import NamedTuple, cast

import av
import numpy as np
from av.error import FFmpegError
from av.video.reformatter import Interpolation, VideoReformatter
from numpy.typing import NDArray

from avd_trainer.runtime.errors import UserError

# Named, because FFmpeg would also play text files and pictures.
VIDEO_SUFFIXES = frozenset(
    [".avi", ".flv", ".gif", ".m2ts", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".mts", ".ogv", ".ts", ".webm"]
)
PICTURE_SUFFIXES = frozenset([".bmp", ".jpeg", ".jpg", ".png", ".webp"])
"""Of pictures that may be the frames of a clip."""
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


def holds_frames(folder: Path) -> bool:
    """Whether a folder is one clip: pictures whose names end in numbers, and no video beside them."""
    return len(_numbered(folder)) > 1 and not any(path.suffix.lower() in VIDEO_SUFFIXES for path in folder.iterdir())


def read_frames(path: Path, fps: float | None = None) -> Iterator[av.VideoFrame]:
    """The frames of a video, or of a folder of numbered pictures.

    Args:
        path: Of the file, or of the folder.
        fps: How many of a folder's pictures there are a second; a file says so itself.

    Raises:
        ValueError: If a file has no video stream, or a folder's pictures have not all one size or a number is missing.
        FFmpegError, OSError: If a file cannot be decoded.
    """
    if path.is_dir():
        assert fps is not None
        yield from _read_pictures(path, fps)
        return
    with av.open(path) as container:
        if not container.streams.video:
            raise ValueError("it has no video stream")
        yield from container.decode(video=0)


def _read_pictures(folder: Path, fps: float) -> Iterator[av.VideoFrame]:
    pictures = _numbered(folder)
    first, size = pictures[0][0], None
    for place, (number, path) in enumerate(pictures):
        if number != first + place:
            raise ValueError(f"{path.name} is where picture {first + place} should be: numbers go up by one")
        try:
            frame = next(read_frames(path), None)
        except FFmpegError as error:
            raise ValueError(f"{path.name}: {reason(error)}") from error
        if frame is None:
            raise ValueError(f"{path.name} holds no picture")
        size = size or (frame.width, frame.height)
        if (frame.width, frame.height) != size:
            raise ValueError(f"{path.name} has {frame.width}x{frame.height} pixels, {size[0]}x{size[1]} were expected")
        frame.pts, frame.time_base = place, 1 / Fraction(fps).limit_denominator(1001)
        yield frame


def _numbered(folder: Path) -> list[tuple[int, Path]]:
    """A folder's pictures with the numbers in which their names end, in their order."""
    found = []
    for path in folder.iterdir() if folder.is_dir() else ():
        number = re.search(r"\d+$", path.stem)
        if number is not None and path.suffix.lower() in PICTURE_SUFFIXES:
            found.append((int(number[0]), path))
    return sorted(found)


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
        return FoundCaption(name_as_caption(path))
    text, encoding = _decode_text(beside.read_bytes())
    return FoundCaption(text.strip(), beside.name, encoding)


def name_as_caption(path: Path) -> str:
    """A video's name with separators as blanks: a makeshift caption."""
    return path.stem.replace("_", " ").replace("-", " ")


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


def at_rate(frames: Iterable[av.VideoFrame], fps: float) -> Iterator[av.VideoFrame]:
    """The frame that is on screen at each of 0, 1 / fps, 2 / fps, ... seconds from the first one."""
    screen = OnScreen(number / fps for number in count())
    for frame in frames:
        yield from screen.see(frame)
    yield from screen.end()


class OnScreen:
    """The frame that is on screen at each of some times, told as frames come.

    Args:
        times: Ascending, in seconds.
        origin: Time of the video's first frame, which counts as 0; None if the first that is seen is that.
    """

    def __init__(self, times: Iterable[float], origin: float | None = None) -> None:
        self._wanted, self._origin = iter(times), origin
        self._time = next(self._wanted, None)
        self._shown: av.VideoFrame | None = None
        self._since = 0.0  # when it came on screen

    @property
    def done(self) -> bool:
        """Whether no time is left."""
        return self._time is None

    def see(self, frame: av.VideoFrame) -> Iterator[av.VideoFrame]:
        """Take the next frame of the video; those that it shows to have been on screen, one for each time.

        Raises:
            ValueError: If it has no time.
        """
        if frame.time is None:
            raise ValueError("its frames have no times; convert it to MP4")
        self._origin = frame.time if self._origin is None else self._origin
        yield from self._until(frame.time - self._origin - ROUNDING)
        self._shown, self._since = frame, frame.time - self._origin

    def end(self, hold: float = 0.0) -> Iterator[av.VideoFrame]:
        """What else is on screen if the video is over, and its last frame stays for ``hold`` seconds."""
        yield from self._until(self._since + max(ROUNDING, hold))

    def _until(self, end: float) -> Iterator[av.VideoFrame]:
        while self._shown is not None and self._time is not None and self._time < end:
            yield self._shown
            self._time = next(self._wanted, None)


def fit(frame: av.VideoFrame, height: int, width: int, by: VideoReformatter | None = None) -> NDArray[np.uint8]:
    """Resize a frame to cover ``height`` x ``width``, and cut out its centre; ``[height, width, 3]`` RGB.

    Args:
        frame: Of a video.
        height: In pixels.
        width: Likewise.
        by: What resizes. The same one for many frames that get one size prepares once, which counts for small sizes.
    """
    turns = _turns(frame)
    if turns % 2:
        height, width = width, height
    scale = max(height / frame.height, width / frame.width)
    pixels = _resized(frame, max(height, round(frame.height * scale)), max(width, round(frame.width * scale)), by)
    top, left = (pixels.shape[0] - height) // 2, (pixels.shape[1] - width) // 2
    return np.rot90(pixels[top : top + height, left : left + width], turns)


def scaled(
    frame: av.VideoFrame, short_side: int | None, by: VideoReformatter | None = None, *, roughly: bool = False
) -> NDArray[np.uint8]:
    """Resize a frame so that its lesser side has ``short_side`` pixels, or not at all; ``[H, W, 3]`` RGB.

    ``by`` is that of :func:`fit`. ``roughly`` takes half the time where it shrinks, since it leaves out pixels rather
    than averaging all.
    """
    scale = 1.0 if short_side is None else short_side / min(frame.height, frame.width)
    height, width = round(frame.height * scale), round(frame.width * scale)
    return np.rot90(_resized(frame, height, width, by, roughly=roughly), _turns(frame))


def shown_size(frame: av.VideoFrame) -> tuple[int, int]:
    """Height and width in which a frame is to be shown."""
    return (frame.width, frame.height) if _turns(frame) % 2 else (frame.height, frame.width)


def _turns(frame: av.VideoFrame) -> int:
    # Phones store upright videos sideways, with a note of how to turn them.
    return round(frame.rotation / 90)


def _resized(
    frame: av.VideoFrame, height: int, width: int, by: VideoReformatter | None, *, roughly: bool = False
) -> NDArray[np.uint8]:
    resized = (by or VideoReformatter()).reformat(
        frame,
        width=width,
        height=height,
        format="rgb24",
        interpolation=Interpolation.FAST_BILINEAR if roughly else Interpolation.BILINEAR,
        threads=1,  # otherwise each frame starts as many as there are cores, and waits for them
    )
    return cast(NDArray[np.uint8], resized.to_ndarray())
