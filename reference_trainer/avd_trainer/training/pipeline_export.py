"""A student as a whole pipeline, for diffusers and ``avd sample``."""

from __future__ import annotations

import json
import shutil
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import diffusers
import torch

from avd_core import LatentFrameInterpolator
from avd_trainer.data.schema import Encoding
from avd_trainer.models.architecture import image_input, latent_channels
from avd_trainer.models.codecs.latent_space import LatentSpace
from avd_trainer.models.schedulers import GRID, SAMPLER, closest_scheduler, grid_error
from avd_trainer.models.weight_files import is_on_hub
from avd_trainer.runtime.errors import UserError
from avd_trainer.training.config import TrainConfig
from avd_trainer.training.export import ABOUT, SavedRun, Weights, replace_export, write_json_in, write_transformer
from avd_trainer.training.folder import method_of_run
from avd_trainer.training.model_card import CARD, model_card
from avd_trainer.training.program_usage import diffusers_usage

INTERPOLATOR = "interpolator"
MODEL_INDEX = "model_index.json"

# What a student's pipeline takes from that of its teacher, and the classes where that says nothing of them.
_PARTS = {
    "vae": ("diffusers", "AutoencoderKLWan"),
    "text_encoder": ("transformers", "UMT5EncoderModel"),
    "tokenizer": ("transformers", "T5TokenizerFast"),
}
_IMAGE_PARTS = {
    "image_encoder": ("transformers", "CLIPVisionModel"),
    "image_processor": ("transformers", "CLIPImageProcessor"),
}
_COPIED = (".json", ".safetensors", ".model", ".txt")
"""Endings of what is copied of a part: its weights, its configuration and a tokenizer's tables; never a pickle."""


class ExportedPipeline(NamedTuple):
    """What :func:`export_pipeline` wrote.

    Attributes:
        latent_space: Whose latents the student makes.
        missing: Which of :func:`parts_of` nothing had.
        grid_error: The most by which a timestep of diffusers' own scheduler is off the student's, in [0, 1000].
    """

    latent_space: LatentSpace
    missing: tuple[str, ...]
    grid_error: float


def parts_of(architecture: Mapping[str, Any]) -> dict[str, tuple[str, str]]:
    """Which parts besides transformer and scheduler a student's pipeline has, with their usual classes."""
    image = image_input(architecture)
    return _PARTS if image is None or image.embedding_dim is None else _PARTS | _IMAGE_PARTS


def export_pipeline(
    run: Path,
    output: Path,
    *,
    weights: Weights = "ema",
    step: int | None = None,
    dtype: torch.dtype = torch.float32,
    pipeline: str | None = None,
    interpolator: Path | None = None,
    measures: str | None = None,
) -> ExportedPipeline:
    """Write the student of a run as a pipeline folder in diffusers' layout.

    The folder has ``transformer`` (a LoRA student merged into its base), ``scheduler`` with the run's timesteps, the
    parts that decode clips and read prompts, copied file by file from the first that has them of ``pipeline``, the
    run's ``codec``, the pipeline that encoded its data and its ``teacher``, and with an interpolator ``interpolator``.
    Holds one transformer in memory, on the CPU.

    Args:
        run: The folder of a run that has saved a checkpoint; the run may be going on.
        output: Where to write; replaced if an earlier export is there.
        weights: ``ema`` for the averaged weights, ``student`` for those of the last update.
        step: The checkpoint of which step; None for the newest.
        dtype: Type of the transformer's weights; the other parts keep theirs.
        pipeline: A Wan pipeline in diffusers' layout, folder or hub id.
        interpolator: The folder of a ``frame_interpolation`` run, or of ``LatentFrameInterpolator.save_pretrained``.
        measures: What was measured of the student, in Markdown, for the model card; None if nothing was.

    Raises:
        UserError: If there is no such checkpoint, pipeline or interpolator, one does not fit the run, or ``output``
            cannot be written or holds something else.
    """

    title = output.resolve().name

    def write(checkpoint: SavedRun, folder: Path) -> ExportedPipeline:
        config, architecture = checkpoint.config, checkpoint.architecture
        encoding = checkpoint.encoding
        _check_pipeline(encoding, pipeline)
        sources = [*([] if pipeline is None else [pipeline]), *sources_of(config, encoding)]
        if interpolator is not None:
            load_interpolator(interpolator, latent_channels(architecture)).save_pretrained(folder / INTERPOLATOR)
        wanted = parts_of(architecture)
        parts = _find_parts(sources, wanted)
        for name, source in parts.items():
            _copy(source / name, folder / name)
        write_transformer(checkpoint, folder / "transformer", weights, dtype)
        timesteps, sampler = checkpoint.timesteps, config.sampled_by
        scheduler = closest_scheduler(timesteps, sampler)
        write_json_in(
            folder / "scheduler" / "scheduler_config.json",
            {**json.loads(scheduler.to_json_string()), GRID: timesteps, SAMPLER: sampler},
        )
        index = _model_index(parts, architecture, type(scheduler).__name__, interpolator is not None)
        write_json_in(folder / MODEL_INDEX, index)
        write_json_in(folder / ABOUT, checkpoint.about(run, weights) | checkpoint.about_clips())
        missing = tuple(name for name in wanted if name not in parts)
        usage = diffusers_usage(checkpoint, missing)
        card = model_card(checkpoint, weights, title, usage, adapters=False, library="diffusers", measures=measures)
        (folder / CARD).write_text(card, encoding="utf-8")
        return ExportedPipeline(encoding.latent_space, missing, grid_error(scheduler, timesteps))

    return replace_export(run, output, step, write)


def load_interpolator(source: Path, channels: int) -> LatentFrameInterpolator:
    """Read an interpolator's folder, or that of the run that trained it.

    Args:
        source: The folder.
        channels: Of the latents that it has to take.

    Raises:
        UserError: If there is none, or it has other channels.
    """
    folder = source / INTERPOLATOR if (source / INTERPOLATOR).is_dir() else source
    if folder == source:
        _expect_no_run(source)
    try:
        interpolator = LatentFrameInterpolator.from_pretrained(folder)
    except (OSError, ValueError) as error:
        raise UserError(
            f"{source} holds no interpolator: {error}. Pass the --output folder of a finished run of method "
            "frame_interpolation as --interpolator."
        ) from error
    if interpolator.channels != channels:
        raise UserError(
            f"{source} holds an interpolator for latents of {interpolator.channels} channels, and the student's have "
            f"{channels}. Train one on clips in the student's latent space: `avd train PRESET --method "
            "frame_interpolation`."
        )
    return interpolator


def sources_of(config: TrainConfig, encoding: Encoding) -> list[str]:
    """Where the parts of a run's pipeline may be, best first."""
    if encoding.latent_space == "block-dct-4":
        return []
    return [source for source in (config.codec, encoding.codec, config.teacher) if source is not None]


def _check_pipeline(encoding: Encoding, pipeline: str | None) -> None:
    if encoding.latent_space == "block-dct-4" and pipeline is not None:
        raise UserError(
            f"--pipeline {pipeline} has the parts for Wan2.1's latents, but this run was trained on those of the tiny "
            "preset, which need none. Leave --pipeline out."
        )


def source_with(sources: Iterable[str], names: Iterable[str]) -> str | None:
    """The first source that has all parts, or is on the hub and therefore not looked into; None if there is none.

    Raises:
        UserError: If files of a part are missing.
    """
    wanted = list(names)
    for source in sources:
        if is_on_hub(source) or (Path(source).is_dir() and all(_has_part(Path(source), name) for name in wanted)):
            return source
    return None


def _find_parts(sources: Sequence[str], names: Iterable[str]) -> dict[str, Path]:
    """For each part the folder of the first source that has it; later sources are not looked at without need."""
    found: dict[str, Path] = {}
    for source in sources:
        wanted = [name for name in names if name not in found]
        folder = _open_source(source, wanted) if wanted else None
        if folder is not None:
            found |= {name: folder for name in wanted if _has_part(folder, name)}
    return found


def _open_source(source: str, parts: Sequence[str]) -> Path | None:
    """The folder of a pipeline, downloaded where it is on the hub; None for a source that is a transformer alone."""
    path = Path(source)
    if path.is_dir():
        return path
    if not is_on_hub(source):
        return None
    from huggingface_hub import snapshot_download

    patterns = [MODEL_INDEX, *(f"{part}/*{ending}" for part in parts for ending in _COPIED)]
    try:
        return Path(snapshot_download(source, allow_patterns=patterns))
    except Exception as error:  # The hub's HTTP library, and with it the class of its errors, changed several times.
        reason = str(error).strip().partition("\n")[0].rstrip(".")
        raise UserError(
            f"{source} has the pipeline's {', '.join(parts)}, but cannot be downloaded ({type(error).__name__}: "
            f"{reason}). Pass --pipeline FOLDER with a copy of it, or --transformer-only."
        ) from error


def _has_part(folder: Path, name: str) -> bool:
    """Whether a pipeline has a part.

    Raises:
        UserError: If it has, but files of it are missing.
    """
    part = folder / name
    if not part.is_dir():
        return False
    if name in ("tokenizer", "image_processor"):
        return any(part.iterdir())
    files = {path.name for path in part.iterdir()}
    listed = {file for index in part.glob("*.safetensors.index.json") for file in _listed_files(index)}
    if "config.json" not in files or listed - files or not any(file.endswith(".safetensors") for file in files):
        raise UserError(
            f"{part} is not complete: expected config.json and all safetensors files that belong to it. Download or "
            "copy the pipeline again, or pass another one by --pipeline."
        )
    return True


def _listed_files(index: Path) -> Collection[str]:
    try:
        return set(json.loads(index.read_text())["weight_map"].values())
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise UserError(f"{index} cannot be read: {error}. Download or copy the pipeline again.") from error


def _copy(source: Path, target: Path) -> None:
    """Copy contents only: what is read-only there would be in the way of the next export."""
    for file in _copied_files(source):
        copy = target / file.relative_to(source)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, copy)


def _copied_files(folder: Path) -> Iterator[Path]:
    return (path for path in sorted(folder.rglob("*")) if path.is_file() and path.name.endswith(_COPIED))


def _model_index(
    parts: dict[str, Path], architecture: Mapping[str, Any], scheduler: str, interpolator: bool
) -> dict[str, Any]:
    name = "WanPipeline" if image_input(architecture) is None else "WanImageToVideoPipeline"
    index: dict[str, Any] = {"_class_name": name, "_diffusers_version": diffusers.__version__}
    for name, usual in parts_of(architecture).items():
        index[name] = _class_of(parts[name], name) or usual if name in parts else (None, None)
    index["scheduler"] = ("diffusers", scheduler)
    index["transformer"] = ("diffusers", "WanTransformer3DModel")
    if interpolator:
        index[INTERPOLATOR] = ("avd_integrations.diffusers", "LatentFrameInterpolatorModel")
    return index


def _class_of(pipeline: Path, part: str) -> list[str] | None:
    try:
        entry: list[str] = json.loads((pipeline / MODEL_INDEX).read_text())[part]
    except (OSError, ValueError, KeyError, TypeError):  # a folder of parts that is no pipeline
        return None
    return entry


def _expect_no_run(source: Path) -> None:
    method = method_of_run(source)
    if method == "frame_interpolation":
        raise UserError(
            f"{source} is a run of method {method} that is not finished, so it has no interpolator yet. Run its "
            "command again to the end, and then export."
        )
    if method is not None:
        raise UserError(f"{source} is a run of method {method}. Pass one of frame_interpolation as --interpolator.")
