"""Finds the captioned shapes in decoded clips: where they are, how large, of which colour and kind.

What a caption leaves open is read off the clip: of all scenes that it allows, the one that the clip shows most nearly.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F
from scipy import ndimage
from torch import Tensor

from avd_trainer.data.moving_shapes import (
    BACKGROUND_COLORS,
    DIRECTIONS,
    LAYOUTS,
    RADIUS,
    SHAPE_COLORS,
    SHAPE_KINDS,
    SPEEDS,
    Scene,
    Shape,
    coverage,
)

# A shape counts as visible where one piece has between this share of its area and that: a frame that is painted in its
# colour from edge to edge shows no shape.
SMALLEST, LARGEST = 0.5, 2.0
# Where the centroid of a kind lies below the centre of its box, and the area of its box's half width 1.
_CENTROID = {"circle": 0.0, "square": 0.0, "triangle": 0.2}
_AREA = {"circle": math.pi, "square": (2 * 0.88) ** 2, "triangle": 1.8 * 1.8 / 2}
# Neighbours of a pixel in a stack of frames: those that share an edge, in the same frame.
_WITHIN_A_FRAME = np.array([np.zeros((3, 3)), [[0, 1, 0], [1, 1, 1], [0, 1, 0]], np.zeros((3, 3))])
# Frames that have to show a shape for its way to be known, as a share.
KNOWN_SHARE = 0.5
# A shape has moved where it got at least this share of the captioned way.
MOVED_SHARE = 0.5
_CHUNK = 32


@dataclass(frozen=True)
class ShapeTracks:
    """What was found of two captioned shapes in each of N clips; values of frames without the shape are NaN.

    Attributes:
        scenes: What the captions say; where they leave it open, what the clips show most nearly.
        visible: ``[N, 2, F]`` bool: the captioned colour is there in one piece of half to twice the shape's area.
        centers: ``[N, 2, F, 2]`` centroid ``(x, y)`` in pixels, to fractions of a pixel.
        areas: ``[N, 2, F]`` in pixels.
        colors: ``[N, 2, 3]`` median RGB of the shape over the clip.
        misfits: ``[N, 2, F, 3]`` squared difference to the best template of each of ``SHAPE_KINDS``, relative to the
            template's own square.
        size: Height and width of the frames, in pixels.
        open: Whether the captions name the two shapes alone.
    """

    scenes: Sequence[Scene]
    visible: Tensor
    centers: Tensor
    areas: Tensor
    colors: Tensor
    misfits: Tensor
    size: int
    open: bool = False


def track_shapes(video: Tensor, captions: Sequence[str]) -> ShapeTracks:
    """Look for the captioned shapes.

    A pixel belongs to the nearest of all shapes' colours and the captioned background's. (Other backgrounds are left
    out: where green meets mauve, pixels look like sage.) A shape is the largest connected piece of its colour; its edge
    is read from how far pixels lie between the background's colour and its own, both taken from the clip.

    Args:
        video: ``[N, 3, F, S, S]`` in [0, 1], RGB; what lies outside is clamped, as a screen does.
        captions: Of the N clips, all full or all of the subjects alone.

    Raises:
        ValueError: If the video has another shape, there are not as many captions, or one is not of
            :class:`MovingShapes`.
    """
    if video.ndim != 5 or video.shape[1] != 3 or video.shape[3] != video.shape[4]:
        raise ValueError(f"video of square frames is expected, [N, 3, F, S, S], got {list(video.shape)}.")
    if len(video) != len(captions):
        raise ValueError(f"one caption per clip is expected, got {len(captions)} for {len(video)} clips.")
    video = video.clamp(0, 1).float()
    scenes, is_open = _read(captions)
    if is_open:
        scenes = [replace(scene, background=_background(clip)) for scene, clip in zip(scenes, video, strict=True)]
    parts = [_track(video[i : i + _CHUNK], scenes[i : i + _CHUNK]) for i in range(0, len(video), _CHUNK)]
    visible, centers, areas, colors, misfits = (torch.cat(own) for own in zip(*parts, strict=True))
    size = video.shape[-1]
    if is_open:
        scenes = [_settled(scene, own, size) for scene, own in zip(scenes, centers, strict=True)]
    return ShapeTracks(scenes, visible, centers, areas, colors, misfits, size, is_open)


def captioned_area(kind: str, size: int) -> float:
    """The area of a shape of one of ``SHAPE_KINDS``, in pixels, in frames of that many pixels a side."""
    return _AREA[kind] * (RADIUS * size) ** 2


def displacement(centers: Tensor) -> Tensor:
    """``[..., 2]``: from the first to the last frame, by a straight line through the frames that show the shape; 0
    where fewer than two do.

    Args:
        centers: ``[..., F, 2]``, NaN where a frame does not show it.
    """
    frames = centers.shape[-2]
    known = (~centers[..., 0].isnan()).float()
    time = torch.arange(frames, dtype=torch.float32)
    mean_time = (known * time).sum(-1, keepdim=True) / known.sum(-1, keepdim=True).clamp_min(1)
    deviation = known * (time - mean_time)
    slope = (deviation.unsqueeze(-1) * centers.nan_to_num(0.0)).sum(-2)
    return slope / deviation.square().sum(-1, keepdim=True).clamp_min(1e-6) * (frames - 1)


def _read(captions: Sequence[str]) -> tuple[list[Scene], bool]:
    """What captions say, and whether they name the two shapes alone."""
    subjects = [Scene.from_subjects(caption) for caption in captions]
    named = [scene for scene in subjects if scene is not None]
    if len(named) == len(captions):
        return named, True
    if named:
        raise ValueError(
            f"captions of one sort are expected, got {len(named)} of {len(captions)} that name the two shapes alone. "
            "Measure the others apart."
        )
    return [Scene.from_caption(caption) for caption in captions], False


def _background(clip: Tensor) -> str:
    """The background of a clip ``[3, F, S, S]``: the one nearest to its median, since shapes cover a quarter of it."""
    median = clip.flatten(1).median(-1).values
    return min(BACKGROUND_COLORS, key=lambda name: float((torch.tensor(BACKGROUND_COLORS[name]) - median).norm()))


def _settled(scene: Scene, centers: Tensor, size: int) -> Scene:
    """A scene with the layout, directions and speeds that fit what two shapes do best; ``centers`` is ``[2, F, 2]``.

    A shape that less than half of the frames show, or that does not get half the way of a slow one, moves in the first
    direction of all. So clips do not vary in what they do not show.
    """
    known = (~centers[..., 0].isnan()).float().mean(-1, keepdim=True) >= KNOWN_SHARE
    way = torch.where(known, displacement(centers) / size, 0.0)
    way = torch.where(way.norm(dim=-1, keepdim=True) >= MOVED_SHARE * min(SPEEDS.values()), way, 0.0)
    apart = torch.where(known.all(), (centers[1] - centers[0]).nanmean(0).nan_to_num(0.0), 0.0)
    # Each on a half of its own: the two lie half a frame apart across the way that they go.
    layout = "above" if apart[1].abs() >= apart[0].abs() else "beside"
    shapes = []
    for shape, own in zip(scene.shapes, way, strict=True):
        direction, speed = min(
            ((direction, speed) for direction in LAYOUTS[layout] for speed in SPEEDS),
            key=lambda one: float((own - SPEEDS[one[1]] * torch.tensor(DIRECTIONS[one[0]])).norm()),
        )
        shapes.append(Shape(shape.color, shape.kind, speed, direction))
    return Scene((shapes[0], shapes[1]), layout, scene.background)


def _track(video: Tensor, scenes: Sequence[Scene]) -> tuple[Tensor, ...]:
    size = video.shape[-1]
    names = list(SHAPE_COLORS)
    palette = torch.tensor([[*SHAPE_COLORS.values(), BACKGROUND_COLORS[scene.background]] for scene in scenes])
    nearest = torch.cdist(video.movedim(1, -1).flatten(1, 3), palette).argmin(-1).view_as(video[:, 0])
    wanted = torch.tensor([[names.index(shape.color) for shape in scene.shapes] for scene in scenes])
    pieces = _largest_pieces(nearest.unsqueeze(1) == wanted[:, :, None, None, None])
    nominal = torch.tensor([[captioned_area(shape.kind, size) for shape in scene.shapes] for scene in scenes])
    share = pieces.sum((-1, -2)) / nominal.unsqueeze(-1)

    grounds = _median(video, (nearest == len(names)).unsqueeze(1))
    visible = (share >= SMALLEST) & (share <= LARGEST) & ~grounds.isnan().any(-1, keepdim=True)
    pieces &= visible[..., None, None]
    # The edge of a piece is mixed with the background. A piece may be too thin to have anything but an edge.
    inside = ~_grow(~pieces, 1)
    colors = _median(video, torch.where(inside.flatten(2).any(-1)[..., None, None, None], inside, pieces))
    # Only around the piece: the other shape's colour may lie on the same line.
    alpha = _between(video.unsqueeze(1), grounds, colors) * _grow(pieces, 2)

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
    stack = masks.flatten(0, -3).numpy()
    labels, _ = ndimage.label(stack, _WITHIN_A_FRAME)
    sizes = np.bincount(labels.ravel())
    sizes[0] = 0  # what belongs to no piece
    flat = labels.reshape(len(stack), -1)
    largest = np.take_along_axis(flat, sizes[flat].argmax(1)[:, None], 1)
    return torch.from_numpy((flat == largest) & (largest > 0)).view_as(masks)


def _grow(masks: Tensor, pixels: int) -> Tensor:
    """``[N, P, F, S, S]`` bool: what is at most so many pixels from the mask, in x and in y."""
    rows = F.max_pool2d(masks.flatten(0, 1).float(), (2 * pixels + 1, 1), stride=1, padding=(pixels, 0))
    grown = F.max_pool2d(rows, (1, 2 * pixels + 1), stride=1, padding=(0, pixels))
    return grown.view_as(masks) > 0


def _median(video: Tensor, masks: Tensor) -> Tensor:
    """``[N, P, 3]`` median colour over the pixels of ``[N, P, F, S, S]`` masks; NaN without any."""
    colors = torch.full((*masks.shape[:2], 3), math.nan)
    for clip, places, own in zip(video, masks, colors, strict=True):
        for place, mask in enumerate(places):
            if mask.any():
                own[place] = clip[:, mask].median(-1).values
    return colors


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
