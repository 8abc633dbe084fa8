"""From a checkpoint to a student that diffusers loads."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any, Literal

import torch
from diffusers import WanTransformer3DModel
from safetensors import SafetensorError
from torch import Tensor

from avd_trainer.checkpoint import list_checkpoints, read_state, read_tensors
from avd_trainer.config import LoRAConfig, TrainConfig, validate
from avd_trainer.errors import UserError
from avd_trainer.models import adapter_names, empty_transformer

Weights = Literal["ema", "student"]

ABOUT = "export.json"
"""In an export: of which run, step and weights it is."""


def export_student(
    run: Path,
    output: Path,
    *,
    weights: Weights = "ema",
    step: int | None = None,
    dtype: torch.dtype = torch.float32,
) -> None:
    """Write the student of a run.

    A fully trained student becomes a diffusers transformer folder (``config.json`` and safetensors); a LoRA student
    becomes adapters (``pytorch_lora_weights.safetensors``) for ``WanPipeline.load_lora_weights``. Holds one model in
    memory, on the CPU.

    Args:
        run: The folder of a run that has saved a checkpoint; the run may be going on.
        output: Where to write; replaced if an earlier export is there.
        weights: ``ema`` for the averaged weights, ``student`` for those of the last update.
        step: The checkpoint of which step; None for the newest.
        dtype: Type of the exported weights.

    Raises:
        UserError: If there is no such checkpoint, or ``output`` cannot be written or holds something else.
    """
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
        if config.student_lora is None:
            _export_transformer(checkpoint, state["architecture"], part, weights, dtype)
        else:
            _export_adapter(checkpoint, state["architecture"], config.student_lora, part, weights, dtype)
        about = {"run": str(run), "step": state["step"], "weights": weights, "version": state["version"]}
        (part / ABOUT).write_text(json.dumps(about, indent=2) + "\n")
        # Moved and then removed: cut short at any point, what has the name is whole.
        if output.exists():
            os.replace(output, old)
        os.replace(part, output)
        shutil.rmtree(old, ignore_errors=True)
    except UserError:
        if step is None and not checkpoint.exists():  # the run went on and removed it meanwhile
            return export_student(run, output, weights=weights, dtype=dtype)
        raise
    except (OSError, SafetensorError) as error:
        raise UserError(f"{output} cannot be written: {error}. Free space or choose another --output.") from error
    finally:
        shutil.rmtree(part, ignore_errors=True)


def _export_transformer(
    checkpoint: Path, architecture: dict[str, Any], output: Path, weights: Weights, dtype: torch.dtype
) -> None:
    model: WanTransformer3DModel = empty_transformer(architecture, torch.device("cpu"))
    read_tensors(checkpoint, {weights: {n: p.detach() for n, p in model.named_parameters()}}, distributed=False)
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    model.save_pretrained(output, safe_serialization=True)


def _export_adapter(
    checkpoint: Path,
    architecture: dict[str, Any],
    lora: LoRAConfig,
    output: Path,
    weights: Weights,
    dtype: torch.dtype,
) -> None:
    from diffusers import WanPipeline

    shapes = adapter_names(architecture, "student", lora)
    tensors: dict[str, Tensor] = {name: torch.empty(shape) for name, shape in shapes.items()}
    read_tensors(checkpoint, {weights: tensors}, distributed=False)
    WanPipeline.save_lora_weights(
        output,
        transformer_lora_layers={name.replace(".student.", "."): value.to(dtype) for name, value in tensors.items()},
        transformer_lora_adapter_metadata={
            "r": lora.rank, "lora_alpha": lora.alpha, "target_modules": list(lora.target_modules)
        },
    )  # fmt: skip


def _find(run: Path, step: int | None) -> Path:
    found = dict(list_checkpoints(run / "checkpoints"))
    if not found:
        raise UserError(f"{run} holds no checkpoint yet. Pass the --output folder of an `avd train` run.")
    if step is not None and step not in found:
        raise UserError(f"{run} has no checkpoint of step {step}; there are {sorted(found)}.")
    return found[max(found) if step is None else step]


def _is_export(folder: Path) -> bool:
    """Whether a folder is empty, or an export: someone's model looks like one, but for this file."""
    return folder.is_dir() and ((folder / ABOUT).is_file() or not any(folder.iterdir()))
