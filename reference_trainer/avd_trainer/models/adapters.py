"""Low-rank adapters apart from a model: merged into one, and in the files that other programs read."""

from __future__ import annotations

import json
import re
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import safe_open
from torch import Tensor, nn

from avd_trainer.models.weight_files import open_safetensors
from avd_trainer.models.weight_names import diffusers_names, original_names, some_of
from avd_trainer.runtime.errors import UserError

_PREFIX = "diffusion_model."
_DIFFUSERS_PREFIX = "transformer."
_DOWN, _UP = ".lora_A.weight", ".lora_B.weight"


class Adapters(NamedTuple):
    """Updates of linear layers, ``W + scale B A``.

    Attributes:
        matrices: ``(A, B)``, ``[r, in]`` and ``[out, r]``, for each layer by its name in diffusers, such as
            ``blocks.0.attn1.to_q``.
        scale: ``alpha / rank``.
    """

    matrices: dict[str, tuple[Tensor, Tensor]]
    scale: float


@torch.no_grad()
def merge_adapters(model: nn.Module, adapters: Adapters) -> None:
    """Add the updates to a model's weights, in place; in float32, whatever the weights' type and device.

    Raises:
        UserError: If the model has no such layer, or one of another size.
    """
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    wrong = [
        layer
        for layer, (matrix_a, matrix_b) in adapters.matrices.items()
        if shapes.get(f"{layer}.weight") != (len(matrix_b), matrix_a.shape[1])
    ]
    if wrong:
        raise UserError(
            f"The adapters do not fit the model: it has no {some_of(wrong)} of their size. Pass the model that they "
            "were trained on, of an export by --pipeline; of a run it is the teacher, to be put back where it was."
        )
    for layer, (matrix_a, matrix_b) in adapters.matrices.items():
        weight = model.get_parameter(f"{layer}.weight")
        matrices = (matrix.to(weight.device, torch.float32) for matrix in (matrix_b, matrix_a))
        weight.copy_(torch.addmm(weight.float(), *matrices, alpha=adapters.scale))


def program_tensors(adapters: Adapters, dtype: torch.dtype) -> dict[str, Tensor]:
    """What ComfyUI and LightX2V read: Wan2.1's names of the layers behind ``diffusion_model.``.

    ``B`` contains the scale. There is a key for it, ``.alpha``, but not all versions of LightX2V read that, and all
    programs take the scale as 1 where it is not there.
    """
    layers = _original_layers(adapters)
    tensors = {}
    for layer, (matrix_a, matrix_b) in adapters.matrices.items():
        tensors[_PREFIX + layers[layer] + _DOWN] = matrix_a.to(dtype)
        tensors[_PREFIX + layers[layer] + _UP] = (adapters.scale * matrix_b).to(dtype)
    return tensors


def holds_adapters(file: Path) -> bool:
    """Whether a safetensors file has adapters and not a whole model, by its names.

    Raises:
        UserError: If it cannot be read.
    """
    with ExitStack() as stack:
        return any(".lora_" in name for name in open_safetensors(file, stack))


def read_adapters(file: Path) -> Adapters:
    """Read what :func:`program_tensors` is in a safetensors file, or what diffusers saved of a run with LoRA.

    Raises:
        UserError: If the file cannot be read, or has other names.
    """
    with ExitStack() as stack:
        stored = open_safetensors(file, stack)
        in_diffusers = any(name.startswith(_DIFFUSERS_PREFIX) for name in stored)
        prefix = _DIFFUSERS_PREFIX if in_diffusers else _PREFIX
        pattern = re.compile(re.escape(prefix) + "(.+)(" + re.escape(_DOWN) + "|" + re.escape(_UP) + ")")
        found = {name: pattern.fullmatch(name) for name in stored}
        layers = {match[1] for match in found.values() if match is not None}
        whole = {prefix + layer + end for layer in layers for end in (_DOWN, _UP)}
        if wrong := sorted(whole ^ stored.keys()):
            raise UserError(
                f"{file} has adapters in other names than `avd export` writes: expected pairs such as "
                f"{_PREFIX}blocks.0.self_attn.q{_DOWN} and {_UP}, and these are unknown or missing: {some_of(wrong)}. "
                "Export the run again."
            )
        if in_diffusers:
            originals = {layer: layer for layer in layers}
        else:
            names = diffusers_names((f"{layer}.weight" for layer in layers), str(file))
            originals = {new.removesuffix(".weight"): old.removesuffix(".weight") for new, old in names.items()}
        matrices = {
            layer: (stored[prefix + original + _DOWN][()].clone(), stored[prefix + original + _UP][()].clone())
            for layer, original in originals.items()
        }
    return Adapters(matrices, _scale_in_diffusers(file) if in_diffusers else 1.0)


def _scale_in_diffusers(file: Path) -> float:
    """``alpha / rank``, which diffusers keeps beside the tensors."""
    with safe_open(file, framework="pt") as content:
        told = json.loads((content.metadata() or {}).get("lora_adapter_metadata", "{}"))
    try:
        return float(told[f"{_DIFFUSERS_PREFIX}lora_alpha"]) / float(told[f"{_DIFFUSERS_PREFIX}r"])
    except KeyError as error:
        raise UserError(f"{file} does not say the scale of its adapters ({error}). Export the run again.") from error


def _original_layers(adapters: Adapters) -> dict[str, str]:
    names = original_names(f"{layer}.weight" for layer in adapters.matrices)
    return {name.removesuffix(".weight"): original.removesuffix(".weight") for name, original in names.items()}
