"""Where a transformer's configuration and weights come from, read lazily and slice by slice."""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Mapping
from contextlib import ExitStack
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from avd_trainer.models.weight_files import (
    _PICKLES,
    find_transformer,
    locate,
    open_pickle,
    open_safetensors,
    weight_files,
)
from avd_trainer.models.weight_names import StoredTensor, _bare, diffusers_names, infer_config, some_of
from avd_trainer.runtime.errors import UserError


class TransformerWeights:
    """The tensors of a Wan transformer under diffusers' names; bytes are read when asked for.

    Opening maps the files and reads their headers only. Close it, or use it in a ``with`` statement, to let go of them.

    Attributes:
        source: What it was opened from, for messages.
        config: Keyword arguments of diffusers' ``WanTransformer3DModel``.
    """

    def __init__(
        self, source: str, config: dict[str, Any], tensors: Mapping[str, StoredTensor], files: ExitStack
    ) -> None:
        self.source, self.config = source, config
        self._tensors, self._files = dict(tensors), files

    def names(self) -> list[str]:
        """Names of all tensors, as in ``WanTransformer3DModel.state_dict()``, sorted."""
        return sorted(self._tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a whole tensor."""
        return tuple(self._tensors[name].shape)

    def dtype(self, name: str) -> torch.dtype:
        """The type that the file holds."""
        return self._tensors[name].dtype

    def read(self, name: str, slices: tuple[slice, ...] | None = None) -> Tensor:
        """A copy of a tensor or of a part of it, on the CPU, in the file's type.

        Args:
            name: One of :meth:`names`.
            slices: One slice for each of the first dimensions; ``None`` for the whole tensor.
        """
        return self._tensors[name][slices or ()].clone(memory_format=torch.contiguous_format)

    def digest(self) -> str:
        """A word for the configuration and all weights, the same for any files that hold the same."""
        digest = hashlib.blake2b(json.dumps(self.config, sort_keys=True, default=str).encode(), digest_size=12)
        for name in self.names():
            digest.update(f"{name} {self.shape(name)} {self.dtype(name)}".encode())
            digest.update(self.read(name).flatten().view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()

    def close(self) -> None:
        """Let go of the files; nothing can be read afterwards."""
        self._tensors.clear()
        self._files.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def open_weights(source: str, *, config: Mapping[str, Any] | None = None) -> TransformerWeights:
    """Find a transformer and open it without reading its weights.

    Args:
        source: One of

            - ``bundled:NAME``;
            - a folder that diffusers saved: a transformer's, or a pipeline's with ``transformer/`` in it;
            - a folder in the layout of the original Wan2.1 release;
            - a ``.safetensors`` file with the names of either;
            - a student's ``.pt`` or ``.pth`` file of CausVid, Self-Forcing or the released AVD code. Of several parts
              ``generator_ema`` comes before ``generator``; ``FILE#generator`` or any other key chooses;
            - the name of a repository on the Hugging Face hub, whose transformer alone is downloaded, once.
        config: For a single file, which says nothing of its heads: the configuration of the model it belongs to.
            Without it all is inferred from shapes, with heads of 128 channels as in every released Wan model. Folders
            have their own, and this is not looked at.

    Raises:
        UserError: If there is no such thing, a file is missing or damaged, it would have to be unpickled, or it holds
            another kind of model.
    """
    path, part = locate(source)
    folder_config = None
    if path.is_dir():
        path, folder_config = find_transformer(path)
    with ExitStack() as stack:
        tensors: dict[str, StoredTensor] = {}
        for file in [path] if folder_config is None else weight_files(path):
            tensors |= open_pickle(file, part) if file.suffix in _PICKLES else open_safetensors(file, stack)
        tensors = {name: tensors[stored] for name, stored in diffusers_names(tensors, source).items()}
        return TransformerWeights(source, _config(source, folder_config, config, tensors), tensors, stack.pop_all())


@torch.no_grad()
def load_into(model: nn.Module, weights: TransformerWeights) -> None:
    """Fill a model's parameters in place, whatever their dtype and device.

    Of a parameter that is a ``DTensor``, as ``fully_shard`` makes them, each rank reads its own shard and nothing else;
    no rank talks to another. Adapters of peft are left as they are. Nothing is written before every name and shape is
    found right. Buffers are not in the files: after ``to_empty`` the rotary embedding's have to be made anew.

    Args:
        model: A ``WanTransformer3DModel``, also wrapped by peft, activation checkpointing or ``torch.compile``.
        weights: Where to read.

    Raises:
        UserError: If a parameter has no tensor of its shape, or a tensor no parameter.
        ValueError: If a parameter is on the meta device.
    """
    parameters = check_fit(model, weights)
    if any(parameter.is_meta for parameter in parameters.values()):
        raise ValueError("load_into needs parameters with memory; call model.to_empty(device=...) first.")
    for name, parameter in parameters.items():
        if not isinstance(parameter, DTensor):
            parameter.copy_(weights.read(name))
            continue
        shape, offset = compute_local_shape_and_global_offset(
            parameter.shape, parameter.device_mesh, parameter.placements
        )
        if math.prod(shape):
            own = tuple(slice(start, start + length) for start, length in zip(offset, shape, strict=True))
            parameter.to_local().copy_(weights.read(name, own))


def _config(
    source: str,
    folder_config: dict[str, Any] | None,
    given: Mapping[str, Any] | None,
    tensors: Mapping[str, StoredTensor],
) -> dict[str, Any]:
    config = given if folder_config is None else folder_config
    if config is None or "num_heads" in config:
        return infer_config(source, config or {}, tensors)
    return {key: value for key, value in config.items() if not key.startswith("_")}


def check_fit(model: nn.Module, weights: TransformerWeights) -> dict[str, nn.Parameter]:
    """The parameters of a model by the names that weights have; arguments and errors as for :func:`load_into`."""
    parameters = {
        _bare(name).replace(".base_layer.", "."): parameter
        for name, parameter in model.named_parameters()
        if "lora_" not in name
    }
    names = set(weights.names())
    absent = [f"{name} is not in it" for name in parameters if name not in names]
    unknown = [f"{name} is not in the model" for name in sorted(names - parameters.keys())]
    reshaped = [
        f"{name} is {list(weights.shape(name))}, the model's {list(parameter.shape)}"
        for name, parameter in parameters.items()
        if name in names and weights.shape(name) != tuple(parameter.shape)
    ]
    if not (absent or unknown or reshaped):
        return parameters
    # One model's layers are a beginning of the other's, or the same layers are wider: both are a matter of size.
    size = all(re.search(r"^blocks\.\d+\.", line) for line in absent + unknown)
    raise UserError(
        f"{weights.source} does not fit the model: {some_of(reshaped + absent + unknown, '; ')}. "
        + (
            "It is a model of another size, such as a 14B student of a 1.3B teacher."
            if size
            else "It is another kind of model (such as VACE), or not a whole one."
        )
    )
