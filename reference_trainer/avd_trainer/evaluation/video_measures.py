"""What single videos are like, by their pixels alone: no weights, no captions, no codec."""

from __future__ import annotations

from importlib.util import find_spec
from itertools import pairwise

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from avd_core import spectral_rolloff, temporal_rolloff
from avd_trainer.data.preparation.stages.flow import FlowSettings, flow_field
from avd_trainer.evaluation.clip_measures import UNSEEN, hsv_saturation, lag_correlation
from avd_trainer.evaluation.measures import Measure
from avd_trainer.runtime.errors import UserError

LEAST_FRAMES, LEAST_SIDE = 5, 16
"""Of a video that can be measured."""
GRID = 8
"""Cells of a frame in each direction, whose brightness :func:`flicker` follows."""
LUMA = (0.299, 0.587, 0.114)
"""Shares of red, green and blue in the brightness, as in BT.601."""

VIDEO_MEASURES: dict[str, Measure] = {
    each.name: each
    for each in (
        Measure("flow", "optical flow: motion per frame, pixels at 480p", "as real"),
        Measure("saturation", "HSV saturation of pixels, 0 to 1", "as real"),
        Measure("saturation_drift", "HSV saturation, last quarter less first quarter of the frames", "as real"),
        Measure("flicker", "flicker of brightness, grey levels of 255", "as real"),
        Measure("spatial_rolloff", "spatial roll-off of edges, cycles per pixel", "as real"),
        Measure("temporal_rolloff", "temporal roll-off, cycles per frame", "as real"),
        Measure("pixel_correlation", "correlation of neighbouring frames", "as real", headline=False),
        Measure("flow_jerk", "jerk of the mean flow, pixels at 480p per frame cubed", "as real", headline=False),
    )
}
"""In the order of tables. Real clips are the goal of each."""


def video_measures(video: Tensor) -> dict[str, float]:
    """Measure one video.

    Args:
        video: ``[3, F, H, W]`` RGB in [0, 1], at least 5 frames of 16 x 16.

    Returns:
        A finite number for each of :data:`VIDEO_MEASURES`, in its order.

    Raises:
        ValueError: If it has another shape, or is too small.
        UserError: If OpenCV, which finds the optical flow, is not installed.
    """
    if video.ndim != 4 or len(video) != 3 or video.shape[1] < LEAST_FRAMES or min(video.shape[2:]) < LEAST_SIDE:
        raise ValueError(
            f"a video of at least {LEAST_FRAMES} frames of {LEAST_SIDE} x {LEAST_SIDE} is expected, [3, F, H, W], got "
            f"{list(video.shape)}. Measure larger or longer ones."
        )
    saturation = hsv_saturation(video.unsqueeze(0))[0].mean(dim=(1, 2))
    quarter = max(1, len(saturation) // 4)
    luma_FHW = torch.einsum("cfhw,c->fhw", video, video.new_tensor(LUMA))
    motion, jerk = flow_measures(luma_FHW)
    return {
        "flow": motion,
        "saturation": float(saturation.mean()),
        "saturation_drift": float(saturation[-quarter:].mean() - saturation[:quarter].mean()),
        "flicker": flicker(luma_FHW),
        "spatial_rolloff": edge_rolloff(luma_FHW),
        "temporal_rolloff": float(temporal_rolloff(_seen(luma_FHW - luma_FHW.mean(dim=0)))),
        "pixel_correlation": float(lag_correlation(video.unsqueeze(0), UNSEEN)),
        "flow_jerk": jerk,
    }


def flicker(luma_FHW: Tensor) -> float:
    """``255 mean_{t,k} |L_{t-1,k} - 2 L_{t,k} + L_{t+1,k}| / 4``, L_k the mean brightness of cell k of an 8 x 8 grid.

    In grey levels: what alternates by ``+a`` and ``-a`` of them has a; what fades steadily, or stays, has 0. Averages
    over cells leave out what moves by less than a cell.
    """
    cells = F.adaptive_avg_pool2d(luma_FHW.unsqueeze(0), GRID)[0]
    return 255 * float((cells[:-2] - 2 * cells[1:-1] + cells[2:]).abs().mean() / 4)


def edge_rolloff(luma_FHW: Tensor) -> float:
    """:func:`avd_core.spectral_rolloff` of the differences between neighbouring pixels, in both directions, of all
    frames together: cycles per pixel.

    Natural frames have energy that falls with the square of the frequency, so nearly all of it lies in the lowest ones,
    and blur does not show. That of differences is even.
    """
    right, down = luma_FHW.diff(dim=2)[:, :-1], luma_FHW.diff(dim=1)[:, :, :-1]
    return float(spectral_rolloff(_seen(torch.cat([right, down])), pool_dim=0))


def flow_measures(luma_FHW: Tensor) -> tuple[float, float]:
    """Motion, and how unsteady it is.

    Both are of the optical flow ``v`` between neighbouring frames, measured as data preparation's filter does at its
    defaults (Farneback, a short side of 120 pixels), in pixels of frames whose short side has 480.

    Returns:
        The mean of ``|v|`` over pixels and frames, pixels per frame; and the root mean square over frames of
        ``|V_{t+1} - 2 V_t + V_{t-1}|`` with the mean ``V_t`` of ``v`` over pixels, pixels per frame cubed. Whatever
        goes on at a constant speed inside the frame has no jerk, however fast.
    """
    expect_opencv()
    settings = FlowSettings()
    height, width = luma_FHW.shape[1:]
    size = [round(settings.short_side * side / min(height, width)) for side in (height, width)]
    small = F.interpolate(luma_FHW.unsqueeze(1), size, mode="bilinear", antialias=True)[:, 0]
    frames = (255 * small).round().clamp(0, 255).to(torch.uint8).numpy()
    scale = settings.unit_side / settings.short_side
    fields = [flow_field(one, other, settings.algorithm) for one, other in pairwise(frames)]
    length = np.mean([np.linalg.norm(field, axis=-1).mean() for field in fields])
    mean_flow = np.array([rearrange(field, "h w c -> (h w) c").mean(axis=0) for field in fields])
    jerk = np.sqrt((np.diff(mean_flow, n=2, axis=0) ** 2).sum(axis=1).mean())
    return scale * float(length), scale * float(jerk)


def expect_opencv() -> None:
    """See that flow can be measured.

    Raises:
        UserError: If OpenCV is not installed.
    """
    if find_spec("cv2") is None:
        raise UserError('Videos are measured by OpenCV\'s optical flow: pip install "avd-core[prepare]".')


def _seen(values: Tensor) -> Tensor:
    """0 where they differ by less than half of what 8 bits tell apart: rounding errors have no spectrum."""
    return values if float(values.max() - values.min()) > 0.5 / 255 else torch.zeros_like(values)
