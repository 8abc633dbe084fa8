"""From a checkpoint to a student that diffusers and ``avd sample`` load."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar

import diffusers
import torch
from diffusers import FlowMatchLCMScheduler, WanTransformer3DModel
from safetensors import SafetensorError
from torch import Tensor

from avd_core import FlowMatchingSchedule, LatentFrameInterpolator
from avd_trainer.config.loading import validate
from avd_trainer.config.run import TrainConfig
from avd_trainer.config.sections import LoRAConfig, ShardsData
from avd_trainer.models.transformer import adapter_names, empty_transformer
from avd_trainer.models.weights import BUNDLED, load_into, open_weights
from avd_trainer.runtime.errors import UserError
from avd_trainer.training.checkpoint import list_checkpoints, read_state, read_tensors
from avd_trainer.training.kinds import kind_of_run

Result = TypeVar("Result")

Weights = Literal["ema", "student"]
LatentSpace = Literal["wan", "block-dct"]

ABOUT = "export.json"
"""In an export: of which run, step and weights it is; in a pipeline's also what it was trained on."""
GRID = "_timesteps"
"""In a scheduler's config: the exact grid. diffusers keeps names that begin so, and does not take them for mistakes."""
INTERPOLATOR = "interpolator"
MODEL_INDEX = "model_index.json"

# What a student's pipeline takes from that of its teacher, and the classes where that says nothing of them.
PARTS = {
    "vae": ("diffusers", "AutoencoderKLWan"),
    "text_encoder": ("transformers", "UMT5EncoderModel"),
    "tokenizer": ("transformers", "T5TokenizerFast"),
}
_COPIED = (".json", ".safetensors", ".model", ".txt")
"""Endings of what is copied of a part: its weights, its configuration and a tokenizer's tables; never a pickle."""


class ExportedPipeline(NamedTuple):
    """What :func:`export_pipeline` wrote.

    Attributes:
        latent_space: Whose latents the student makes.
        missing: Which of :data:`PARTS` nothing had.
        grid_error: The most by which a timestep of diffusers' own scheduler is off the student's, in [0, 1000].
    """

    latent_space: LatentSpace
    missing: tuple[str, ...]
    grid_error: float


def export_pipeline(
    run: Path,
    output: Path,
    *,
    weights: Weights = "ema",
    step: int | None = None,
    dtype: torch.dtype = torch.float32,
    pipeline: str | None = None,
    interpolator: Path | None = None,
) -> ExportedPipeline:
    """Write the student of a run as a pipeline folder in diffusers' layout.

    The folder has ``transformer`` (a LoRA student merged into its base), ``scheduler`` with the run's timesteps, the
    parts that decode clips and read prompts, copied file by file from the first that has them of ``pipeline``, the
    run's ``codec`` and its ``teacher``, and with an interpolator ``interpolator``. Holds one transformer in memory, on
    the CPU.

    Args:
        run: The folder of a run that has saved a checkpoint; the run may be going on.
        output: Where to write; replaced if an earlier export is there.
        weights: ``ema`` for the averaged weights, ``student`` for those of the last update.
        step: The checkpoint of which step; None for the newest.
        dtype: Type of the transformer's weights; the other parts keep theirs.
        pipeline: A Wan pipeline in diffusers' layout, folder or hub id.
        interpolator: A folder that ``avd train-interpolator`` or ``LatentFrameInterpolator.save_pretrained`` wrote.

    Raises:
        UserError: If there is no such checkpoint, pipeline or interpolator, one does not fit the run, or ``output``
            cannot be written or holds something else.
    """

    def write(checkpoint: _Checkpoint, folder: Path) -> ExportedPipeline:
        config, architecture = checkpoint.config, checkpoint.architecture
        latent_space = _latent_space(config)
        sources = _sources(config, latent_space, pipeline)
        if interpolator is not None:
            load_interpolator(interpolator, architecture["in_channels"]).save_pretrained(folder / INTERPOLATOR)
        parts = _find_parts(sources)
        for name, source in parts.items():
            _copy(source / name, folder / name)
        _export_transformer(checkpoint, folder / "transformer", weights, dtype)
        timesteps = [float(timestep) for timestep in config.objective.timesteps]
        scheduler = closest_scheduler(timesteps)
        _write_json(
            folder / "scheduler" / "scheduler_config.json", {**json.loads(scheduler.to_json_string()), GRID: timesteps}
        )
        _write_json(folder / MODEL_INDEX, _model_index(parts, interpolator is not None))
        about = {
            "latent_space": latent_space,
            "clip": checkpoint.state["latent_shape"],
            "fps": config.samples.fps,
            "timesteps": timesteps,
        }
        _write_json(folder / ABOUT, checkpoint.about(run, weights) | about)
        missing = tuple(name for name in PARTS if name not in parts)
        return ExportedPipeline(latent_space, missing, grid_error(scheduler, timesteps))

    return _export(run, output, step, write)


def export_student(
    run: Path,
    output: Path,
    *,
    weights: Weights = "ema",
    step: int | None = None,
    dtype: torch.dtype = torch.float32,
) -> None:
    """Write the student of a run without the other parts of a pipeline.

    A fully trained student becomes a diffusers transformer folder (``config.json`` and safetensors); a LoRA student
    becomes adapters (``pytorch_lora_weights.safetensors``) for ``WanPipeline.load_lora_weights``. Holds one model in
    memory, on the CPU. Arguments and errors are those of :func:`export_pipeline`.
    """

    def write(checkpoint: _Checkpoint, folder: Path) -> None:
        if checkpoint.config.student_lora is None:
            _export_transformer(checkpoint, folder, weights, dtype)
        else:
            _export_adapter(checkpoint, checkpoint.config.student_lora, folder, weights, dtype)
        _write_json(folder / ABOUT, checkpoint.about(run, weights))

    _export(run, output, step, write)


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
            f"{source} holds no interpolator: {error}. Pass the --output folder of a finished `avd train-interpolator` "
            "run as --interpolator."
        ) from error
    if interpolator.channels != channels:
        raise UserError(
            f"{source} holds an interpolator for latents of {interpolator.channels} channels, and the student's have "
            f"{channels}. Train one on clips in the student's latent space: `avd train-interpolator`."
        )
    return interpolator


class _Checkpoint(NamedTuple):
    folder: Path
    state: dict[str, Any]
    config: TrainConfig

    @property
    def architecture(self) -> dict[str, Any]:
        architecture: dict[str, Any] = self.state["architecture"]
        return architecture

    def about(self, run: Path, weights: Weights) -> dict[str, Any]:
        return {"run": str(run), "step": self.state["step"], "weights": weights, "version": self.state["version"]}


def _export(run: Path, output: Path, step: int | None, write: Callable[[_Checkpoint, Path], Result]) -> Result:
    """Let ``write`` fill a folder beside ``output`` and give it that name."""
    output = output.resolve()  # also "." has a name
    checkpoint = _find(run, step)
    state = read_state(checkpoint)
    config = validate(TrainConfig, state["config"], f"{checkpoint}")
    if output.exists() and not _is_export(output):
        raise UserError(
            f"{output} holds something that is no earlier export. Move it away, or choose another --output for the "
            "export."
        )
    part, old = (output.with_name(output.name + suffix) for suffix in (".part", ".old.part"))
    try:
        for left in (part, old):
            shutil.rmtree(left, ignore_errors=True)
        part.mkdir(parents=True)
        result = write(_Checkpoint(checkpoint, state, config), part)
        # Moved and then removed: cut short at any point, what has the name is whole.
        if output.exists():
            os.replace(output, old)
        os.replace(part, output)
        shutil.rmtree(old, ignore_errors=True)
        return result
    except UserError:
        if step is None and not checkpoint.exists():  # the run went on and removed it meanwhile
            return _export(run, output, step, write)
        raise
    except (OSError, SafetensorError) as error:
        raise UserError(f"{output} cannot be written: {error}. Free space or choose another --output.") from error
    finally:
        shutil.rmtree(part, ignore_errors=True)


def _export_transformer(checkpoint: _Checkpoint, output: Path, weights: Weights, dtype: torch.dtype) -> None:
    config = checkpoint.config
    model: WanTransformer3DModel = empty_transformer(checkpoint.architecture, torch.device("cpu"))
    if config.student_lora is None:
        parameters = {name: parameter.detach() for name, parameter in model.named_parameters()}
        read_tensors(checkpoint.folder, {weights: parameters}, distributed=False)
    else:
        with open_weights(config.teacher) as base:
            load_into(model, base)
        _merge_adapter(model, _read_adapter(checkpoint, config.student_lora, weights), config.student_lora)
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    model.save_pretrained(output, safe_serialization=True)


@torch.no_grad()
def _merge_adapter(model: WanTransformer3DModel, adapter: dict[str, Tensor], lora: LoRAConfig) -> None:
    """``W + alpha / rank * B A`` for each weight with an adapter."""
    for name, matrix_a in adapter.items():
        layer, found, _ = name.partition(".lora_A.")
        if found:
            matrix_b = adapter[name.replace(".lora_A.", ".lora_B.")]
            model.get_parameter(f"{layer}.weight").addmm_(matrix_b, matrix_a, alpha=lora.alpha / lora.rank)


def _export_adapter(
    checkpoint: _Checkpoint, lora: LoRAConfig, output: Path, weights: Weights, dtype: torch.dtype
) -> None:
    from diffusers import WanPipeline

    adapter = _read_adapter(checkpoint, lora, weights)
    WanPipeline.save_lora_weights(
        output,
        transformer_lora_layers={name.replace(".student.", "."): value.to(dtype) for name, value in adapter.items()},
        transformer_lora_adapter_metadata={
            "r": lora.rank, "lora_alpha": lora.alpha, "target_modules": list(lora.target_modules)
        },
    )  # fmt: skip


def _read_adapter(checkpoint: _Checkpoint, lora: LoRAConfig, weights: Weights) -> dict[str, Tensor]:
    shapes = adapter_names(checkpoint.architecture, "student", lora)
    tensors: dict[str, Tensor] = {name: torch.empty(shape) for name, shape in shapes.items()}
    read_tensors(checkpoint.folder, {weights: tensors}, distributed=False)
    return tensors


def _latent_space(config: TrainConfig) -> LatentSpace:
    # Clips that are encoded at the start are in the block DCT's, whoever the teacher is; and it is all that the bundled
    # teacher knows.
    shards = isinstance(config.data, ShardsData)
    return "wan" if shards and not config.teacher.startswith(BUNDLED) else "block-dct"


def _sources(config: TrainConfig, latent_space: LatentSpace, pipeline: str | None) -> list[str]:
    """Where the parts of the pipeline may be, best first."""
    if latent_space == "block-dct":
        if pipeline is not None:
            raise UserError(
                f"--pipeline {pipeline} has the parts for Wan2.1's latents, but this run was trained on those of the "
                "tiny preset, which need none. Leave --pipeline out."
            )
        return []
    return [source for source in (pipeline, config.codec, config.teacher) if source is not None]


def _find_parts(sources: Sequence[str]) -> dict[str, Path]:
    """For each part the folder of the first source that has it; later sources are not looked at without need."""
    found: dict[str, Path] = {}
    for source in sources:
        wanted = [name for name in PARTS if name not in found]
        folder = _open_source(source, wanted) if wanted else None
        if folder is not None:
            found |= {name: folder for name in wanted if _has_part(folder, name)}
    return found


def _open_source(source: str, parts: Sequence[str]) -> Path | None:
    """The folder of a pipeline, downloaded where it is on the hub; None for a source that is a transformer alone."""
    path = Path(source)
    if path.is_dir():
        return path
    if path.exists() or not re.fullmatch(r"[\w.-]+/[\w.-]+", source) or path.suffix in (".pt", ".pth", ".safetensors"):
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
    if name == "tokenizer":
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


def _model_index(parts: dict[str, Path], interpolator: bool) -> dict[str, Any]:
    index: dict[str, Any] = {"_class_name": "WanPipeline", "_diffusers_version": diffusers.__version__}
    for name, usual in PARTS.items():
        index[name] = _class_of(parts[name], name) or usual if name in parts else (None, None)
    index["scheduler"] = ("diffusers", "FlowMatchLCMScheduler")
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


def few_steps(scheduler: Mapping[str, Any]) -> Any:
    """The grid in a ``scheduler_config.json``, of an export or of a saved ``FewStepScheduler``; None if it has none."""
    return scheduler.get(GRID, scheduler.get("timesteps"))


def closest_scheduler(timesteps: Sequence[float]) -> FlowMatchLCMScheduler:
    """The sampler that students are trained for, as diffusers has it, with the grid that is closest to a student's.

    Its class has no field for a grid of one's own; ``shift`` and the end shape one, which begins at 1000. Exact for
    evenly spaced steps from 1000 and shifts of them (``1000, 750, 500, 250``; ``1000, 938, 833, 625``); for the paper's
    grid off by 1.1 of 1000. The exact grid stands beside them in an export, for who reads it: ``avd sample``, and
    ``FewStepScheduler`` of ``avd_integrations``.
    """
    if len(timesteps) == 1:
        return FlowMatchLCMScheduler()
    end = timesteps[-1] / FlowMatchingSchedule().num_train_timesteps

    def scheduler(log_shift: float) -> FlowMatchLCMScheduler:
        return FlowMatchLCMScheduler(shift=round(math.exp(log_shift), 4), shift_terminal=end)

    best = 0.0
    for width in (4.0, 0.1, 0.0025):  # a coarse look at shifts of 1/55 to 55, then closer ones
        tried = [best + width * place / 40 for place in range(-40, 41)]
        best = min(tried, key=lambda log_shift: grid_error(scheduler(log_shift), timesteps))
    return scheduler(best)


def grid_error(scheduler: FlowMatchLCMScheduler, timesteps: Sequence[float]) -> float:
    """The most by which a timestep that a scheduler samples at is off a student's."""
    scheduler.set_timesteps(len(timesteps))
    return max(abs(found - wanted) for found, wanted in zip(scheduler.timesteps.tolist(), timesteps, strict=True))


def _write_json(path: Path, value: Any) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(value, indent=2) + "\n")


def _expect_no_run(source: Path) -> None:
    kind = kind_of_run(source)
    if kind == "avd train-interpolator":
        raise UserError(
            f"{source} is a run of `{kind}` that is not finished, so it has no interpolator yet. Run its command again "
            "to the end, and then export."
        )
    if kind is not None:
        raise UserError(f"{source} is a run of `{kind}`. Pass one of `avd train-interpolator` as --interpolator.")


def _find(run: Path, step: int | None) -> Path:
    if (kind := kind_of_run(run)) == "avd train-interpolator":
        raise UserError(
            f"{run} is a run of `{kind}`, which has no student. Pass a run of `avd train`, and this one as "
            "--interpolator."
        )
    found = dict(list_checkpoints(run / "checkpoints"))
    if not found:
        raise UserError(f"{run} holds no checkpoint yet. Pass the --output folder of an `avd train` run.")
    if step is not None and step not in found:
        raise UserError(f"{run} has no checkpoint of step {step}; there are {sorted(found)}.")
    return found[max(found) if step is None else step]


def _is_export(folder: Path) -> bool:
    """Whether a folder is empty, or an export: someone's model looks like one, but for this file."""
    return folder.is_dir() and ((folder / ABOUT).is_file() or not any(folder.iterdir()))
