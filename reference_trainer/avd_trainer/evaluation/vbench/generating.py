"""A student's videos of a suite's prompts, under the suite's names; what is there already is not made again."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from avd_trainer.data.video_files import save_clip
from avd_trainer.evaluation.vbench.folder import Record, Recorded, folders_of
from avd_trainer.inference.choices import Rates
from avd_trainer.inference.generation import decode_clips, sample_clips
from avd_trainer.inference.students import Shape, Student, identify
from avd_trainer.models.codecs.latent_space import SPATIAL_STRIDES, TEMPORAL_STRIDE
from avd_trainer.runtime.errors import UserError

Part = tuple[int, int]
"""``(i, n)``: the i-th of n parts, from 0."""


@dataclass(frozen=True)
class Sampling:
    """How videos are made.

    Attributes:
        rates: Of each step.
        shape: ``(C, F, H, W)`` of latents.
        frames: How many of the decoded frames are written, from the first.
        fps: Frames per second of the files.
        device: Where to compute.
        dtype: What models compute in.
    """

    rates: Rates
    shape: Shape
    frames: int
    fps: float
    device: torch.device
    dtype: torch.dtype


def decoded_frames(shape: Shape) -> int:
    """Frames of the clip that latents ``(C, F, H, W)`` decode to."""
    return 1 + TEMPORAL_STRIDE * (shape[1] - 1)


def describe(
    student: Student, sampling: Sampling, *, seed: int, samples: int | None, augmented: bool
) -> dict[str, Any]:
    """All that decides what is in a student's videos, besides the prompts: to refuse others in their folder.

    Raises:
        UserError: If the student makes videos of images, which these suites do not have, or weights cannot be read.
    """
    if student.image is not None:
        raise UserError(
            f"{student.folder} makes videos of an image and a prompt, and these suites have prompts alone. Pass a "
            "student of text to video."
        )
    stride = SPATIAL_STRIDES[student.latent_space]
    _, _, height, width = sampling.shape
    return {
        "student": identify(student, with_interpolator=max(sampling.rates) > 1),
        "timesteps": list(student.timesteps),
        "sampler": student.sampler,
        "rates": list(sampling.rates),
        "width": stride * width,
        "height": stride * height,
        "frames": sampling.frames,
        "of_frames": decoded_frames(sampling.shape),
        "fps": sampling.fps,
        "dtype": str(sampling.dtype).removeprefix("torch."),
        "seed": seed,
        "samples": samples,
        "augmented": augmented,
    }


def part_of(videos: Sequence[Recorded], part: Part) -> list[Recorded]:
    """The videos of one of several machines: those of every n-th prompt, so that each embeds its own prompts alone."""
    number, parts = part
    place = {prompt: at for at, prompt in enumerate(dict.fromkeys(each.video.prompt for each in videos))}
    return [each for each in videos if place[each.video.prompt] % parts == number]


def generate_videos(
    student: Student,
    folder: Path,
    record: Record,
    wanted: Sequence[Recorded],
    sampling: Sampling,
    on_video: Callable[[], None] = lambda: None,
) -> None:
    """Make videos, one after the other: each is written before the next one is sampled.

    Transformer and VAE stay in memory together. A file appears whole or not at all, so a run that was killed loses one
    video. It may leave a folder ``unfinished-*``; others never touch that, since nobody knows who is still at work.

    Args:
        student: The student.
        folder: Its folder, with the record.
        record: What the folder is for.
        wanted: Which videos to make; those that are there are replaced.
        sampling: How.
        on_video: Called after each.

    Raises:
        UserError: If weights are missing or damaged, or a file cannot be written.
    """
    for name in folders_of(record):
        (folder / name).mkdir(exist_ok=True)
    samples = sample_clips(
        student, [each.shown for each in wanted], [sampling.rates], sampling.shape,
        seeds=[each.seed for each in wanted], device=sampling.device, dtype=sampling.dtype,
    )  # fmt: skip
    latents = (sample.latents for (sample,) in samples)
    videos = decode_clips(student, latents, device=sampling.device, dtype=sampling.dtype)
    # Not beside the others until it is whole: VBench looks at whatever lies there. The folder is of this process alone.
    with tempfile.TemporaryDirectory(dir=folder, prefix="unfinished-") as unfinished:
        for each, video in zip(wanted, videos, strict=True):
            (file,) = save_clip(video[:, : sampling.frames], Path(unfinished) / "video", sampling.fps, ["mp4"])
            os.replace(file, folder / each.video.file)
            on_video()
