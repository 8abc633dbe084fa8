"""What several hosts ask for that a machine without a GPU lacks."""

import socket

import torch


def declare_torchvision_operators():
    """Its wheel for CUDA brings none beside a PyTorch without, and describes them at its import. Nothing runs them."""
    try:
        import torchvision  # noqa: F401
    except RuntimeError:
        for name in ("nms", "qnms"):
            torch.library.define(f"torchvision::{name}", "(Tensor x) -> Tensor")


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]
