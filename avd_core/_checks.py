"""Checks of what users pass in. They look at shapes, dtypes and devices, never at values, so they never wait for a GPU;
:class:`RangeCheck` does both, once."""

from __future__ import annotations

import math
from numbers import Real

import torch
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


def find_frames(name: str, tensor: Tensor, frame_dim: int | None, channels: int | None = None) -> int:
    """The dimension of frames, counted from 0, of a batch of videos that are as they should be."""
    check_floating(name, tensor)
    check_batched(name, tensor)
    if frame_dim is None:
        if tensor.ndim != 5:
            raise ValueError(
                f"{name} must be [B, C, F, H, W], got shape {list(tensor.shape)}. Say where the frames of another "
                "layout are with frame_dim; images have none."
            )
        frame_dim = 2
    if not -tensor.ndim < frame_dim < tensor.ndim or frame_dim == 0:
        raise ValueError(
            f"frame_dim must name a dimension of {name} {list(tensor.shape)} other than the batch's, got {frame_dim}."
        )
    frames = tensor.shape[frame_dim]
    if frames < 2:
        raise ValueError(
            f"{name} must have at least 2 frames, got {frames} in dimension {frame_dim} of {list(tensor.shape)}. "
            "Nothing moves in a single image; for [B, F, C, H, W] pass frame_dim=1."
        )
    frame_dim %= tensor.ndim
    if channels is not None:
        _check_channels(name, tensor, frame_dim, channels)
    return frame_dim


def _check_channels(name: str, tensor: Tensor, frame_dim: int, channels: int) -> None:
    channel_dim = 2 if frame_dim == 1 else 1
    found = tensor.shape[channel_dim] if channel_dim < tensor.ndim else None
    if found != channels:
        swapped = tensor.shape[frame_dim] == channels
        raise ValueError(
            f"channels={channels} are expected in dimension {channel_dim} of {name} {list(tensor.shape)}, which has "
            f"{'no such dimension' if found is None else found}. "
            + (
                f"Frames and channels look swapped: pass frame_dim={channel_dim}."
                if swapped
                else "Is it in another layout or latent space?"
            )
        )


def check_gradient(name: str, tensor: Tensor, training: bool) -> None:
    """What a term is to train has a gradient, in training mode and where gradients are enabled."""
    if training and torch.is_grad_enabled() and not tensor.requires_grad:
        raise ValueError(
            f"{name} has no gradient, so its term could change nothing. Pass it as it is before anything detaches it, "
            "and run the student with gradient. For a look at the metrics alone call eval() on the module: then "
            "nothing is recorded either."
        )


def check_timesteps(timesteps: Tensor, samples: Tensor) -> None:
    """``timesteps`` is ``[B]`` for ``samples`` ``[B, ...]``, on the same device, integer or floating."""
    if not isinstance(timesteps, Tensor):
        raise TypeError(f"timesteps must be a torch.Tensor of shape [B], got {type(timesteps).__name__}.")
    batch, shape = samples.shape[0], list(timesteps.shape)
    if shape != [batch]:
        raise ValueError(f"timesteps must have shape [{batch}], one per sample, got {shape}.{_remedy(shape, batch)}")
    check_same_device("timesteps", timesteps, "the samples", samples)


def _remedy(shape: list[int], batch: int) -> str:
    if shape in ([], [1]):
        return f" For one timestep shared by the batch use timesteps.expand({batch})."
    if shape == [batch] + [1] * (len(shape) - 1):
        return " Use timesteps.flatten()."
    if len(shape) > 1:
        return (
            " Times of single frames are not taken: a sample has one weight and one noise level. Where its frames "
            "share one time pass timesteps[:, 0]."
        )
    return ""


class RangeCheck:
    """Finds timesteps outside a range.

    Values are looked at in every call on a CPU, where that costs nothing, and elsewhere in the first call only, which
    waits for the device. Never in compiled code, and never on the meta device, which has none.
    """

    def __init__(self) -> None:
        self._passed = False

    def outside(self, timesteps: Tensor, low: float, high: float) -> list[float]:
        """Up to four values of ``timesteps`` outside ``[low, high]``; NaN is outside too."""
        if torch.compiler.is_compiling() or timesteps.is_meta or (self._passed and timesteps.device.type != "cpu"):
            return []
        found: list[float] = timesteps[~((timesteps >= low) & (timesteps <= high))].tolist()
        self._passed = not found
        return found[:4]
