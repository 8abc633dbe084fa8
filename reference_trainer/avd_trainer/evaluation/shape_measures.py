"""How well clips of moving shapes show what their captions say."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from avd_trainer.data.moving_shapes import DIRECTIONS, SHAPE_COLORS, SHAPE_KINDS, SPEEDS
from avd_trainer.evaluation.shape_tracking import ShapeTracks

# A shape has moved where it got at least this share of the captioned way.
MOVED_SHARE = 0.5
# No shape moves farther than this share of the frame from one frame to the next; what does is another one.
LARGEST_JUMP = 0.08
# Frames in which a shape must look of the same kind as in the clip as a whole.
STEADY_SHARE = 0.8


def shape_measures(tracks: ShapeTracks) -> dict[str, Tensor]:
    """Measure each clip.

    Returns:
        ``[N]`` or, where it is about single shapes, ``[N, 2]`` by name; NaN where there is nothing to measure:

        - ``visible`` [N, 2]: share of frames that show the captioned colour in one piece of at least half the area.
        - ``complete`` [N]: whether both shapes are visible in at least 3 of 4 frames.
        - ``kind`` [N, 2]: whether the captioned kind fits best, over the clip; a shape that is never visible fails.
        - ``preserved`` [N, 2]: visible in every frame, without jumps, of one kind in at least 4 of 5 frames.
        - ``direction`` [N, 2]: whether it moves in the captioned direction rather than in another, and at least half
          the captioned way.
        - ``speed`` [N, 2]: pixels per frame along the captioned direction.
        - ``moves`` [N, 2]: whether it gets at least half the captioned way, in any direction.
        - ``jerk`` [N, 2]: root mean square of the third difference of its centre, pixels per frame cubed.
        - ``area_change`` [N, 2]: standard deviation of the logarithm of its area over frames.
        - ``color_error`` [N, 2]: distance of its median colour to the captioned one, in RGB of [0, 1].
    """
    visible = tracks.visible
    share = visible.float().mean(-1)
    frame_kinds = tracks.misfits.nan_to_num(math.inf).argmin(-1)
    kinds = tracks.misfits.nanmean(2).nan_to_num(math.inf).argmin(-1)
    wanted = torch.tensor([[SHAPE_KINDS.index(shape.kind) for shape in scene.shapes] for scene in tracks.scenes])
    steady = ((frame_kinds == kinds.unsqueeze(-1)) & visible).float().mean(-1) >= STEADY_SHARE
    jumps = tracks.centers.diff(dim=2).norm(dim=-1).nan_to_num(math.inf).amax(-1)
    whole = visible.all(-1) & (jumps <= LARGEST_JUMP * tracks.size)

    way = _displacement(tracks.centers)
    captioned = torch.tensor([[DIRECTIONS[shape.direction] for shape in scene.shapes] for scene in tracks.scenes])
    travel = tracks.size * torch.tensor([[SPEEDS[s.speed] for s in scene.shapes] for scene in tracks.scenes])
    along = (way * captioned).sum(-1)
    across = (way - along.unsqueeze(-1) * captioned).norm(dim=-1)
    colors = torch.tensor([[SHAPE_COLORS[shape.color] for shape in scene.shapes] for scene in tracks.scenes])
    third = tracks.centers.diff(n=3, dim=2).square().sum(-1)
    return {
        "visible": share,
        "complete": (share >= 0.75).all(-1).float(),
        "kind": ((kinds == wanted) & visible.any(-1)).float(),
        "preserved": (whole & steady).float(),
        "direction": ((along > across) & (along >= MOVED_SHARE * travel)).float(),
        "speed": along / (tracks.centers.shape[2] - 1),
        "moves": (way.norm(dim=-1) >= MOVED_SHARE * travel).float(),
        "jerk": third.nanmean(-1).sqrt(),
        "area_change": _nan_std(tracks.areas.log()),
        "color_error": (tracks.colors - colors).norm(dim=-1),
    }


def _displacement(centers: Tensor) -> Tensor:
    """``[N, 2, 2]``: from the first to the last frame, by a straight line through the frames that show the shape."""
    frames = centers.shape[2]
    known = ~centers[..., 0].isnan()
    time = torch.arange(frames, dtype=torch.float32)
    weight = known.float()
    count = weight.sum(-1, keepdim=True)
    mean_time = (weight * time).sum(-1, keepdim=True) / count.clamp_min(1)
    own = weight * (time - mean_time)
    slope = (own.unsqueeze(-1) * centers.nan_to_num(0.0)).sum(2) / own.square().sum(-1, keepdim=True).clamp_min(1e-6)
    return torch.where(count >= 3, slope * (frames - 1), math.nan)


def _nan_std(values: Tensor) -> Tensor:
    mean = values.nanmean(-1, keepdim=True)
    return (values - mean).square().nanmean(-1).sqrt()
