"""How well clips of moving shapes show what their captions say, and whether they vary in what these leave open.

Where a caption leaves it open, "captioned" is what the clip itself shows most nearly: a shape is to move as any real
one does, and not as a certain one.

Each measure has a value for every shape, also for one that cannot be found: the worst. So no clip scores better by
hiding what it draws badly.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import combinations
from statistics import fmean

import torch
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
    Track,
    draw,
)
from avd_trainer.evaluation.clip_measures import hsv_saturation
from avd_trainer.evaluation.shape_tracking import KNOWN_SHARE, MOVED_SHARE, ShapeTracks, displacement

# No shape moves farther than this share of the frame from one frame to the next; what does is another one.
LARGEST_JUMP = 0.08
# Frames in which a shape must look of the same kind as in the clip as a whole. Real shapes do in 0.7 to 1 of them: what
# moves quickly is blurred by the codec.
STEADY_SHARE = 2 / 3
# The largest speed that is told apart, as a share of the captioned one. Captions allow 0.9 to 1.1, so a still is always
# farther off than what is too fast.
MOST_SPEED = 1.5
# The same where captions say no speed, in units of the mean one.
MOST_MEAN_SPEED = 2.0
# Pixels so many radii from the centre of a visible shape are background.
SURROUNDINGS = 1.5
# The largest third difference that is told apart, as a share of the frame; that of a shape that cannot be followed.
# Above what real shapes have, and not far above: a few shapes that vanish must not hide how all others move.
MOST_JERK = 0.125
# The coordinate, of x and y, in which a layout parts the frame.
_ACROSS = {"above": 1, "beside": 0}


def shape_measures(tracks: ShapeTracks) -> dict[str, Tensor]:
    """Measure each shape of each clip.

    Returns:
        By name, ``[N, 2]`` float32 without NaN, and ``[N]`` for ``complete``:

        - ``visible``: share of frames that show the captioned colour in one piece of half to twice the area.
        - ``complete``: 1 where both shapes are visible in at least 3 of 4 frames.
        - ``kind``: 1 where the captioned kind fits best, over the frames that show the shape. Never visible: 0.
        - ``preserved``: 1 where the shape is visible in every frame, without jumps, of one kind in 2 of 3 frames.
        - ``placed``: 1 where its centre, over the frames that show it, is on the captioned half. Visible in less than
          half of the frames: 0.
        - ``direction``: 1 where it moves in the captioned direction rather than in another, and at least half the
          captioned way. Visible in less than half of the frames: 0.
        - ``speed_error``: distance of its speed along the captioned direction to the captioned speed, pixels per frame;
          at most the captioned speed, a still's. Visible in less than half of the frames: as a still's.
        - ``moves``: 1 where it gets at least half the captioned way, in any direction. Visible in less than half of the
          frames: 0.
        - ``jerk``: root mean square over time of the third difference of its centre, in pixels per frame cubed. Each
          difference is capped at an eighth of the frame's height, the value of four frames that do not all show it.
        - ``area_change``: root mean square over frames of its area's deviation from the mean area of those that show
          the shape, relative to that mean. A frame without the shape has area 0; never visible: 1.
        - ``color_error``: distance of its median colour to the captioned one, in RGB of [0, 1]. Never visible: the
          distance of the captioned background's colour, which is what one sees in its place.
    """
    visible, scenes, size, frames = tracks.visible, tracks.scenes, tracks.size, tracks.visible.shape[2]
    share = visible.float().mean(-1)
    seen = visible.any(-1)

    frame_kinds = tracks.misfits.nan_to_num(math.inf).argmin(-1)
    kinds = tracks.misfits.nanmean(2).nan_to_num(math.inf).argmin(-1)
    wanted = torch.tensor([[SHAPE_KINDS.index(shape.kind) for shape in scene.shapes] for scene in scenes])
    steady = ((frame_kinds == kinds.unsqueeze(-1)) & visible).float().mean(-1) >= STEADY_SHARE
    jumps = tracks.centers.diff(dim=2).norm(dim=-1)

    way, along, across = _way(tracks)
    travel = size * _captioned_speeds(scenes)

    axes = torch.tensor([[_ACROSS[scene.layout]] * 2 for scene in scenes]).unsqueeze(-1)
    across_halves = tracks.centers.nanmean(2).gather(-1, axes).squeeze(-1)
    on_half = torch.stack([across_halves[:, 0] < size / 2, across_halves[:, 1] > size / 2], dim=-1)

    most_jerk = MOST_JERK * size
    third = tracks.centers.diff(n=3, dim=2).norm(dim=-1).nan_to_num(math.inf).clamp_max(most_jerk)

    areas = tracks.areas.nan_to_num(0.0)
    mean_area = areas.sum(-1, keepdim=True) / visible.sum(-1, keepdim=True).clamp_min(1)
    area_change = (areas / mean_area.clamp_min(1e-6) - 1).square().mean(-1).sqrt()

    colors = torch.tensor([[SHAPE_COLORS[shape.color] for shape in scene.shapes] for scene in scenes])
    grounds = torch.tensor([[BACKGROUND_COLORS[scene.background]] for scene in scenes])
    return {
        "visible": share,
        "complete": (share >= 0.75).all(-1).float(),
        "kind": ((kinds == wanted) & seen).float(),
        "preserved": (visible.all(-1) & (jumps <= LARGEST_JUMP * size).all(-1) & steady).float(),
        "placed": (on_half & (share >= KNOWN_SHARE)).float(),
        "direction": ((along > across) & (along >= MOVED_SHARE * travel)).float(),
        "speed_error": torch.minimum((along - travel).abs(), travel) / (frames - 1),
        "moves": (way.norm(dim=-1) >= MOVED_SHARE * travel).float(),
        "jerk": third.square().mean(-1).sqrt(),
        "area_change": area_change,
        "color_error": (torch.where(seen.unsqueeze(-1), tracks.colors, grounds) - colors).norm(dim=-1),
    }


def speed_distance(tracks: ShapeTracks, real: ShapeTracks) -> float:
    """How far the speeds of a set of shapes are from those of real ones: what a mean error does not tell apart.

    The Wasserstein distance between two sets of speeds, each shape's along its captioned direction and in units of the
    captioned one: what is too slow or too quick, but also what has one speed where captions leave several open. Quick
    and slow shapes are compared apart, then averaged over all shapes. Where captions say no speed, all are compared at
    once, in units of the mean of the two, so that what is always slow is far off.

    Args:
        tracks: What was found in clips. A shape that less than half of the frames show counts as a still; speeds count
            from 0 to 1.5, or to 2 where captions say none.
        real: What was found in as many real clips; of the same captions, in the same order, where these are full.

    Returns:
        A distance of at least 0; of stills about 1.
    """
    if tracks.open:
        mean = fmean(SPEEDS.values())
        own, wanted = ((_way(each)[1] / (each.size * mean)).clamp(0, MOST_MEAN_SPEED) for each in (tracks, real))
        return float((own.flatten().sort().values - wanted.flatten().sort().values).abs().mean())
    captioned = _captioned_speeds(tracks.scenes)
    own, wanted = ((_way(each)[1] / (each.size * captioned)).clamp(0, MOST_SPEED) for each in (tracks, real))
    # Of sets of one size, the Wasserstein distance is the mean distance of those of one rank.
    distances = [
        (own[captioned == speed].sort().values - wanted[captioned == speed].sort().values).abs()
        for speed in SPEEDS.values()
    ]
    return float(torch.cat(distances).mean())


def open_measures(video: Tensor, tracks: ShapeTracks, captions: Sequence[str]) -> dict[str, float]:
    """Measure what captions of the subjects leave open: whether it varies, and whether it is drawn as any real clip's.

    Args:
        video: ``[N, 3, F, S, S]`` in [0, 1], RGB.
        tracks: What was found in it; what cannot be found has one value.
        captions: Of the clips. Those that only one clip has say nothing of variety.

    Returns:
        One number each, for the set:

        - ``variety``: share of pairs of clips of one caption that differ, in the mean over six things:
          background, layout, and for each shape the way along it and its speed. Estimated from pairs of different
          clips, so without bias. Real clips, whose values are equally likely, have about 0.54.
        - ``repetition``: share of these pairs that differ in none of the six. Real clips have 1 / 128.
        - ``background_error``: mean over clips of the distance of what is background to the colour of the
          nearest background, in RGB of [0, 1]. Pixels within 1.5 radii of a visible shape do not count.
        - ``saturation_error``: mean over clips of the distance of the clip's HSV saturation to that of the scene
          that it shows. In place of the one against real clips, which show other scenes, of other backgrounds.
        - ``saturation_shift``: the same with its sign: above 0 is oversaturated.

    Raises:
        ValueError: If no two clips have one caption.
    """
    groups: dict[str, list[Scene]] = {}
    for caption, scene in zip(captions, tracks.scenes, strict=True):
        groups.setdefault(caption, []).append(scene)
    pairs = [pair for group in groups.values() for pair in combinations(map(_left_open, group), 2)]
    if not pairs:
        raise ValueError(f"clips of which some share a caption are expected, got {len(captions)} of as many captions.")
    shift = hsv_saturation(video).flatten(1).mean(1) - _scene_saturations(tracks.scenes, tracks.size)
    return {
        "variety": fmean(fmean(own != other for own, other in zip(*pair, strict=True)) for pair in pairs),
        "repetition": fmean(own == other for own, other in pairs),
        "background_error": float(_background_errors(video, tracks).mean()),
        "saturation_error": float(shift.abs().mean()),
        "saturation_shift": float(shift.mean()),
    }


def _scene_saturations(scenes: Sequence[Scene], size: int) -> Tensor:
    """``[N]``: the mean HSV saturation of scenes as they are drawn."""
    found = []
    for scene in scenes:
        places = [torch.full((1, 2), size * (0.25 + 0.5 * place)) for place in range(2)]
        tracks = [Track(shape, RADIUS * size, place) for shape, place in zip(scene.shapes, places, strict=True)]
        found.append(hsv_saturation(draw(scene.background, tracks, size).unsqueeze(0)).mean())
    return torch.stack(found)


def _background_errors(video: Tensor, tracks: ShapeTracks) -> Tensor:
    """``[N]``: mean distance of what is no shape to the background of the scene."""
    grounds = torch.tensor([BACKGROUND_COLORS[scene.background] for scene in tracks.scenes])
    distances = (video - grounds.view(-1, 3, 1, 1, 1)).norm(dim=1)
    grid = torch.arange(tracks.size) + 0.5
    x, y = (tracks.centers[..., axis, None, None] for axis in range(2))
    # Where a frame does not show it, the comparison with NaN is false: all of the frame is background then.
    near = torch.hypot(grid.view(1, -1) - x, grid.view(-1, 1) - y) < SURROUNDINGS * RADIUS * tracks.size
    outside = (~near.any(dim=1)).float()
    errors: Tensor = (distances * outside).sum((1, 2, 3)) / outside.sum((1, 2, 3)).clamp_min(1)
    return errors


def _left_open(scene: Scene) -> tuple[str | bool, ...]:
    """What a caption of the subjects does not say; of directions which of the two that the layout has."""
    own = [(shape.speed, shape.direction == LAYOUTS[scene.layout][0]) for shape in scene.shapes]
    return scene.background, scene.layout, *own[0], *own[1]


def _captioned_speeds(scenes: Sequence[Scene]) -> Tensor:
    """``[N, 2]``: how far each shape is to get in the clip, in heights of the frame."""
    return torch.tensor([[SPEEDS[shape.speed] for shape in scene.shapes] for scene in scenes])


def _way(tracks: ShapeTracks) -> tuple[Tensor, Tensor, Tensor]:
    """``[N, 2, 2]`` how far a shape gets in the clip, in pixels, and ``[N, 2]`` of that along its captioned direction
    and across it; 0 where it is visible in too few frames."""
    known = (tracks.visible.float().mean(-1) >= KNOWN_SHARE).unsqueeze(-1)
    way = torch.where(known, displacement(tracks.centers), 0.0)
    captioned = torch.tensor([[DIRECTIONS[shape.direction] for shape in scene.shapes] for scene in tracks.scenes])
    along = (way * captioned).sum(-1)
    return way, along, (way - along.unsqueeze(-1) * captioned).norm(dim=-1)
