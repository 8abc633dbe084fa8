"""Numbers that say how close generated clips are to real ones."""

from __future__ import annotations

import math

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor

from avd_core import temporal_variance


class ClipMetrics(BaseModel):
    """Metrics of a set of clips; see :func:`evaluate`."""

    model_config = ConfigDict(frozen=True, use_attribute_docstrings=True)

    saturation: float
    """Mean HSV saturation of decoded pixels, in [0, 1]."""
    temporal_loss: float
    """``-log E[Var_t]`` of the latents, in nats. Lower is more motion."""
    pixel_motion: float
    """Mean absolute change of decoded pixels between neighbouring frames, in [0, 1]."""
    distance: float
    """Energy distance of the latents to held-out real clips. 0 for the same distribution, up to sampling."""


def evaluate(latents: Tensor, video: Tensor, held_out: Tensor) -> ClipMetrics:
    """Measure clips.

    Args:
        latents: ``[N, C, F, h, w]``.
        video: ``[N, 3, F', H, W]`` the same clips decoded, RGB; values outside [0, 1] are clamped, as a screen does.
        held_out: ``[M, C, F, h, w]`` latents of real clips that are not among ``latents``.
    """
    video = video.clamp(0, 1)
    return ClipMetrics(
        saturation=float(hsv_saturation(video).mean()),
        temporal_loss=-math.log(max(float(temporal_variance(latents)), 1e-30)),
        pixel_motion=float(video.diff(dim=2).abs().mean()),
        distance=energy_distance(latents, held_out),
    )


def hsv_saturation(video: Tensor) -> Tensor:
    """``(max - min) / max`` over the RGB channels (dimension 1), 0 for black; values in [0, 1]."""
    high, low = video.amax(dim=1), video.amin(dim=1)
    return torch.where(high > 0, (high - low) / high.clamp_min(1e-12), 0.0)


def energy_distance(x: Tensor, y: Tensor) -> float:
    """``2 E|x - y| - E|x - x'| - E|y - y'|`` (Szekely and Rizzo 2013), unbiased, divided by the root of the dimension.

    Zero exactly when both sets are drawn from one distribution, in expectation; a single estimate can be negative.

    Args:
        x: ``[N, ...]``.
        y: ``[M, ...]``, the same shape beyond the first dimension.
    """
    x, y = x.flatten(1).double(), y.flatten(1).double()
    between = torch.cdist(x, y).mean()
    distance = 2 * between - _mean_within(x) - _mean_within(y)
    return float(distance / math.sqrt(x.shape[1]))


def _mean_within(x: Tensor) -> Tensor:
    """Mean distance of two different members; 0 for a single one."""
    pairs = len(x) * (len(x) - 1)
    return torch.cdist(x, x).sum() / max(1, pairs)
