"""The user's own video files as training clips."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path

import torch
from av.error import FFmpegError
from torch import Tensor

from avd_trainer.data.decoding import (
    STILL,
    UTF_8,
    at_rate,
    find_caption,
    fit,
    movement,
    read_frames,
    reason,
    video_files,
)
from avd_trainer.data.in_memory import CaptionedLatents
from avd_trainer.models.codecs.block_dct import BlockDCTCodec
from avd_trainer.runtime.errors import UserError

logger = logging.getLogger(__name__)

MAX_CLIPS_PER_FILE = 64
# Clips of a short video overlap, so that there are a few of it.
FEW_CLIPS = 4


def load_videos(
    folder: Path,
    codec: BlockDCTCodec,
    *,
    frames: int = 17,
    size: int = 32,
    on_file: Callable[[], None] = lambda: None,
) -> tuple[CaptionedLatents, CaptionedLatents]:
    """Decode a folder of videos, cut them into clips, and encode those.

    The shorter side is resized to ``size`` and the centre is cut out. Of each video the first three quarters are for
    training, the rest is held out; either part gives a clip every ``frames`` frames, with overlap where that would be
    fewer than ``FEW_CLIPS``. A part shorter than a clip is played forwards and backwards until it is long enough. At
    most ``MAX_CLIPS_PER_FILE`` clips are taken from a file, from its start. Captions are those of
    :func:`~avd_trainer.data.decoding.find_caption`.

    Args:
        folder: Searched recursively for files with one of ``VIDEO_SUFFIXES``.
        codec: Encodes the clips.
        frames: Frames per clip.
        size: Height and width of a clip in pixels.
        on_file: Called after each file.

    Returns:
        Clips for training and held-out clips, in order of file name and time.

    Raises:
        UserError: If the folder is missing or holds no readable video. A file that cannot be read, has fewer than 4
            frames or does not move is only logged.
    """
    paths = video_files(folder)
    parts: tuple[list[tuple[Tensor, str]], list[tuple[Tensor, str]]] = ([], [])
    for path in paths:
        try:
            video = _decode(path, frames * MAX_CLIPS_PER_FILE, size)
        except (FFmpegError, OSError, ValueError) as error:
            logger.warning("Left out %s: %s", path, reason(error))
        else:
            caption = find_caption(path)
            if caption.encoding != UTF_8:
                logger.warning("%s is not in UTF-8; it was read as %s.", caption.file, caption.encoding)
            cut = min(len(video) - 2, round(0.75 * len(video)))
            for part, shots in zip(parts, (video[:cut], video[cut:]), strict=True):
                # Encoded file by file: latents are small, the pixels of a folder are not.
                part.extend((codec.encode(clip), caption.text) for clip in _clips(shots, frames))
        on_file()
    if not parts[0]:
        raise UserError(
            f"None of the {len(paths)} video files in {folder} could be read; the log above says why for each."
        )
    train, held_out = (
        CaptionedLatents(torch.cat([clip for clip, _ in part]), [caption for _, caption in part]) for part in parts
    )
    return train, held_out


def decode_frames(
    path: Path, height: int, width: int, fps: float | None = None, *, pictures_fps: float | None = None
) -> Iterator[Tensor]:
    """Decode a video frame by frame.

    Args:
        path: The file; or a folder of numbered pictures, with ``pictures_fps``.
        height: A frame is resized to cover ``height`` x ``width``, and its centre is cut out.
        width: In pixels.
        fps: Frames per second, by repeating or leaving out frames; None gives those of the file.
        pictures_fps: How many of a folder's pictures there are a second.

    Yields:
        ``[3, height, width]`` uint8. Resized while decoding, so a long video never fills the memory.

    Raises:
        ValueError: If the file has no video stream, or its frames no times; see
            :func:`~avd_trainer.data.decoding.read_frames`.
        FFmpegError, OSError: If it cannot be decoded.
    """
    frames = read_frames(path, pictures_fps)
    for frame in frames if fps is None else at_rate(frames, fps):
        yield torch.from_numpy(fit(frame, height, width).transpose(2, 0, 1).copy())


def read_picture(path: Path, height: int, width: int) -> Tensor:
    """A picture, or a video's first frame, ``[3, height, width]`` float32 in [0, 1], fitted like frames of videos.

    Raises:
        UserError: If it cannot be read.
    """
    try:
        pixels = next(decode_frames(path, height, width), None)
    except (FFmpegError, OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read: {reason(error)}. Pass a picture, PNG or JPEG, or a video.") from error
    if pixels is None:
        raise UserError(f"{path} holds no frame. Pass a picture, PNG or JPEG, or a video.")
    return pixels.float() / 255


def _decode(path: Path, max_frames: int, size: int) -> Tensor:
    """``[F, 3, size, size]`` uint8."""
    frames = list(islice(decode_frames(path, size, size), max_frames))
    if len(frames) < 4:
        raise ValueError(f"it has {len(frames)} frame(s), at least 4 are needed")
    video = torch.stack(frames)
    if movement(video[:: max(1, len(video) // 8)].numpy()) < STILL:
        raise ValueError("it does not move")
    return video


def _clips(video: Tensor, frames: int) -> Iterator[Tensor]:
    """``[1, 3, frames, H, W]`` float32 in [0, 1] each, from ``[F, 3, H, W]`` uint8."""
    stride = frames if len(video) >= FEW_CLIPS * frames else max(1, frames // 4)
    for start in range(0, max(1, len(video) - frames + 1), stride):
        index = torch.tensor(list(islice(_back_and_forth(len(video), start), frames)))
        yield video[index].permute(1, 0, 2, 3).unsqueeze(0).float() / 255


def _back_and_forth(length: int, start: int) -> Iterator[int]:
    """start, ..., length - 1, length - 2, ..., 1, 0, 1, ..."""
    position, step = start, 1
    while True:
        yield position
        if not 0 <= position + step < length:
            step = -step
        position += step
