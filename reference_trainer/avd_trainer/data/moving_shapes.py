"""Captioned clips of two moving shapes: the data that needs no download.

Every clip depends on ``(seed, index)`` only. So a data set needs no files, a test can ask for the same clip twice, and
kind, colour and position of each shape in each frame are known.

A full caption says nearly everything about its clip: what is left open is half a pixel here and a tenth of the speed
there. So clips of one caption are a narrow reference for what a model makes of it, and a small model can learn to draw
them. But one step of such a model is nearly right then, trained or not. A caption that names the two subjects alone
leaves layout, background, directions and speeds open, as captions of real clips do: their mean is a gray blur, and a
sampler has to decide.
"""

from __future__ import annotations

import hashlib
import math
import re
from dataclasses import dataclass, replace
from typing import get_args

import torch
from torch import Tensor

from avd_trainer.config.sections import MOST_SATURATION, ShapeCaptions

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
SPEEDS: dict[str, float] = {"slowly": 0.2, "quickly": 0.5}
"""How far a shape gets in a clip, in heights of the frame."""
LAYOUTS: dict[str, tuple[str, ...]] = {"above": ("right", "left"), "beside": ("down", "up")}
"""How two shapes share the frame, each on a half of its own, and the directions that leave them there. The first shape
is above the other, or to its left."""

RADIUS = 0.19
# One caption of so many is never trained on.
HELD_OUT_SHARE = 8

_SUBJECT = (
    rf"an? ({'|'.join(SHAPE_COLORS)}) ({'|'.join(SHAPE_KINDS)}) moving ({'|'.join(SPEEDS)}) ({'|'.join(DIRECTIONS)})"
)
_FULL = re.compile(rf"{_SUBJECT} ({'|'.join(LAYOUTS)}) {_SUBJECT} on an? ({'|'.join(BACKGROUND_COLORS)}) background")
_NAMED = rf"an? ({'|'.join(SHAPE_COLORS)}) ({'|'.join(SHAPE_KINDS)})"
_SUBJECTS = re.compile(rf"{_NAMED} and {_NAMED}")


@dataclass(frozen=True)
class Shape:
    """What a full caption says of one shape: keys of ``SHAPE_COLORS``, ``SPEEDS`` and ``DIRECTIONS``, one of
    ``SHAPE_KINDS``."""

    color: str
    kind: str
    speed: str
    direction: str

    def __str__(self) -> str:
        return f"{self.subject} moving {self.speed} {self.direction}"

    @property
    def subject(self) -> str:
        """``"a red circle"``."""
        return f"{_article(self.color)} {self.color} {self.kind}"


@dataclass(frozen=True)
class Scene:
    """What a full caption says: two shapes of different colours, a key of ``LAYOUTS``, one of ``BACKGROUND_COLORS``."""

    shapes: tuple[Shape, Shape]
    layout: str
    background: str

    @property
    def caption(self) -> str:
        """``"a red circle moving quickly left above a blue square moving slowly right on a sand background"``."""
        first, second = self.shapes
        return f"{first} {self.layout} {second} on {_article(self.background)} {self.background} background"

    @property
    def subjects(self) -> str:
        """The caption that names the two shapes alone, in their order: ``"a red circle and a blue square"``."""
        first, second = self.shapes
        return f"{first.subject} and {second.subject}"

    def said(self, captions: ShapeCaptions) -> str:
        """The caption of one of the two sorts."""
        return self.caption if captions == "full" else self.subjects

    def showing(self, other: Scene) -> Scene:
        """This scene with the two subjects of another one: their colours and kinds."""
        first, second = (
            replace(own, color=theirs.color, kind=theirs.kind)
            for own, theirs in zip(self.shapes, other.shapes, strict=True)
        )
        return replace(self, shapes=(first, second))

    @classmethod
    def from_caption(cls, caption: str) -> Scene:
        """Read a full caption.

        Raises:
            ValueError: If it is none of these clips'.
        """
        found = _FULL.fullmatch(caption)
        if found is None:
            raise ValueError(f"a caption of MovingShapes is expected, as {_EXAMPLE.caption!r}, got {caption!r}.")
        words = found.groups()
        return cls((Shape(*words[:4]), Shape(*words[5:9])), words[4], words[9])

    @classmethod
    def from_subjects(cls, caption: str) -> Scene | None:
        """Read a caption that names the two shapes alone; None where it is another one.

        Returns:
            A scene with the two. All else of it stands for nothing.
        """
        found = _SUBJECTS.fullmatch(caption)
        if found is None:
            return None
        words = found.groups()
        first, second = (Shape(color, kind, "slowly", "right") for color, kind in (words[:2], words[2:]))
        return cls((first, second), "above", "sand")


def is_held_out(caption: str) -> bool:
    """Whether a caption is one of those that are never trained on; a property of its words alone."""
    return hashlib.blake2b(caption.encode()).digest()[0] % HELD_OUT_SHARE == 0


_EXAMPLE = Scene(
    (Shape("red", "circle", "quickly", "left"), Shape("blue", "square", "slowly", "right")), "above", "sand"
)


@dataclass(frozen=True)
class Track:
    """Where a shape is.

    Attributes:
        shape: What it is.
        radius: Half its width, in pixels.
        positions: ``[F, 2]`` float32, the centre ``(x, y)`` per frame, in pixels from the top left corner.
    """

    shape: Shape
    radius: float
    positions: Tensor


@dataclass(frozen=True)
class ShapeClip:
    """One clip with its ground truth.

    Attributes:
        video: ``[3, F, H, W]`` float32 in [0, 1], RGB.
        scene: What it shows.
        tracks: Where its shapes are, in the order of the scene.
        saturation: Of its colours, relative to the palette's.
        captions: How much of the scene its caption says.
    """

    video: Tensor
    scene: Scene
    tracks: tuple[Track, Track]
    saturation: float = 1.0
    captions: ShapeCaptions = "full"

    @property
    def caption(self) -> str:
        """What is said of the scene."""
        return self.scene.said(self.captions)

    def alone(self, place: int) -> Tensor:
        """The video with one of its two shapes only."""
        return draw(self.scene.background, [self.tracks[place]], self.video.shape[-1], self.saturation)


class MovingShapes:
    """A deterministic sequence of :class:`ShapeClip`.

    Args:
        length: Number of clips.
        seed: Different seeds give unrelated clips; clip ``i`` of one seed is always the same.
        held_out: Whether captions are those that are never trained on, or all others. The two have none in common,
            whatever the seeds.
        frames: Frames per clip.
        size: Height and width in pixels.
        saturation: How far colours are from the gray of their brightness, relative to the palette; another style.
        captions: ``"full"`` says all of a scene; ``"subjects"`` names its two shapes, and leaves layout, background,
            directions and speeds open. Held-out clips then have captions in pairs: clips ``2 i`` and ``2 i + 1`` the
            same.
    """

    def __init__(
        self,
        length: int,
        seed: int,
        *,
        held_out: bool = False,
        frames: int = 17,
        size: int = 32,
        saturation: float = 1.0,
        captions: ShapeCaptions = "full",
    ) -> None:
        if length < 1 or frames < 1 or size < 16 or not 0 < saturation <= MOST_SATURATION:
            raise ValueError(
                f"MovingShapes needs length >= 1, frames >= 1, size >= 16 and a saturation in (0, {MOST_SATURATION}], "
                f"got {length}, {frames}, {size} and {saturation}."
            )
        if captions not in get_args(ShapeCaptions):
            raise ValueError(f"captions must be one of {', '.join(get_args(ShapeCaptions))}, got {captions!r}.")
        self.length, self.seed, self.held_out, self.frames, self.size = length, seed, held_out, frames, size
        self.saturation, self.captions = saturation, captions

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> ShapeClip:
        return self.render(index, 0)

    def render(self, index: int, rendering: int) -> ShapeClip:
        """Clip ``index`` again: the same caption, with what the caption leaves open drawn anew.

        Args:
            index: Which clip.
            rendering: Which of its renderings; 0 is ``self[index]``.
        """
        if not 0 <= index < self.length:
            raise IndexError(f"clip {index} of a data set of {self.length} clips")
        # Two clips of a caption at least, so that even a few say whether what it leaves open varies.
        place = index // 2 if self.held_out and self.captions == "subjects" else index
        scene = self._scene(_generator(self.seed, place, 0))
        generator = _generator(self.seed, index, 1 + rendering)
        if self.captions == "subjects":
            scene = _draw_scene(generator).showing(scene)
        tracks = [_draw_track(generator, scene, place, self.frames, self.size) for place in range(2)]
        video = draw(scene.background, tracks, self.size, self.saturation)
        return ShapeClip(video, scene, (tracks[0], tracks[1]), self.saturation, self.captions)

    def _scene(self, generator: torch.Generator) -> Scene:
        while True:
            scene = _draw_scene(generator)
            if is_held_out(scene.said(self.captions)) == self.held_out:
                return scene


def draw(background: str, tracks: list[Track], size: int, saturation: float = 1.0) -> Tensor:
    """The video of some tracks, back to front: ``[3, F, size, size]`` in [0, 1]."""
    frames = len(tracks[0].positions)
    video = torch.tensor(BACKGROUND_COLORS[background]).view(3, 1, 1, 1).expand(3, frames, size, size).clone()
    for track in tracks:
        color = torch.tensor(SHAPE_COLORS[track.shape.color]).view(3, 1, 1, 1)
        video = video + coverage(track.shape.kind, track.radius, track.positions, size) * (color - video)
    if saturation == 1:
        return video
    gray = video.mean(dim=0, keepdim=True)
    return gray + saturation * (video - gray)


def coverage(kind: str, radius: float | Tensor, positions: Tensor, size: int) -> Tensor:
    """The share of each pixel that a shape covers, from its signed distance.

    Args:
        kind: One of ``SHAPE_KINDS``.
        radius: Half its width in pixels; a number, or one per position as ``[..., 1, 1]``.
        positions: ``[..., 2]`` centres ``(x, y)`` in pixels.
        size: Height and width of the frame.

    Returns:
        ``[..., size, size]`` in [0, 1].
    """
    grid = torch.arange(size) + 0.5
    x = grid.view(1, size) - positions[..., 0, None, None]
    y = grid.view(size, 1) - positions[..., 1, None, None]
    if kind == "circle":
        inside = radius - torch.hypot(x, y)
    elif kind == "square":
        inside = 0.88 * radius - torch.maximum(x.abs(), y.abs())
    else:  # a triangle that stands on its base: two slanted edges and the base
        slanted = (y + radius - 2 * x.abs()) / math.sqrt(5)
        inside = torch.minimum(slanted, radius * 0.8 - y)
    return (inside + 0.5).clamp(0.0, 1.0)


def _draw_scene(generator: torch.Generator) -> Scene:
    layout = _choose(tuple(LAYOUTS), generator)
    background = _choose(tuple(BACKGROUND_COLORS), generator)
    # Two shapes of one colour could not be told apart in a clip.
    colors = [tuple(SHAPE_COLORS)[i] for i in torch.randperm(len(SHAPE_COLORS), generator=generator)[:2].tolist()]
    first, second = (
        Shape(
            color,
            _choose(SHAPE_KINDS, generator),
            _choose(tuple(SPEEDS), generator),
            _choose(LAYOUTS[layout], generator),
        )
        for color in colors
    )
    return Scene((first, second), layout, background)


def _draw_track(generator: torch.Generator, scene: Scene, place: int, frames: int, size: int) -> Track:
    shape = scene.shapes[place]
    travel = size * SPEEDS[shape.speed] * (1 + 0.1 * _spread(generator))
    along = size * (0.5 + 0.03 * _spread(generator))
    across = size * (0.25 + 0.5 * place + 0.015 * _spread(generator))
    middle = torch.tensor([along, across] if scene.layout == "above" else [across, along])
    # A single frame shows the middle of the path.
    progress = torch.linspace(-0.5, 0.5, frames) if frames > 1 else torch.zeros(1)
    positions = middle + torch.tensor(DIRECTIONS[shape.direction]) * travel * progress.unsqueeze(1)
    return Track(shape, size * RADIUS * (1 + 0.04 * _spread(generator)), positions)


def _generator(*key: int) -> torch.Generator:
    digest = hashlib.blake2b(repr(key).encode(), digest_size=7).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "big"))


def _article(word: str) -> str:
    return "an" if word[0] in "aeiou" else "a"


def _choose(options: tuple[str, ...], generator: torch.Generator) -> str:
    return options[int(torch.randint(len(options), (), generator=generator))]


def _spread(generator: torch.Generator) -> float:
    """Uniform in [-1, 1]."""
    return 2 * float(torch.rand((), generator=generator)) - 1
