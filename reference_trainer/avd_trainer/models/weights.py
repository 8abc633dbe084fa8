"""Where a transformer's configuration and weights come from, read lazily and slice by slice."""

from __future__ import annotations

import json
import math
import pickle
import re
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from importlib import resources
from pathlib import Path
from typing import Any, Protocol, Self

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from avd_trainer.runtime.errors import UserError

BUNDLED = "bundled:"
HEAD_DIM = 128
"""Width of an attention head in every released Wan model."""

_CONFIG = "config.json"
_WEIGHTS = "diffusion_pytorch_model.safetensors"
_INDEX = "diffusion_pytorch_model.safetensors.index.json"
_PICKLES = (".pt", ".pth")
# Of a repository on the hub; a star also stands for slashes, so a pattern begins with a name.
_DOWNLOADED = (_CONFIG, "diffusion_pytorch_model*", f"transformer/{_CONFIG}", "transformer/diffusion_pytorch_model*")
# What holds a generator in the files of CausVid, Self-Forcing and the released AVD code, best first.
_PARTS = ("generator_ema", "generator", "model")
_UNDERSTOOD = (
    "Pass 'bundled:tiny', a folder of diffusers or of Wan2.1 (config.json and safetensors), a .safetensors or .pt "
    "file, or a Hugging Face name such as Wan-AI/Wan2.1-T2V-1.3B-Diffusers."
)


class TransformerWeights:
    """The tensors of a text-to-video Wan transformer under diffusers' names; bytes are read when asked for.

    Opening maps the files and reads their headers only. Close it, or use it in a ``with`` statement, to let go of them.

    Attributes:
        source: What it was opened from, for messages.
        config: Keyword arguments of diffusers' ``WanTransformer3DModel``.
    """

    def __init__(self, source: str, config: dict[str, Any], tensors: Mapping[str, _Stored], files: ExitStack) -> None:
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
    path, part = _locate(source)
    folder_config = None
    if path.is_dir():
        path, folder_config = _find_transformer(path)
    with ExitStack() as stack:
        tensors: dict[str, _Stored] = {}
        for file in [path] if folder_config is None else _weight_files(path):
            tensors |= _open_pickle(file, part) if file.suffix in _PICKLES else _open_safetensors(file, stack)
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
    parameters = {
        _bare(name).replace(".base_layer.", "."): parameter
        for name, parameter in model.named_parameters()
        if "lora_" not in name
    }
    _check_fit(parameters, weights)
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


def diffusers_names(names: Iterable[str], source: str) -> dict[str, str]:
    """Which stored tensor each of diffusers' names stands for.

    Args:
        names: Names as stored: diffusers' or the original ones, also behind the prefixes that FSDP, DDP,
            ``torch.compile``, activation checkpointing and wrapper modules add.
        source: What they come from, for messages.

    Raises:
        UserError: If they are not those of a Wan transformer.
    """
    bare = {_bare(name): name for name in names}
    if any(".attn1." in name for name in bare):
        return bare
    if not any(".self_attn." in name for name in bare):
        raise UserError(
            f"{source} holds no Wan transformer: expected names such as blocks.0.self_attn.q.weight, got "
            f"{_some(sorted(bare))}. Pass the transformer's own file or folder."
        )
    # Semi-private in diffusers: should it go one day, the other layouts are still read.
    from diffusers.loaders.single_file_utils import convert_wan_transformer_to_diffusers

    # It renames the keys of a state dict and leaves its values alone, so each name travels as its own value.
    return {new: bare[old] for new, old in convert_wan_transformer_to_diffusers({name: name for name in bare}).items()}


class _Stored(Protocol):
    """A tensor in a file. A memory-mapped tensor is one, too."""

    @property
    def shape(self) -> Iterable[int]: ...

    @property
    def dtype(self) -> torch.dtype: ...

    def __getitem__(self, slices: Any, /) -> Tensor: ...


class _InSafetensors:
    """A tensor in a safetensors file."""

    def __init__(self, file: safe_open, name: str) -> None:
        self._file, self._name = file, name

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self._file.get_slice(self._name).get_shape())

    @property
    def dtype(self) -> torch.dtype:
        return self[(slice(0),) if self.shape else ()].dtype

    def __getitem__(self, slices: tuple[slice, ...]) -> Tensor:
        part: Tensor = self._file.get_slice(self._name)[slices]
        return part


def _locate(source: str) -> tuple[Path, str]:
    """The file or folder of a source on this machine, and the part of the file that it asks for, or ""."""
    if source.startswith(BUNDLED):
        source = str(resources.files("avd_trainer") / "assets" / f"{source.removeprefix(BUNDLED)}-teacher")
    path = Path(source)
    if path.exists():
        return path, ""
    file, _, part = source.rpartition("#")
    if Path(file).suffix in _PICKLES and Path(file).is_file():
        return Path(file), part
    if re.fullmatch(r"[\w.-]+/[\w.-]+", source) and path.suffix not in (*_PICKLES, ".safetensors"):
        return _download(source), ""
    raise UserError(f"{source}: there is no such file or folder. {_UNDERSTOOD}")


def _download(repository: str) -> Path:
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(repository, allow_patterns=list(_DOWNLOADED)))
    except Exception as error:  # The hub's HTTP library, and with it the class of its errors, changed several times.
        raise UserError(
            f"{repository}: there is no such folder here, and it cannot be downloaded ({_reason(error)}). Check the "
            f"name; where there is no network, run 'hf download {repository} --local-dir FOLDER' elsewhere and pass "
            "FOLDER."
        ) from error


def _find_transformer(folder: Path) -> tuple[Path, dict[str, Any]]:
    """The folder with the transformer's config.json, and its content."""
    if not (folder / _CONFIG).is_file() and (folder / "transformer" / _CONFIG).is_file():
        folder = folder / "transformer"
    if not (folder / _CONFIG).is_file():
        raise UserError(f"{folder} holds neither {_CONFIG} nor transformer/{_CONFIG}. {_UNDERSTOOD}")
    config = _read_json(folder / _CONFIG)
    if config.get("_class_name") != "WanTransformer3DModel" and not {"model_type", "num_heads"} <= config.keys():
        raise UserError(
            f"{folder / _CONFIG} describes {config.get('_class_name', 'something else')!r}, expected diffusers' "
            f"WanTransformer3DModel or Wan2.1's original layout (model_type, num_heads). {_UNDERSTOOD}"
        )
    return folder, config


def _weight_files(folder: Path) -> list[Path]:
    if not (folder / _INDEX).is_file():
        if not (folder / _WEIGHTS).is_file():
            raise UserError(
                f"{folder} holds neither {_WEIGHTS} nor {_INDEX}. Copy the weights beside {_CONFIG}; other formats are "
                "not read, save them again by diffusers' save_pretrained."
            )
        return [folder / _WEIGHTS]
    shards = sorted(set(_read_json(folder / _INDEX).get("weight_map", {}).values()))
    missing = [shard for shard in shards if not (folder / shard).is_file()]
    if missing or not shards:
        raise UserError(
            f"{folder / _INDEX} lists {len(shards)} files, of which {_some(missing) or 'none'} "
            f"{'is' if len(missing) == 1 else 'are'} missing. Download or copy the folder again."
        )
    return [folder / shard for shard in shards]


def _open_safetensors(path: Path, stack: ExitStack) -> dict[str, _Stored]:
    try:
        file = stack.enter_context(safe_open(path, framework="pt", device="cpu"))
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"{path} cannot be read ({_reason(error)}). It is no safetensors file or only a part of one; download or "
            "copy it again."
        ) from error
    return {name: _InSafetensors(file, name) for name in file.keys()}  # noqa: SIM118 (not iterable by itself)


def _open_pickle(path: Path, part: str) -> dict[str, _Stored]:
    """The tensors of a student's file, mapped and not read. Nothing but tensors and containers is ever unpickled."""
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError as error:
        raise UserError(
            f"{path} holds more than tensors, so loading it could run code, and it is not loaded. Save the generator's "
            "state_dict alone, where you trust the file."
        ) from error
    except (OSError, RuntimeError, EOFError) as error:
        raise UserError(
            f"{path} cannot be read ({_reason(error)}). It is damaged, only a part of a file, or saved by a PyTorch "
            "older than 1.6; download or copy it again."
        ) from error
    found = list(content) if isinstance(content, dict) else []
    key = part or next((key for key in _PARTS if key in found), None)
    if key is not None and key not in found:
        raise UserError(f"{path} has no part {key!r}; it has {_some(map(str, found)) or 'none'}.")
    tensors = content[key] if key is not None else content
    if not isinstance(tensors, dict) or not all(isinstance(value, Tensor) for value in tensors.values()):
        raise UserError(
            f"{path}: expected a dictionary of tensors, by itself or under one of {', '.join(_PARTS)}; got "
            f"{_some(map(str, found)) or type(content).__name__}. Choose a part by FILE#KEY."
        )
    return tensors


def _config(
    source: str, folder_config: dict[str, Any] | None, given: Mapping[str, Any] | None, tensors: Mapping[str, _Stored]
) -> dict[str, Any]:
    if any("add_k_proj" in name or "image_embedder" in name for name in tensors):
        raise UserError(f"{source} is an image-to-video model, which needs input that is not there. Pass a T2V model.")
    config = given if folder_config is None else folder_config
    if config is None or "num_heads" in config:
        return _infer_config(source, config or {}, tensors)
    return {key: value for key, value in config.items() if not key.startswith("_")}


def _infer_config(source: str, original: Mapping[str, Any], tensors: Mapping[str, _Stored]) -> dict[str, Any]:
    """The configuration by the tensors' shapes, which Wan2.1's own config.json leaves out in part, and its heads."""
    try:
        dim, channels, *patch = tensors["patch_embedding.weight"].shape
        _, freq_dim = tensors["condition_embedder.time_embedder.linear_1.weight"].shape
        _, text_dim = tensors["condition_embedder.text_embedder.linear_1.weight"].shape
        ffn_dim, _ = tensors["blocks.0.ffn.net.0.proj.weight"].shape
        out, _ = tensors["proj_out.weight"].shape
    except (KeyError, ValueError) as error:
        raise UserError(f"{source} is not a whole Wan transformer: {error} is missing or has another rank.") from error
    heads = original.get("num_heads") or (0 if dim % HEAD_DIM else dim // HEAD_DIM)
    if not heads or dim % heads:
        raise UserError(
            f"{source}: a width of {dim} does not divide into heads of {HEAD_DIM} as Wan's do. Pass the configuration "
            "of the model it was trained from."
        )
    return {
        "patch_size": tuple(patch),
        "num_attention_heads": heads,
        "attention_head_dim": dim // heads,
        "in_channels": channels,
        "out_channels": out // math.prod(patch),
        "text_dim": text_dim,
        "freq_dim": freq_dim,
        "ffn_dim": ffn_dim,
        "num_layers": 1 + max(int(name.split(".")[1]) for name in tensors if name.startswith("blocks.")),
        "cross_attn_norm": "blocks.0.norm2.weight" in tensors,
        "qk_norm": "rms_norm_across_heads" if "blocks.0.attn1.norm_q.weight" in tensors else None,
        "eps": original.get("eps", 1e-6),
    }


def _check_fit(parameters: Mapping[str, Tensor], weights: TransformerWeights) -> None:
    names = set(weights.names())
    absent = [f"{name} is not in it" for name in parameters if name not in names]
    unknown = [f"{name} is not in the model" for name in sorted(names - parameters.keys())]
    reshaped = [
        f"{name} is {list(weights.shape(name))}, the model's {list(parameter.shape)}"
        for name, parameter in parameters.items()
        if name in names and weights.shape(name) != tuple(parameter.shape)
    ]
    if not (absent or unknown or reshaped):
        return
    # One model's layers are a beginning of the other's, or the same layers are wider: both are a matter of size.
    size = all(re.search(r"^blocks\.\d+\.", line) for line in absent + unknown)
    raise UserError(
        f"{weights.source} does not fit the model: {_some(reshaped + absent + unknown, '; ')}. "
        + (
            "It is a model of another size, such as a 14B student of a 1.3B teacher."
            if size
            else "It is another kind of model (such as VACE), or not a whole one."
        )
    )


def _bare(name: str) -> str:
    """A parameter's name without what wrappers add to it."""
    name = re.sub(r"(_fsdp_wrapped_module|_checkpoint_wrapped_module|_orig_mod)\.", "", name)
    return re.sub(r"^((base_model|model|module|diffusion_model)\.)+", "", name)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read: {error}. Download or copy it again.") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} holds a {type(content).__name__}, expected an object. Download or copy it again.")
    return content


def _some(items: Iterable[str], separator: str = ", ") -> str:
    """The first three, and how many more there are."""
    items = list(items)
    return separator.join(items[:3]) + (f" and {len(items) - 3} more" if len(items) > 3 else "")


def _reason(error: Exception) -> str:
    """The first line of an error; what libraries write after it is advice for programmers."""
    first = str(error).strip().partition("\n")[0].rstrip(".")
    return f"{type(error).__name__}: {first}"
