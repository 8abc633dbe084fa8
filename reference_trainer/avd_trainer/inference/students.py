"""Exported students: what their folders say."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, get_args

import torch
from torch import Tensor

from avd_core import (
    HalfRateInterpolationSampler,
    LatentFrameInterpolator,
)
from avd_core.sampling import SamplerKind
from avd_trainer.config.loading import load_config
from avd_trainer.config.sections import ShapeCaptions
from avd_trainer.data.encode import WAN_FORMAT
from avd_trainer.models.adapters import holds_adapters
from avd_trainer.models.architecture import ImageInput, image_input, latent_channels
from avd_trainer.models.codecs.latent_space import LatentSpace
from avd_trainer.models.schedulers import few_steps, sampler_kind
from avd_trainer.models.weight_files import ADAPTERS
from avd_trainer.models.weights import open_weights
from avd_trainer.runtime.errors import UserError
from avd_trainer.training.checkpoint import list_checkpoints
from avd_trainer.training.config import TrainConfig
from avd_trainer.training.export import ABOUT, open_run
from avd_trainer.training.folder import CHECKPOINTS, CONFIG, method_of_run
from avd_trainer.training.pipeline_export import INTERPOLATOR, load_interpolator, parts_of, source_with, sources_of

Shape = tuple[int, int, int, int]
"""``(C, F, H, W)`` of latents."""
SCHEDULER = "scheduler/scheduler_config.json"
"""In a pipeline in diffusers' layout."""


class Student(NamedTuple):
    """A few-step student on disk; of its weights only the interpolator's are loaded.

    Attributes:
        folder: Where it was exported to.
        transformer: Source of its transformer, or of the one that ``adapters`` belong to.
        adapters: File of adapters to be merged into that; None for a whole model.
        pipeline: Source of text encoder, VAE and image encoder: folder or hub id. Not looked at for the block DCT's.
        timesteps: Its few steps, falling.
        sampler: How it goes from one to the next.
        latent_space: Whose latents it makes.
        clip: ``(C, F, H, W)`` of the latents that it was trained on, where that is known.
        fps: Frames per second of its clips.
        captions: How much the captions of moving shapes say that it was trained on; None for other clips.
        architecture: Keyword arguments of its ``WanTransformer3DModel``.
        interpolator: For steps at half rate, where there is one.
    """

    folder: Path
    transformer: str
    adapters: Path | None
    pipeline: str
    timesteps: tuple[float, ...]
    sampler: SamplerKind
    latent_space: LatentSpace
    clip: Shape | None
    fps: float
    captions: ShapeCaptions | None
    architecture: dict[str, Any]
    interpolator: LatentFrameInterpolator | None

    @property
    def image(self) -> ImageInput | None:
        """What it reads of an image; None for text to video."""
        return image_input(self.architecture)


class About(NamedTuple):
    """What an export says of the clips that its student was trained on.

    Attributes:
        latent_space: Whose latents they were, where that is said.
        clip: ``(C, F, H, W)`` of one's latents, where that is said.
        fps: Their frames per second; Wan2.1's where that is not said.
        captions: How much they say of moving shapes, where it was those and that is said.
    """

    latent_space: LatentSpace | None = None
    clip: Shape | None = None
    fps: float = WAN_FORMAT.fps
    captions: ShapeCaptions | None = None


def open_student(folder: Path, pipeline: str | None = None) -> Student:
    """Look at what ``avd export`` wrote in any format, or at a Wan pipeline of diffusers with a few-step scheduler.

    Args:
        folder: The export's, or the pipeline's.
        pipeline: Of a student in another program's files: a Wan pipeline, folder or hub id, that has text encoder and
            VAE, and for adapters the transformer. None for those that the run had.

    Raises:
        UserError: If it is neither, or something is missing or damaged.
    """
    scheduler = folder / SCHEDULER
    if not scheduler.is_file():
        return _open_alone(folder, pipeline)
    if pipeline is not None:
        raise UserError(f"--pipeline {pipeline}: {folder} is a whole pipeline. Leave --pipeline out.")
    steps = read_few_steps(scheduler)
    if steps is None:
        raise UserError(
            f"{scheduler} names no few steps, as `avd export` writes them. Pass the folder of an exported student; a "
            "pipeline of many steps is sampled by diffusers."
        )
    about = read_about(folder)
    latent_space = about.latent_space or "wan"
    with open_weights(str(folder)) as weights:
        architecture = weights.config
    parts = parts_of(architecture) if latent_space == "wan" else {}
    missing = [name for name in parts if not (folder / name).is_dir()]
    if missing:
        raise UserError(
            f"{folder} has no {' and no '.join(missing)}, which clips need. Export the run again with --pipeline "
            "SOURCE, a Wan pipeline in diffusers' layout such as Wan-AI/Wan2.1-T2V-1.3B-Diffusers."
        )
    interpolator = None
    if (folder / INTERPOLATOR).is_dir():
        interpolator = load_interpolator(folder / INTERPOLATOR, latent_channels(architecture))
    return Student(
        folder=folder,
        transformer=str(folder),
        adapters=None,
        pipeline=str(folder),
        timesteps=steps.timesteps,
        sampler=steps.sampler,
        latent_space=latent_space,
        clip=about.clip,
        fps=about.fps,
        captions=about.captions,
        architecture=architecture,
        interpolator=interpolator,
    )


def open_student_or_run(folder: Path, pipeline: str | None = None) -> Student:
    """As :func:`open_student`, and of a finished run what it leaves as ``student``, also without checkpoints.

    Raises:
        UserError: Also if the run is not finished, has no student, or its base, VAE or text encoder is not found.
    """
    if method_of_run(folder) is None:
        return open_student(folder, pipeline)
    if pipeline is not None:
        raise UserError(
            f"--pipeline {pipeline}: {folder} is a run, which names its own. Leave --pipeline out, or export the run "
            f"with it: `avd export {folder} --output DIR --pipeline {pipeline}`, and pass DIR."
        )
    student = folder / "student"
    if student.is_dir() and not list_checkpoints(folder / CHECKPOINTS):
        config = load_config(TrainConfig, str(folder / CONFIG))
        sources = [source for source in (config.codec, config.teacher) if source is not None]
    else:
        saved = open_run(folder)
        config, sources = saved.config, sources_of(saved.config, saved.encoding)
    if config.few_steps is None or not student.is_dir():
        raise UserError(
            f"{folder} is a run without a student: it is not finished, or trains something else. Export it first: "
            f"`avd export {folder} --output DIR`, and pass DIR."
        )
    file = student / ADAPTERS
    return _open_weights(
        folder,
        student / ABOUT,
        file if file.is_file() else student,
        config.teacher or "",
        lambda space, architecture: _pipeline_of(folder, sources, space, architecture),
    )


def open_students(folders: Sequence[Path], pipeline: str | None = None) -> list[Student]:
    """As :func:`open_student_or_run`, several that are sampled side by side.

    Args:
        folders: Of exports, pipelines and finished runs.
        pipeline: For those in another program's files alone, since the others have their own.

    Raises:
        UserError: Also if a pipeline is given, and none is in another program's files.
    """
    takes_pipeline = [method_of_run(folder) is None and not (folder / SCHEDULER).is_file() for folder in folders]
    if pipeline is not None and not any(takes_pipeline):
        raise UserError(
            f"--pipeline {pipeline}: it is for students in another program's files, and here are none. Leave "
            "--pipeline out."
        )
    return [
        open_student_or_run(folder, pipeline if takes else None)
        for folder, takes in zip(folders, takes_pipeline, strict=True)
    ]


def _pipeline_of(folder: Path, sources: Sequence[str], space: LatentSpace, architecture: Mapping[str, Any]) -> str:
    """Where a run's text encoder and VAE are; not looked for in the block DCT's space."""
    if space == "block-dct-4":
        return folder.name
    found = source_with(sources, parts_of(architecture))
    if found is None:
        raise UserError(
            f"{folder} does not know of a pipeline with text encoder and VAE: none of {', '.join(sources) or 'them'} "
            f"is one. Export it first: `avd export {folder} --output DIR --pipeline SOURCE`, and pass DIR."
        )
    return found


def identify(student: Student, *, with_interpolator: bool) -> str:
    """A word for a student's weights, wherever they lie.

    Raises:
        UserError: If they cannot be read.
    """
    digest = hashlib.blake2b(digest_size=12)
    with open_weights(student.transformer) as weights:
        digest.update(weights.digest().encode())
    if student.adapters is not None:
        digest.update(student.adapters.read_bytes())
    if with_interpolator:
        assert student.interpolator is not None
        for name, tensor in student.interpolator.state_dict().items():
            digest.update(name.encode() + tensor.cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _open_alone(folder: Path, pipeline: str | None) -> Student:
    """A student in another program's files: one with weights, which say what it is by their names."""
    told = _read_json(folder / ABOUT) if (folder / ABOUT).is_file() else {}
    files = sorted(folder.rglob("*.safetensors"))
    if "pipelines" not in told or len(files) != 1:
        raise _no_student(folder)

    def pipeline_of(_: LatentSpace, architecture: Mapping[str, Any]) -> str:
        parts = parts_of(architecture)
        source = source_with([pipeline] if pipeline is not None else told["pipelines"], parts)
        if source is None:
            raise UserError(
                f"{folder} has the transformer alone, and {', '.join(parts)} are not all in "
                f"{pipeline or ' or in '.join(told['pipelines']) or 'what the run was trained from'}. Pass --pipeline "
                "SOURCE, a Wan pipeline in diffusers' layout such as Wan-AI/Wan2.1-T2V-1.3B-Diffusers."
            )
        return source

    return _open_weights(folder, folder / ABOUT, files[0], pipeline or told.get("base", ""), pipeline_of)


def _open_weights(
    folder: Path, about: Path, weights: Path, base: str, pipeline_of: Callable[[LatentSpace, Mapping[str, Any]], str]
) -> Student:
    """A student whose few steps no scheduler says, but ``export.json``.

    Args:
        folder: What it is called by.
        about: Its ``export.json``.
        weights: A whole transformer, file or folder; or a file of adapters.
        base: Source of the transformer that adapters belong to.
        pipeline_of: From the latent space and the transformer's architecture to the source of text encoder and VAE.

    Raises:
        UserError: If weights are missing, or ``export.json`` does not say how to make clips.
    """
    told, clips = _read_json(about) if about.is_file() else {}, read_about(about.parent)
    if clips.latent_space is None or "timesteps" not in told:
        raise UserError(
            f"{about.parent} does not say how to make clips: it is of a run by an earlier version. Export the run "
            "again: `avd export RUN --output DIR`, and pass DIR; without a checkpoint, run it again."
        )
    adapters = weights if weights.is_file() and holds_adapters(weights) else None
    transformer = str(weights) if adapters is None else base
    with open_weights(transformer) as opened:
        architecture = opened.config
    steps = _check_few_steps(told["timesteps"], told.get("sampler", "re-noise"), about)
    return Student(
        folder=folder,
        transformer=transformer,
        adapters=adapters,
        pipeline=pipeline_of(clips.latent_space, architecture),
        timesteps=steps.timesteps,
        sampler=steps.sampler,
        latent_space=clips.latent_space,
        clip=clips.clip,
        fps=clips.fps,
        captions=clips.captions,
        architecture=architecture,
        interpolator=None,
    )


def read_about(folder: Path) -> About:
    """What ``export.json`` says of a student's clips, where a folder has one.

    Raises:
        UserError: If it is damaged.
    """
    path = folder / ABOUT
    if not path.is_file():
        return About()
    content = _read_json(path)
    latent_space, clip, fps = content.get("latent_space"), content.get("clip"), content.get("fps", WAN_FORMAT.fps)
    captions = content.get("captions")
    for name, value, fits, expected in (
        ("latent_space", latent_space, latent_space in (None, *get_args(LatentSpace)), "one of wan and block-dct-4"),
        ("clip", clip, clip is None or _is_shape(clip), "four positive integers, [C, F, H, W]"),
        ("fps", fps, type(fps) in (int, float) and 0 < fps < math.inf, "a positive number"),
        ("captions", captions, captions in (None, *get_args(ShapeCaptions)), "one of full and subjects, or null"),
    ):
        if not fits:
            raise UserError(f"{path}: {name} must be {expected}, got {value!r}. Export the run again.")
    return About(latent_space, None if clip is None else (clip[0], clip[1], clip[2], clip[3]), float(fps), captions)


class FewSteps(NamedTuple):
    """How a student is sampled.

    Attributes:
        timesteps: Its few steps, falling.
        sampler: How it goes from one to the next.
    """

    timesteps: tuple[float, ...]
    sampler: SamplerKind


def read_few_steps(scheduler: Path) -> FewSteps | None:
    """The few steps in a ``scheduler_config.json``; None if it names none.

    Raises:
        UserError: If it cannot be read, or what it names cannot be sampled with.
    """
    content = _read_json(scheduler)
    found, sampler = few_steps(content), sampler_kind(content)
    return None if found is None else _check_few_steps(found, sampler, scheduler)


def _check_few_steps(found: Any, sampler: Any, file: Path) -> FewSteps:
    try:
        timesteps = tuple(float(timestep) for timestep in found)
        HalfRateInterpolationSampler(_never, _never, timesteps, half_rate_steps=0, sampler=sampler)
    except (TypeError, ValueError) as error:
        raise UserError(f"{file} has no timesteps to sample with: {error}. Export the run again.") from error
    return FewSteps(timesteps, sampler)


def _never(*_: object) -> Tensor:
    raise AssertionError


def _no_student(folder: Path) -> UserError:
    if not folder.is_dir():
        return UserError(f"{folder}: there is no such folder. Pass the --output folder of `avd export`.")
    method = method_of_run(folder)
    if method == "frame_interpolation":
        return UserError(
            f"{folder} is a run of method {method}, which makes no clips. Export a student with it: `avd export "
            f"STUDENT_RUN --output DIR --interpolator {folder}`, and pass DIR."
        )
    if method is not None:
        return UserError(f"{folder} is a run. Export it first: `avd export {folder} --output DIR`, and pass DIR.")
    transformer = " It holds a transformer alone." if (folder / ABOUT).is_file() else ""
    return UserError(
        f"{folder} holds no {SCHEDULER}, so it is no pipeline.{transformer} Pass a folder that "
        "`avd export` wrote, without --transformer-only."
    )


def _is_shape(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 4 and all(type(size) is int and size > 0 for size in value)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read: {error}. Export the run again.") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} holds a {type(content).__name__}, expected an object. Export the run again.")
    return content
