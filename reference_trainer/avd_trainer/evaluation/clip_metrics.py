"""Numbers that say how close generated clips are to real ones."""

from __future__ import annotations

import math

from pydantic import BaseModel, ConfigDict
from torch import Tensor

from avd_core import temporal_variance
from avd_trainer.evaluation.clip_measures import energy_distance, hsv_saturation


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
