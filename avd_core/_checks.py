"""Checks of what users pass in. They look at shapes, dtypes and devices only, never at values, so they never wait for a
GPU."""

from __future__ import annotations

import math
from numbers import Real

from torch import Tensor


def check_number(
    name: str, value: float, *, above: float = -math.inf, at_least: float = -math.inf, below: float = math.inf
) -> None:
    """A finite option within its range."""
    if not isinstance(value, Real):
        raise TypeError(f"{name} must be a number, got {value!r}. For a tensor of one pass its .item().")
    if not (math.isfinite(value) and value > above and at_least <= value < below):
        bounds = {"above": above, "at least": at_least, "below": below}
        wanted = " and ".join(f"{word} {bound:g}" for word, bound in bounds.items() if math.isfinite(bound))
        raise ValueError(f"{name} must be a finite number{wanted and ' ' + wanted}, got {value}.")


def check_floating(name: str, tensor: Tensor) -> None:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(tensor).__name__}.")
    if not tensor.is_floating_point():
        raise TypeError(f"{name} must be a floating-point tensor, got {tensor.dtype}. Convert it with {name}.float().")


def check_same_shape(name: str, tensor: Tensor, other_name: str, other: Tensor) -> None:
    """Both floating, of one shape, on one device: nothing here broadcasts."""
    check_floating(name, tensor)
    check_floating(other_name, other)
    if tensor.shape != other.shape:
        raise ValueError(
            f"{name} and {other_name} must have the same shape, got {list(tensor.shape)} and {list(other.shape)}."
        )
    check_same_device(name, tensor, other_name, other)


def check_same_device(name: str, tensor: Tensor, other_name: str, other: Tensor) -> None:
    if tensor.device != other.device:
        raise ValueError(
            f"{name} is on {tensor.device} and {other_name} on {other.device}. Move one of them with .to(device)."
        )


def check_batched(name: str, tensor: Tensor) -> None:
    if tensor.ndim < 2:
        raise ValueError(f"{name} must have a batch dimension and at least one more, got shape {list(tensor.shape)}.")
    if tensor.numel() == 0:
        raise ValueError(f"{name} must not be empty, got shape {list(tensor.shape)}.")


def check_timesteps(timesteps: Tensor, samples: Tensor) -> None:
    """``timesteps`` is ``[B]`` for ``samples`` ``[B, ...]``, on the same device, integer or floating."""
    if not isinstance(timesteps, Tensor):
        raise TypeError(f"timesteps must be a torch.Tensor of shape [B], got {type(timesteps).__name__}.")
    if timesteps.ndim != 1 or timesteps.shape[0] != samples.shape[0]:
        raise ValueError(
            f"timesteps must have shape [{samples.shape[0]}], one per sample, got {list(timesteps.shape)}. "
            "For one timestep shared by the batch use timesteps.expand(batch_size)."
        )
    check_same_device("timesteps", timesteps, "the samples", samples)
