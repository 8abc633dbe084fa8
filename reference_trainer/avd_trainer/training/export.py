"""From a checkpoint to models that diffusers loads."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar

import torch
from diffusers import WanTransformer3DModel
from safetensors import SafetensorError
from torch import Tensor, nn

from avd_trainer.config.loading import validate
from avd_trainer.config.sections import LoRAConfig, ShapesData
from avd_trainer.data.schema import Encoding
from avd_trainer.methods.distillation import DistillationConfig
from avd_trainer.methods.registry import load_method
from avd_trainer.models.adapters import Adapters, merge_adapters
from avd_trainer.models.roles import Average, Built, Trained, build_whole
from avd_trainer.models.transformer import adapter_names, empty_transformer
from avd_trainer.models.weights import load_into, open_weights
from avd_trainer.runtime.errors import UserError
from avd_trainer.training.checkpoint import list_checkpoints, read_state, read_tensors
from avd_trainer.training.config import TrainConfig
from avd_trainer.training.folder import CHECKPOINTS, method_of_run
from avd_trainer.training.sample_clips import frames_per_second

Result = TypeVar("Result")

Weights = Literal["ema", "student"]

_DOWN, _UP = ".lora_A.student.weight", ".lora_B.student.weight"

ABOUT = "export.json"
"""In an export: of which run, step and weights it is; and how the student's clips are made."""


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

    def write(checkpoint: SavedRun, folder: Path) -> None:
        lora = checkpoint.lora
        if lora is None:
            write_transformer(checkpoint, folder, weights, dtype)
        else:
            _export_adapter(checkpoint, lora, folder, weights, dtype)
        write_json_in(folder / ABOUT, checkpoint.about(run, weights) | checkpoint.about_clips())

    replace_export(run, output, step, write)


def export_product(run: Path, output: Path) -> nn.Module | None:
    """Write what a run has trained, of its newest checkpoint; one process calls.

    A student as :func:`export_student`; another role's module as its ``save_pretrained`` does, with the averaged
    weights where there are any, a transformer in bfloat16.

    Returns:
        That module, in evaluation mode, on the CPU; None for a student.

    Raises:
        UserError: If there is no whole checkpoint, or ``output`` cannot be written.
    """
    saved = open_run(run)
    roles, name = saved.config.method.roles(), saved.config.method.main_role
    role = roles[name]
    if not isinstance(role, Built):
        export_student(run, output)
        return None
    module = build_whole(role, saved.state["latent_shape"], saved.state["architecture"] or {}, saved.config.seed)
    averages = [key for key, other in roles.items() if isinstance(other, Average) and other.of == name]
    parameters = {key: parameter.detach() for key, parameter in module.named_parameters()}
    read_tensors(saved.folder, {(averages or [name])[0]: parameters}, distributed=False)
    if isinstance(module, WanTransformer3DModel):
        for parameter in module.parameters():
            parameter.data = parameter.data.to(torch.bfloat16)  # half the download
    part = output.with_name(output.name + ".part")
    try:
        shutil.rmtree(part, ignore_errors=True)
        module.save_pretrained(part)  # type: ignore[operator]
        shutil.rmtree(output, ignore_errors=True)
        os.replace(part, output)
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"{output} cannot be written: {error}. Free some space, then run the same command again."
        ) from error
    return module.eval()


def open_run(run: Path, step: int | None = None) -> SavedRun:
    """A checkpoint of a run, of a step or the newest.

    Raises:
        UserError: If there is no such checkpoint, or it is damaged.
    """
    found = dict(list_checkpoints(run / CHECKPOINTS))
    if not found and (run / "student").is_dir():
        raise UserError(
            f"{run} is finished and has no checkpoint any more, as in a study. Its student's weights are in "
            f"{run / 'student'}, for diffusers: a transformer, or of a LoRA run adapters. `avd evaluate` and `avd "
            "compare` take the run itself."
        )
    if not found:
        raise UserError(f"{run} holds no checkpoint yet. Pass the --output folder of an `avd train` run.")
    if step is not None and step not in found:
        raise UserError(f"{run} has no checkpoint of step {step}; there are {sorted(found)}.")
    checkpoint = found[max(found) if step is None else step]
    state = read_state(checkpoint)
    config = {**state["config"], **state.get("local_sources", {})}  # checkpoints from before have none
    return SavedRun(checkpoint, state, validate(TrainConfig, config, f"{checkpoint}"))


class SavedRun(NamedTuple):
    """A checkpoint of a run.

    Attributes:
        folder: Of the checkpoint.
        state: Its numbers and strings.
        config: The run's.
    """

    folder: Path
    state: dict[str, Any]
    config: TrainConfig

    @property
    def architecture(self) -> dict[str, Any]:
        """Keyword arguments of its transformers."""
        architecture: dict[str, Any] = self.state["architecture"]
        return architecture

    @property
    def encoding(self) -> Encoding:
        """How the run's clips became latents."""
        return Encoding(**self.state["encoding"])

    @property
    def lora(self) -> LoRAConfig | None:
        """The student's adapters, if it has any."""
        role = self.config.method.roles()["student"]
        assert isinstance(role, Trained)
        return role.lora

    @property
    def timesteps(self) -> list[float]:
        """The student's few steps, falling."""
        return [float(timestep) for timestep in self.config.few_steps or ()]

    def about(self, run: Path, weights: Weights) -> dict[str, Any]:
        """Where an export came from."""
        return {"run": str(run), "step": self.state["step"], "weights": weights, "version": self.state["version"]}

    def about_clips(self) -> dict[str, Any]:
        """What the student makes: what sampling and measuring have to know."""
        data = self.config.data
        return {
            "latent_space": self.encoding.latent_space,
            "clip": self.state["latent_shape"],
            "fps": frames_per_second(self.config.samples, self.encoding),
            "timesteps": self.timesteps,
            "sampler": self.config.sampled_by,
            "captions": data.captions if isinstance(data, ShapesData) else None,
        }


def replace_export(run: Path, output: Path, step: int | None, write: Callable[[SavedRun, Path], Result]) -> Result:
    """Let ``write`` fill a folder beside ``output`` and give it that name."""
    output = output.resolve()  # also "." has a name
    _expect_student(run)
    saved = open_run(run, step)
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
        result = write(saved, part)
        # Moved and then removed: cut short at any point, what has the name is whole.
        if output.exists():
            os.replace(output, old)
        os.replace(part, output)
        shutil.rmtree(old, ignore_errors=True)
        return result
    except UserError:
        if step is None and not saved.folder.exists():  # the run went on and removed it meanwhile
            return replace_export(run, output, step, write)
        raise
    except (OSError, SafetensorError) as error:
        raise UserError(f"{output} cannot be written: {error}. Free space or choose another --output.") from error
    finally:
        shutil.rmtree(part, ignore_errors=True)


def write_transformer(checkpoint: SavedRun, output: Path, weights: Weights, dtype: torch.dtype) -> None:
    """Write the student as a whole transformer; adapters are merged into their base."""
    student_transformer(checkpoint, weights, dtype).save_pretrained(output, safe_serialization=True)


def student_transformer(checkpoint: SavedRun, weights: Weights, dtype: torch.dtype) -> WanTransformer3DModel:
    """The student as a whole transformer, on the CPU; adapters are merged into their base."""
    teacher = checkpoint.config.teacher
    model: WanTransformer3DModel = empty_transformer(checkpoint.architecture, torch.device("cpu"))
    if checkpoint.lora is None:
        parameters = {name: parameter.detach() for name, parameter in model.named_parameters()}
        read_tensors(checkpoint.folder, {weights: parameters}, distributed=False)
    else:
        assert teacher is not None
        with open_weights(teacher) as base:
            load_into(model, base)
        merge_adapters(model, student_adapters(checkpoint, checkpoint.lora, weights))
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    return model


def student_adapters(checkpoint: SavedRun, lora: LoRAConfig, weights: Weights) -> Adapters:
    """A LoRA student's adapters, in float32."""
    tensors = _read_adapter(checkpoint, lora, weights)
    matrices = {
        name.removesuffix(_DOWN): (matrix, tensors[name.removesuffix(_DOWN) + _UP])
        for name, matrix in tensors.items()
        if name.endswith(_DOWN)
    }
    return Adapters(matrices, lora.alpha / lora.rank)


def _export_adapter(checkpoint: SavedRun, lora: LoRAConfig, output: Path, weights: Weights, dtype: torch.dtype) -> None:
    from diffusers import WanPipeline

    adapter = _read_adapter(checkpoint, lora, weights)
    WanPipeline.save_lora_weights(
        output,
        transformer_lora_layers={name.replace(".student.", "."): value.to(dtype) for name, value in adapter.items()},
        transformer_lora_adapter_metadata={
            "r": lora.rank, "lora_alpha": lora.alpha, "target_modules": list(lora.target_modules),
            "rank_pattern": {}, "alpha_pattern": {},  # all alike; older diffusers asks for them
        },
    )  # fmt: skip


def _read_adapter(checkpoint: SavedRun, lora: LoRAConfig, weights: Weights) -> dict[str, Tensor]:
    shapes = adapter_names(checkpoint.architecture, "student", lora)
    tensors: dict[str, Tensor] = {name: torch.empty(shape) for name, shape in shapes.items()}
    read_tensors(checkpoint.folder, {weights: tensors}, distributed=False)
    return tensors


def write_json_in(path: Path, value: Any) -> None:
    """Write a file of an export, whose folder may be missing yet."""
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(value, indent=2) + "\n")


def _expect_student(run: Path) -> None:
    method = method_of_run(run)
    if method is not None and not issubclass(load_method(method).Config, DistillationConfig):
        hint = ", and this one as --interpolator" if method == "frame_interpolation" else ""
        raise UserError(f"{run} is a run of method {method}, which has no student. Pass a run of one that has{hint}.")


def _is_export(folder: Path) -> bool:
    """Whether a folder is empty, or an export: someone's model looks like one, but for this file."""
    return folder.is_dir() and ((folder / ABOUT).is_file() or not any(folder.iterdir()))
