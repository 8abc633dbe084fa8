"""What several hosts ask for that a machine without a GPU, or without an account, lacks."""

import socket
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path
from unittest import mock

from torch import library


def stand_in_for_wandb(folder: Path) -> None:
    """It would ask for its servers; nothing here is about its logs."""
    # With a specification, since diffusers asks whether there is one.
    sys.modules["wandb"] = wandb = mock.MagicMock(__spec__=ModuleSpec("wandb", None))
    sys.modules["wandb.util"] = wandb.util
    wandb.init.return_value.dir = wandb.run.dir = str(folder)


def declare_torchvision_operators() -> None:
    """Its wheel for CUDA brings none beside a PyTorch without, and describes them at its import. Nothing runs them."""
    try:
        import torchvision  # noqa: F401
    except RuntimeError:
        for name in ("nms", "qnms"):
            library.define(f"torchvision::{name}", "(Tensor x) -> Tensor")


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]
