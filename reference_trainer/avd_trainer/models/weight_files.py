"""Files with weights: finding them, downloading them, reading single tensors without unpickling."""

from __future__ import annotations

import json
import pickle
import re
from contextlib import ExitStack
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from avd_trainer.models.weight_names import UNDERSTOOD, StoredTensor, some_of
from avd_trainer.runtime.errors import UserError

BUNDLED = "bundled:"
ADAPTERS = "pytorch_lora_weights.safetensors"
"""diffusers' name of a file of adapters, which a run with LoRA leaves."""
_CONFIG = "config.json"
_WEIGHTS = "diffusion_pytorch_model.safetensors"
_INDEX = "diffusion_pytorch_model.safetensors.index.json"
_PICKLES = (".pt", ".pth")
# Of a repository on the hub; a star also stands for slashes, so a pattern begins with a name.
_DOWNLOADED = (_CONFIG, "diffusion_pytorch_model*", f"transformer/{_CONFIG}", "transformer/diffusion_pytorch_model*")
# What holds a generator in the files of CausVid, Self-Forcing and the released AVD code, best first.
_PARTS = ("generator_ema", "generator", "model")


class _InSafetensors:
    """A tensor in a safetensors file."""

    def __init__(self, file: safe_open, name: str) -> None:
        self._file, self._name = file, name

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self._slice.get_shape())

    @property
    def dtype(self) -> torch.dtype:
        return self[(slice(0),) if self.shape else ()].dtype

    def __getitem__(self, slices: tuple[slice, ...]) -> Tensor:
        part: Tensor = self._slice[slices]
        return part

    @property
    def _slice(self) -> Any:
        return self._file.get_slice(self._name)  # type: ignore[no-untyped-call]


def locate(source: str) -> tuple[Path, str]:
    """The file or folder of a source on this machine, and the part of the file that it asks for, or ""."""
    if source.startswith(BUNDLED):
        source = str(resources.files("avd_trainer") / "assets" / f"{source.removeprefix(BUNDLED)}-teacher")
    path = Path(source)
    if path.exists():
        return path, ""
    file, _, part = source.rpartition("#")
    if Path(file).suffix in _PICKLES and Path(file).is_file():
        return Path(file), part
    if is_on_hub(source):
        return _download(source), ""
    raise UserError(f"{source}: there is no such file or folder. {UNDERSTOOD}")


def is_on_hub(source: str) -> bool:
    """Whether a source is a name on the hub: in the form of one, and no file or folder here."""
    path = Path(source)
    named = re.fullmatch(r"[\w.-]+/[\w.-]+", source) is not None
    return named and path.suffix not in (*_PICKLES, ".safetensors") and not path.exists()


def _download(repository: str) -> Path:
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(repository, allow_patterns=list(_DOWNLOADED)))
    except Exception as error:  # The hub's HTTP library, and with it the class of its errors, changed several times.
        raise UserError(
            f"{repository}: there is no such folder here, and it cannot be downloaded ({reason_of(error)}). Check the "
            f"name; where there is no network, run 'hf download {repository} --local-dir FOLDER' elsewhere and pass "
            "FOLDER."
        ) from error


def find_transformer(folder: Path) -> tuple[Path, dict[str, Any]]:
    """The folder with the transformer's config.json, and its content."""
    if not (folder / _CONFIG).is_file() and (folder / "transformer" / _CONFIG).is_file():
        folder = folder / "transformer"
    if not (folder / _CONFIG).is_file() and (folder / ADAPTERS).is_file():
        raise UserError(
            f"{folder} holds adapters alone ({ADAPTERS}), expected a whole model. Of a run, avd export RUN --output "
            "STUDENT puts them into their base: pass STUDENT."
        )
    if not (folder / _CONFIG).is_file():
        raise UserError(f"{folder} holds neither {_CONFIG} nor transformer/{_CONFIG}. {UNDERSTOOD}")
    config = _read_json(folder / _CONFIG)
    if config.get("_class_name") != "WanTransformer3DModel" and not {"model_type", "num_heads"} <= config.keys():
        raise UserError(
            f"{folder / _CONFIG} describes {config.get('_class_name', 'something else')!r}, expected diffusers' "
            f"WanTransformer3DModel or Wan2.1's original layout (model_type, num_heads). {UNDERSTOOD}"
        )
    return folder, config


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a diffusers folder."""
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
            f"{folder / _INDEX} lists {len(shards)} files, of which {some_of(missing) or 'none'} "
            f"{'is' if len(missing) == 1 else 'are'} missing. Download or copy the folder again."
        )
    return [folder / shard for shard in shards]


def open_safetensors(path: Path, stack: ExitStack) -> dict[str, StoredTensor]:
    """The tensors of a file by name, which are read when they are asked for."""
    try:
        file = stack.enter_context(safe_open(path, framework="pt", device="cpu"))
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"{path} cannot be read ({reason_of(error)}). It is no safetensors file or only a part of one; download or "
            "copy it again."
        ) from error
    return {name: _InSafetensors(file, name) for name in file.keys()}  # noqa: SIM118 (not iterable by itself)


def open_pickle(path: Path, part: str) -> dict[str, StoredTensor]:
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
            f"{path} cannot be read ({reason_of(error)}). It is damaged, only a part of a file, or saved by a PyTorch "
            "older than 1.6; download or copy it again."
        ) from error
    found = list(content) if isinstance(content, dict) else []
    key = part or next((key for key in _PARTS if key in found), None)
    if key is not None and key not in found:
        raise UserError(f"{path} has no part {key!r}; it has {some_of(map(str, found)) or 'none'}.")
    tensors = content[key] if key is not None else content
    if not isinstance(tensors, dict) or not all(isinstance(value, Tensor) for value in tensors.values()):
        raise UserError(
            f"{path}: expected a dictionary of tensors, by itself or under one of {', '.join(_PARTS)}; got "
            f"{some_of(map(str, found)) or type(content).__name__}. Choose a part by FILE#KEY."
        )
    return tensors


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read: {error}. Download or copy it again.") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} holds a {type(content).__name__}, expected an object. Download or copy it again.")
    return content


def reason_of(error: Exception) -> str:
    """The first line of an error; what libraries write after it is advice for programmers."""
    first = str(error).strip().partition("\n")[0].rstrip(".")
    return f"{type(error).__name__}: {first}"
