"""Videos that are compared with each other: of one size, one rate and one number of frames."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import torch
from av.error import FFmpegError
from torch import Tensor

from avd_trainer.data.decoding import VIDEO_SUFFIXES, holds_frames, read_frames, reason, shown_size, video_files
from avd_trainer.data.videos import decode_frames
from avd_trainer.runtime.errors import UserError

MOST_FRAMES = 512
"""Of a file, from its start: what is behind them is not looked at."""
SAME_RATE = 0.02
"""Rates that differ by no more than this share count as one: GIF rounds times to hundredths of a second."""


class Form(NamedTuple):
    """What a video is, or is brought to.

    Attributes:
        width: In pixels, as shown.
        height: Likewise.
        frames: How many.
        fps: Frames per second.
    """

    width: int
    height: int
    frames: int
    fps: float

    def __str__(self) -> str:
        return f"{self.width}x{self.height}x{self.frames} at {self.fps:g} frames per second"

    def frames_at(self, fps: float) -> int:
        """How many frames are on screen at 0, 1 / fps, 2 / fps, ... seconds; all where the rates count as one."""
        if self.has_rate(fps):
            return self.frames
        return int((self.frames - 1) * fps / self.fps + 0.01) + 1

    def has_rate(self, fps: float) -> bool:
        """Whether its rate counts as this one."""
        return abs(self.fps - fps) <= SAME_RATE * fps


class VideoFile(NamedTuple):
    """A video on disk.

    Attributes:
        path: Of the file, or of a folder of numbered pictures.
        form: What it is; of a longer one, what its first ``MOST_FRAMES`` are.
        longer: Whether it has more frames than these.
    """

    path: Path
    form: Form
    longer: bool = False


def holds_videos(folder: Path) -> bool:
    """Whether there are files below a folder that look like videos, or folders of numbered pictures."""
    paths = [folder, *folder.rglob("*")]
    return folder.is_dir() and any(path.suffix.lower() in VIDEO_SUFFIXES or holds_frames(path) for path in paths)


def look_at(path: Path, fps: float | None = None) -> VideoFile:
    """Decode a video once, for its size, rate and number of frames.

    Args:
        path: Of the file, or of a folder of numbered pictures.
        fps: How many of a folder's pictures there are a second.

    Raises:
        UserError: If it cannot be read, or has a single frame.
    """
    try:
        shown = ((frame.time, shown_size(frame)) for frame in read_frames(path, fps))
        frames = list(islice(shown, MOST_FRAMES))
        longer = next(shown, None) is not None
        times = [time for time, _ in frames if time is not None]
        if len(frames) < 2:
            raise ValueError(f"it has {len(frames)} frame(s), at least 2 are needed")
        if len(times) < len(frames) or times[-1] <= times[0]:
            raise ValueError("its frames have no times; convert it to MP4")
    except (FFmpegError, OSError, ValueError) as error:
        raise UserError(
            f"{path} cannot be read: {reason(error)}. Mend it or take it out of the folder: a set that misses some of "
            "its clips is another set."
        ) from error
    height, width = frames[0][1]
    rate = round((len(times) - 1) / (times[-1] - times[0]), 3)
    return VideoFile(path, Form(width, height, len(frames), rate), longer)


def look_into(folder: Path, fps: float | None = None) -> list[VideoFile]:
    """All videos below a folder, in order of their names, and with ``fps`` its folders of numbered pictures.

    Raises:
        UserError: If there are none, or one cannot be read.
    """
    return [look_at(path, fps) for path in clips_in(folder, fps)]


def clips_in(folder: Path, fps: float | None) -> list[Path]:
    """The videos below a folder; with ``fps``, their rate, also folders of numbered pictures, or the folder itself.

    Raises:
        UserError: If there are none.
    """
    below = sorted([folder, *folder.rglob("*")])
    videos = [path for path in below if path.suffix.lower() in VIDEO_SUFFIXES and path.is_file()]
    pictures = [path for path in below if holds_frames(path)]
    if pictures and fps is not None:
        return sorted([*videos, *pictures])
    if pictures and not videos:
        raise UserError(
            f"{folder} holds no video files, but numbered pictures in {pictures[0]}. If they are the frames of clips, "
            "say by --fps how many of them there are a second."
        )
    return video_files(folder)


def same_names(folders: Sequence[Path], fps: float | None = None) -> tuple[dict[str, list[Path]], int]:
    """Clips that have one name, but for its ending, in each of several folders; and how many clips have not.

    ``fps`` is that of :func:`clips_in`.

    Raises:
        UserError: If there is no such name, or a folder has it twice.
    """
    found = []
    for folder in folders:
        named: dict[str, Path] = {}
        for path in clips_in(folder, fps):
            name = (path if path.is_dir() else path.with_suffix("")).relative_to(folder).as_posix()
            if name in named:
                raise UserError(f"{path} and {named[name]} have one name. Take one of them out.")
            named[name] = path
        found.append(named)
    names = [name for name in found[0] if all(name in named for named in found)]
    if not names:
        raise UserError(
            f"{' and '.join(map(str, folders))} have no file names in common, such as {min(found[0])!r}: there is "
            "nothing to show side by side. Name clips of one prompt alike."
        )
    return {name: [named[name] for named in found] for name in names}, sum(map(len, found)) - len(names) * len(found)


def common_form(files: Iterable[VideoFile]) -> Form:
    """The form that all can be brought to without enlarging or inventing anything: the least of each number."""
    forms = [file.form for file in files]
    fps = min(form.fps for form in forms)
    return Form(
        min(form.width for form in forms),
        min(form.height for form in forms),
        min(form.frames_at(fps) for form in forms),
        fps,
    )


def changes_to(form: Form, files: Sequence[VideoFile]) -> list[str]:
    """In words, what bringing files to a form does to some of them; nothing where all have it."""
    size = (form.width, form.height)
    resized = [(file, f"{file.form.width}x{file.form.height}") for file in files if file.form[:2] != size]
    slowed = [(file, f"{file.form.fps:g} frames per second") for file in files if not file.form.has_rate(form.fps)]
    cut = [(file, f"{file.form.frames} frames") for file in files if file.form.frames_at(form.fps) > form.frames]
    longer = [(file, f"more than {MOST_FRAMES} frames") for file in files if file.longer]
    return [
        f"{len(found)} of {len(files)} are {change} (such as {found[0][0].path.name}, {found[0][1]})"
        for found, change in (
            (longer, f"cut after {MOST_FRAMES} frames, and what is behind them is not looked at"),
            (resized, "resized, and their centre cut out"),
            (slowed, "brought to the lower rate by leaving out frames"),
            (cut, "cut after as many frames as all have"),
        )
        if found
    ]


def read_clip(file: VideoFile, form: Form) -> Tensor:
    """A video in another form, ``[3, F, H, W]`` float32 in [0, 1]: resized to cover it, its centre, its first frames.

    Raises:
        UserError: If the file changed since it was looked at.
    """
    fps = None if file.form.has_rate(form.fps) else form.fps
    try:
        decoded = decode_frames(file.path, form.height, form.width, fps, pictures_fps=file.form.fps)
        frames = list(islice(decoded, form.frames))
        if len(frames) < form.frames:
            raise ValueError(f"it gives {len(frames)} frames, expected {form.frames}")
    except (FFmpegError, OSError, ValueError) as error:
        raise UserError(f"{file.path} cannot be read any more: {reason(error)}. Run the command again.") from error
    return torch.stack(frames, dim=1).float() / 255
