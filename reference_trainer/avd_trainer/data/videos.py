"""The user's own video files as training clips."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path

import av
import torch
from av.error import FFmpegError
from torch import Tensor

from avd_trainer.data.codec import BlockDCTCodec
from avd_trainer.data.latents import CaptionedLatents
from avd_trainer.errors import UserError

logger = logging.getLogger(__name__)

# Named, because FFmpeg would also play text files and pictures.
VIDEO_SUFFIXES = frozenset(
    [".avi", ".flv", ".gif", ".m2ts", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".mts", ".ogv", ".ts", ".webm"]
)

MAX_CLIPS_PER_FILE = 64
# With fewer clips than this, neighbouring clips overlap so that there is something to hold out.
FEW_CLIPS = 8


def load_videos(
    folder: Path,
    codec: BlockDCTCodec,
    *,
    frames: int = 33,
    size: int = 64,
    on_file: Callable[[], None] = lambda: None,
) -> CaptionedLatents:
    """Decode a folder of videos, cut them into clips, and encode those.

    The shorter side is resized to ``size`` and the centre is cut out. A file gives a clip every ``frames`` frames, at
    most ``MAX_CLIPS_PER_FILE``; a shorter one is played forwards and backwards until it is long enough. The caption is
    the content of the ``.txt`` file beside the video, or else the file's name.

    Args:
        folder: Searched recursively for files with one of ``VIDEO_SUFFIXES``.
        codec: Encodes the clips.
        frames: Frames per clip.
        size: Height and width of a clip in pixels.
        on_file: Called after each file.

    Returns:
        All clips, in order of file name and time.

    Raises:
        UserError: If the folder is missing or holds no readable video. A file that cannot be read is only logged.
    """
    paths = video_files(folder)
    videos: list[tuple[Tensor, str]] = []
    for path in paths:
        try:
            videos.append((_decode(path, frames * MAX_CLIPS_PER_FILE, size), caption_of(path)))
        except (FFmpegError, OSError, ValueError) as error:
            logger.warning("Skipped %s: %s", path, error)
        on_file()
    if not videos:
        raise UserError(
            f"None of the {len(paths)} video files in {folder} could be read; the log above says why for each."
        )
    stride = frames
    if sum(len(_starts(len(video), frames, stride)) for video, _ in videos) < FEW_CLIPS:
        stride = max(1, frames // 4)
    latents, captions = [], []
    for video, caption in videos:
        for start in _starts(len(video), frames, stride):
            latents.append(codec.encode(_cut(video, start, frames)))
            captions.append(caption)
    return CaptionedLatents(torch.cat(latents), captions)


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


def caption_of(path: Path) -> str:
    """The ``.txt`` file beside the video, or its name with separators as blanks."""
    beside = path.with_suffix(".txt")
    caption = beside.read_text(encoding="utf-8").strip() if beside.is_file() else ""
    return caption or path.stem.replace("_", " ").replace("-", " ")


def _decode(path: Path, max_frames: int, size: int) -> Tensor:
    """``[F, 3, size, size]`` uint8. Resized while decoding, so a long video never fills the memory."""
    with av.open(path) as container:
        if not container.streams.video:
            raise ValueError("it has no video stream")
        frames = [_fit(frame, size) for frame in islice(container.decode(video=0), max_frames)]
    if len(frames) < 2:
        raise ValueError(f"it has {len(frames)} frame(s), at least 2 are needed")
    return torch.stack(frames)


def _fit(frame: av.VideoFrame, size: int) -> Tensor:
    scale = size / min(frame.width, frame.height)
    width, height = max(size, round(frame.width * scale)), max(size, round(frame.height * scale))
    pixels = torch.from_numpy(frame.reformat(width=width, height=height, format="rgb24").to_ndarray())
    top, left = (height - size) // 2, (width - size) // 2
    cut = pixels[top : top + size, left : left + size]
    # Phones store upright videos sideways, with a note of how to turn them.
    return torch.rot90(cut, round(frame.rotation / 90)).permute(2, 0, 1).contiguous()


def _starts(length: int, frames: int, stride: int) -> range:
    return range(0, max(1, length - frames + 1), stride)


def _cut(video: Tensor, start: int, frames: int) -> Tensor:
    """``[1, 3, frames, H, W]`` float32 in [0, 1], from ``[F, 3, H, W]`` uint8."""
    index = torch.tensor(list(islice(_back_and_forth(len(video), start), frames)))
    return video[index].permute(1, 0, 2, 3).unsqueeze(0).float() / 255


def _back_and_forth(length: int, start: int) -> Iterator[int]:
    """start, ..., length - 1, length - 2, ..., 1, 0, 1, ..."""
    position, step = start, 1
    while True:
        yield position
        if not 0 <= position + step < length:
            step = -step
        position += step
