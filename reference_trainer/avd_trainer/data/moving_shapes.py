"""Captioned clips of two moving shapes: the data that needs no download.

Every clip depends on ``(seed, index)`` only. So a data set needs no files, a test can ask for the same clip twice, and
shape, colour and position in each frame are known.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

# Muted on purpose: a student that oversaturates needs room above the data to do it in.
SHAPE_COLORS: dict[str, tuple[float, float, float]] = {
    "red": (0.76, 0.38, 0.36),
    "orange": (0.80, 0.58, 0.36),
    "yellow": (0.80, 0.76, 0.42),
    "green": (0.42, 0.66, 0.42),
    "blue": (0.38, 0.48, 0.76),
    "purple": (0.60, 0.42, 0.70),
}
BACKGROUND_COLORS: dict[str, tuple[float, float, float]] = {
    "sand": (0.62, 0.57, 0.48),
    "slate": (0.44, 0.49, 0.56),
    "sage": (0.48, 0.55, 0.46),
    "mauve": (0.55, 0.47, 0.53),
}
SHAPE_KINDS = ("circle", "square", "triangle")
DIRECTIONS: dict[str, tuple[float, float]] = {
    "right": (1.0, 0.0),
    "left": (-1.0, 0.0),
    "down": (0.0, 1.0),
    "up": (0.0, -1.0),
}


@dataclass(frozen=True)
class ShapeTrack:
    """What one shape of a clip looks like and where it is.

    Attributes:
        kind: One of ``SHAPE_KINDS``.
        color: A key of ``SHAPE_COLORS``.
        direction: The direction it sets out in, a key of ``DIRECTIONS``.
        radius: Half its width, in pixels.
        positions: ``[F, 2]`` float32, the centre ``(x, y)`` per frame, in pixels from the top left corner.
    """

    kind: str
    color: str
    direction: str
    radius: float
    positions: Tensor


@dataclass(frozen=True)
class ShapeClip:
    """One clip with its ground truth.

    Attributes:
        video: ``[3, F, H, W]`` float32 in [0, 1], RGB.
        caption: For example ``"a red circle moving left and a blue square moving up on a sand background"``.
        background: A key of ``BACKGROUND_COLORS``.
        tracks: The two shapes, back to front.
    """

    video: Tensor
    caption: str
    background: str
    tracks: tuple[ShapeTrack, ...]


class MovingShapes:
    """A deterministic sequence of :class:`ShapeClip`.

    Args:
        length: Number of clips.
        seed: Different seeds give unrelated clips; clip ``i`` of one seed is always the same.
        frames: Frames per clip.
        size: Height and width in pixels.
    """

    def __init__(self, length: int, seed: int, *, frames: int = 33, size: int = 64) -> None:
        if length < 1 or frames < 1 or size < 16:
            raise ValueError(
                f"MovingShapes needs length >= 1, frames >= 1 and size >= 16, got {length}, {frames} and {size}."
            )
        self.length, self.seed, self.frames, self.size = length, seed, frames, size

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> ShapeClip:
        if not 0 <= index < self.length:
            raise IndexError(f"clip {index} of a data set of {self.length} clips")
        # Two streams for one clip would correlate if seeds were added; a large odd multiplier keeps them apart.
        generator = torch.Generator().manual_seed((self.seed * 1_000_003 + index) * 2_654_435_761 % 2**63)
        return _draw_clip(generator, self.frames, self.size)


def _draw_clip(generator: torch.Generator, frames: int, size: int) -> ShapeClip:
    background = _choose(list(BACKGROUND_COLORS), generator)
    tracks = tuple(_draw_track(generator, frames, size) for _ in range(2))
    video = torch.tensor(BACKGROUND_COLORS[background]).view(3, 1, 1, 1).expand(3, frames, size, size).clone()
    for track in tracks:
        coverage = _coverage(track, size)
        color = torch.tensor(SHAPE_COLORS[track.color]).view(3, 1, 1, 1)
        video = video + coverage * (color - video)
    subjects = [f"{'an' if t.color[0] in 'aeiou' else 'a'} {t.color} {t.kind} moving {t.direction}" for t in tracks]
    caption = f"{' and '.join(subjects)} on a {background} background"
    return ShapeClip(video=video, caption=caption, background=background, tracks=tracks)


def _draw_track(generator: torch.Generator, frames: int, size: int) -> ShapeTrack:
    kind = _choose(list(SHAPE_KINDS), generator)
    color = _choose(list(SHAPE_COLORS), generator)
    direction = _choose(list(DIRECTIONS), generator)
    radius = size * (0.15 + 0.05 * _uniform(generator))
    speed = size * (0.012 + 0.012 * _uniform(generator))
    start = torch.tensor([_uniform(generator), _uniform(generator)])
    low, high = radius, size - radius
    free = torch.tensor(DIRECTIONS[direction]) * speed * torch.arange(frames).unsqueeze(1)
    positions = low + _reflect(start * (high - low) + free, high - low)
    return ShapeTrack(kind=kind, color=color, direction=direction, radius=radius, positions=positions)


def _reflect(position: Tensor, span: float) -> Tensor:
    """Fold a straight path into ``[0, span]``, as a ball between two walls."""
    folded = position.remainder(2 * span)
    return torch.where(folded > span, 2 * span - folded, folded)


def _coverage(track: ShapeTrack, size: int) -> Tensor:
    """``[F, H, W]`` in [0, 1]: the share of each pixel that the shape covers, from its signed distance."""
    grid = torch.arange(size) + 0.5
    x = grid.view(1, 1, size) - track.positions[:, 0].view(-1, 1, 1)
    y = grid.view(1, size, 1) - track.positions[:, 1].view(-1, 1, 1)
    if track.kind == "circle":
        inside = track.radius - torch.hypot(x, y)
    elif track.kind == "square":
        inside = 0.88 * track.radius - torch.maximum(x.abs(), y.abs())
    else:  # a triangle that stands on its base: two slanted edges and the base
        slanted = (y + track.radius - 2 * x.abs()) / math.sqrt(5)
        inside = torch.minimum(slanted, track.radius * 0.8 - y)
    return (inside + 0.5).clamp(0.0, 1.0)


def _choose(options: list[str], generator: torch.Generator) -> str:
    return options[int(torch.randint(len(options), (), generator=generator))]


def _uniform(generator: torch.Generator) -> float:
    return float(torch.rand((), generator=generator))
