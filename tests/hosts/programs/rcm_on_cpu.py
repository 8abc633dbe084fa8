"""What rCM asks for that a machine without a GPU lacks; import this before anything of rCM."""

import importlib.abc
import importlib.machinery
import os
import sys
import types
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from megatron.core import parallel_state  # noqa: F401 - before transformer_engine seems to be there
from torch.overrides import TorchFunctionMode

from without_gpu import declare_torchvision_operators, free_port, stand_in_for_wandb


class Absent(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Third parties that need a GPU: they can be imported, and that is all."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> importlib.machinery.ModuleSpec | None:
        if name.split(".")[0] in ("flash_attn", "triton", "transformer_engine", "transformer_engine_torch"):
            return importlib.machinery.ModuleSpec(name, self, is_package=True)
        return None

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> types.ModuleType:
        module = types.ModuleType(spec.name)
        module.__getattr__ = lambda name: _missing(name)
        return module

    def exec_module(self, module: types.ModuleType) -> None:
        pass


def _missing(name: str) -> mock.MagicMock:
    if name.startswith("__"):
        raise AttributeError(name)
    return mock.MagicMock()


class CPU(TorchFunctionMode):
    """Whatever is asked of CUDA is done on the CPU."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if "device" in kwargs:
            kwargs["device"] = _cpu(kwargs["device"])
        if function is not torch.device:
            args = tuple(map(_cpu, args))
        return function(*args, **kwargs)


def _cpu(value: Any) -> Any:
    is_cuda = (isinstance(value, str) and value == "cuda") or (isinstance(value, torch.device) and value.type == "cuda")
    return torch.device("cpu") if is_cuda else value


def stand_in(scratch: Path) -> None:
    """Stand in for what is missing; ``scratch`` is a folder for what rCM writes."""
    os.environ["IMAGINAIRE_OUTPUT_ROOT"] = str(scratch)
    declare_torchvision_operators()
    stand_in_for_wandb(scratch)
    sys.meta_path.insert(0, Absent())
    torch.cuda.current_device = lambda: 0
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{free_port()}", rank=0, world_size=1)
