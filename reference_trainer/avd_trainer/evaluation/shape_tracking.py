"""Finds the captioned shapes in decoded clips: where they are, how large, of which colour and kind."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from scipy import ndimage
from torch import Tensor

from avd_trainer.data.moving_shapes import BACKGROUND_COLORS, RADIUS, SHAPE_COLORS, SHAPE_KINDS, Scene, coverage

# A shape counts as visible where at least this share of its area is there in one piece.
VISIBLE_SHARE = 0.5
# Where the centroid of a kind lies below the centre of its box, and the area of its box's half width 1.
_CENTROID = {"circle": 0.0, "square": 0.0, "triangle": 0.2}
_AREA = {"circle": math.pi, "square": (2 * 0.88) ** 2, "triangle": 1.8 * 1.8 / 2}
_COLORS = SHAPE_COLORS | BACKGROUND_COLORS
_CHUNK = 32


@dataclass(frozen=True)
class ShapeTracks:
    """What was found of two captioned shapes in each of N clips; values of frames without the shape are NaN.

    Attributes:
        scenes: What the captions say.
        visible: ``[N, 2, F]`` bool: the captioned colour is there in one piece, with at least half of the shape's area.
        centers: ``[N, 2, F, 2]`` centroid ``(x, y)`` in pixels, to fractions of a pixel.
        areas: ``[N, 2, F]`` in pixels.
        colors: ``[N, 2, 3]`` median RGB of the shape over the clip.
        misfits: ``[N, 2, F, 3]`` squared difference to the best template of each of ``SHAPE_KINDS``, relative to the
            template's own square.
        size: Height and width of the frames, in pixels.
    """

    scenes: Sequence[Scene]
    visible: Tensor
    centers: Tensor
    areas: Tensor
    colors: Tensor
    misfits: Tensor
    size: int


def track_shapes(video: Tensor, captions: Sequence[str]) -> ShapeTracks:
    """Look for the captioned shapes.

    A pixel belongs to the nearest of the palette's colours. A shape is the largest connected piece of its colour; its
    edge is read from how far pixels lie between the background's colour and its own.

    Args:
        video: ``[N, 3, F, S, S]`` in [0, 1], RGB; what lies outside is clamped, as a screen does.
        captions: Of the N clips.

    Raises:
        ValueError: If there are not as many captions, or one is not of :class:`MovingShapes`.
    """
    if len(video) != len(captions):
        raise ValueError(f"one caption per clip is expected, got {len(captions)} for {len(video)} clips.")
    scenes = [Scene.from_caption(caption) for caption in captions]
    parts = [
        _track(video[i : i + _CHUNK].clamp(0, 1).float(), scenes[i : i + _CHUNK]) for i in range(0, len(video), _CHUNK)
    ]
    visible, centers, areas, colors, misfits = (torch.cat(own) for own in zip(*parts, strict=True))
    return ShapeTracks(scenes, visible, centers, areas, colors, misfits, size=video.shape[-1])


def _track(video: Tensor, scenes: Sequence[Scene]) -> tuple[Tensor, ...]:
    count, _, frames, size, _ = video.shape
    palette = torch.tensor(list(_COLORS.values()))
    nearest = torch.cdist(video.movedim(1, -1).reshape(-1, 3), palette).argmin(1).view(count, frames, size, size)
    names = list(_COLORS)
    wanted = torch.tensor([[names.index(shape.color) for shape in scene.shapes] for scene in scenes])
    pieces = _largest_pieces(nearest.unsqueeze(1) == wanted[:, :, None, None, None])
    nominal = torch.tensor([[_AREA[shape.kind] for shape in scene.shapes] for scene in scenes]) * (RADIUS * size) ** 2
    visible = pieces.sum((-1, -2)) >= VISIBLE_SHARE * nominal.unsqueeze(-1)
    pieces &= visible[..., None, None]

    pixels = video.unsqueeze(1)  # [N, 1, 3, F, S, S]
    colors = _median(pixels, pieces)
    grounds = _median(pixels, (nearest >= len(SHAPE_COLORS)).unsqueeze(1))
    alpha = _between(pixels, grounds, colors)
    # Only around the piece: the other shape's colour may lie on the same line.
    around = F.max_pool2d(pieces.flatten(0, 1).float(), 5, stride=1, padding=2).view_as(alpha)
    alpha = torch.where(visible[..., None, None], alpha * around, 0.0)

    areas = alpha.sum((-1, -2))
    grid = torch.arange(size) + 0.5
    x, y = ((alpha.sum(dim) * grid).sum(-1) / areas.clamp_min(1e-6) for dim in (-2, -1))
    centers = torch.stack([x, y], dim=-1)
    misfits = torch.stack([_misfit(alpha, kind, areas, centers, size) for kind in SHAPE_KINDS], dim=-1)
    absent = ~visible
    for values in (areas, centers, misfits):
        values[absent] = math.nan
    return visible, centers, areas, colors, misfits


def _largest_pieces(masks: Tensor) -> Tensor:
    """``[..., S, S]`` bool: of each mask its largest connected area, by shared edges."""
    found = np.zeros(masks.flatten(0, -3).shape, dtype=bool)
    for mask, largest in zip(masks.flatten(0, -3).numpy(), found, strict=True):
        labels, count = ndimage.label(mask)
        if count:
            largest[...] = labels == 1 + np.bincount(labels.ravel())[1:].argmax()
    return torch.from_numpy(found).view_as(masks)


def _median(pixels: Tensor, masks: Tensor) -> Tensor:
    """``[N, P, 3]`` median colour over the pixels of ``[N, P, F, S, S]`` masks; NaN without any."""
    masked = torch.where(masks.unsqueeze(2), pixels, math.nan)
    return masked.flatten(3).nanmedian(-1).values


def _between(pixels: Tensor, ground: Tensor, color: Tensor) -> Tensor:
    """``[N, P, F, S, S]`` in [0, 1]: where a pixel lies on the line from the background's colour to the shape's."""
    line = (color - ground)[..., None, None, None]
    share = ((pixels - ground[..., None, None, None]) * line).sum(2) / line.square().sum(2).clamp_min(1e-6)
    return share.nan_to_num(0.0).clamp(0, 1)


def _misfit(alpha: Tensor, kind: str, areas: Tensor, centers: Tensor, size: int) -> Tensor:
    radius = (areas / _AREA[kind]).sqrt()[..., None, None].clamp_min(1e-3)
    middle = centers - torch.tensor([0.0, _CENTROID[kind]]) * radius[..., 0]
    template = coverage(kind, radius, middle, size)
    return (alpha - template).square().sum((-1, -2)) / template.square().sum((-1, -2)).clamp_min(1e-6)
