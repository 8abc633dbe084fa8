"""Tracks against what was drawn."""

import math
from itertools import product

import pytest
import torch
from torch import Tensor

from avd_trainer.data.moving_shapes import (
    BACKGROUND_COLORS,
    DIRECTIONS,
    RADIUS,
    SHAPE_COLORS,
    SHAPE_KINDS,
    MovingShapes,
    Scene,
    Shape,
    ShapeClip,
    Track,
    coverage,
    draw,
)
from avd_trainer.evaluation.shape_tracking import ShapeTracks, captioned_area, track_shapes
from avd_trainer.models.codecs.block_dct import BlockDCTCodec

SIZE, FRAMES = 32, 5


def make_clip(kind: str, color: str, background: str) -> ShapeClip:
    """A shape of the kind and colour that moves right, above one of the next kind and colour that moves left."""
    colors, kinds = list(SHAPE_COLORS), list(SHAPE_KINDS)
    other = Shape(colors[(colors.index(color) + 1) % len(colors)], kinds[(kinds.index(kind) + 1) % 3], "slowly", "left")
    scene = Scene((Shape(color, kind, "quickly", "right"), other), "above", background)
    tracks = []
    for place, shape in enumerate(scene.shapes):
        start = torch.tensor([11.3 + 9.4 * place, 8.2 + 15.7 * place])
        positions = start + torch.arange(float(FRAMES)).unsqueeze(1) * torch.tensor(DIRECTIONS[shape.direction])
        tracks.append(Track(shape, RADIUS * SIZE, positions))
    return ShapeClip(draw(background, tracks, SIZE), scene, (tracks[0], tracks[1]))


def centroids(clip: ShapeClip) -> Tensor:
    """``[2, F, 2]``; the centre of mass of a triangle lies a fifth of its radius below the middle of its height."""
    below = {"circle": 0.0, "square": 0.0, "triangle": 0.2}
    return torch.stack(
        [track.positions + torch.tensor([0.0, below[track.shape.kind] * track.radius]) for track in clip.tracks]
    )


def areas(clip: ShapeClip) -> Tensor:
    """``[2, F]``: pixels that were drawn."""
    return torch.stack(
        [coverage(track.shape.kind, track.radius, track.positions, SIZE).sum((-1, -2)) for track in clip.tracks]
    )


@pytest.fixture(scope="module")
def clips() -> list[ShapeClip]:
    """Every kind in every colour on every background."""
    return [make_clip(*case) for case in product(SHAPE_KINDS, SHAPE_COLORS, BACKGROUND_COLORS)]


def kinds_of(tracks: ShapeTracks) -> list[list[list[str]]]:
    return [[[SHAPE_KINDS[i] for i in row] for row in clip] for clip in tracks.misfits.argmin(-1).tolist()]


# (how far centres, areas and colours may be off): as drawn, and through the codec, which blurs and steps in time.
@pytest.mark.parametrize(("coded", "center", "area", "color"), [(False, 0.05, 0.01, 0.001), (True, 0.7, 0.08, 0.01)])
def test_what_was_drawn_is_found(clips: list[ShapeClip], coded: bool, center: float, area: float, color: float) -> None:
    video = torch.stack([clip.video for clip in clips])
    if coded:
        codec = BlockDCTCodec()
        video = codec.decode(codec.encode(video))
    tracks = track_shapes(video, [clip.caption for clip in clips])
    assert tracks.visible.all()
    assert tracks.size == SIZE
    assert (tracks.centers - torch.stack([centroids(clip) for clip in clips])).norm(dim=-1).max() < center
    assert (tracks.areas / torch.stack([areas(clip) for clip in clips]) - 1).abs().max() < area
    drawn = torch.tensor([[SHAPE_COLORS[shape.color] for shape in clip.scene.shapes] for clip in clips])
    assert (tracks.colors - drawn).norm(dim=-1).max() < color
    assert kinds_of(tracks) == [[[shape.kind] * FRAMES for shape in clip.scene.shapes] for clip in clips]


@pytest.mark.parametrize("kind", SHAPE_KINDS)
def test_the_captioned_area_is_that_of_the_drawing(kind: str) -> None:
    drawn = float(coverage(kind, RADIUS * 64, torch.tensor([32.0, 32.0]), 64).sum())
    assert captioned_area(kind, 64) == pytest.approx(drawn, rel=0.03)


@pytest.mark.parametrize("missing", [0, 1])
def test_a_shape_that_is_not_there_is_not_visible(missing: int) -> None:
    clip = make_clip("circle", "red", "sand")
    alone = draw("sand", [clip.tracks[1 - missing]], SIZE)
    tracks = track_shapes(alone.unsqueeze(0), [clip.caption])
    assert not tracks.visible[0, missing].any()
    assert tracks.visible[0, 1 - missing].all()
    for values in (tracks.centers, tracks.areas, tracks.colors, tracks.misfits):
        assert values[0, missing].isnan().all()
        assert values[0, 1 - missing].isfinite().all()


@pytest.mark.parametrize(("factor", "visible"), [(0.5, False), (0.8, True), (1.3, True), (1.6, False)])
def test_a_shape_of_another_size_altogether_is_not_the_captioned_one(factor: float, visible: bool) -> None:
    scene = make_clip("circle", "red", "sand").scene
    track = Track(scene.shapes[0], factor * RADIUS * SIZE, torch.full((FRAMES, 2), 15.7))
    found = track_shapes(draw("sand", [track], SIZE).unsqueeze(0), [scene.caption])
    assert found.visible[0, 0].tolist() == [visible] * FRAMES


def test_a_frame_painted_in_the_captioned_colours_shows_no_shape() -> None:
    clip = make_clip("square", "blue", "slate")
    halves = [torch.tensor(SHAPE_COLORS[shape.color]).view(3, 1, 1, 1) for shape in clip.scene.shapes]
    painted = torch.cat([half.expand(3, FRAMES, SIZE // 2, SIZE) for half in halves], dim=2)
    assert not track_shapes(painted.unsqueeze(0), [clip.caption]).visible.any()


def test_the_largest_piece_is_followed_and_pieces_of_different_frames_are_apart() -> None:
    clip = make_clip("square", "green", "mauve")
    speck = Track(clip.scene.shapes[0], 2.5, torch.tensor([[27.0, 5.0]]).expand(FRAMES, 2))
    video = draw("mauve", [*clip.tracks, speck], SIZE)
    tracks = track_shapes(video.unsqueeze(0), [clip.caption])
    assert (tracks.centers[0, 0] - centroids(clip)[0]).norm(dim=-1).max() < 0.1
    assert (tracks.areas[0, 0] / areas(clip)[0] - 1).abs().max() < 0.03


def test_chunks_leave_no_mark(clips: list[ShapeClip]) -> None:
    video, captions = torch.stack([clip.video for clip in clips[:40]]), [clip.caption for clip in clips[:40]]
    whole, last = track_shapes(video, captions), track_shapes(video[-3:], captions[-3:])
    assert torch.equal(whole.centers[-3:], last.centers)
    assert math.isfinite(float(whole.centers.sum()))


# --- What captions of the subjects leave open


def test_what_a_caption_leaves_open_is_read_off_the_clip() -> None:
    """Of all 96 clips through the codec, everything."""
    codec, shapes = BlockDCTCodec(), MovingShapes(96, seed=3, captions="subjects")
    clips = [shapes[index] for index in range(len(shapes))]
    video = codec.decode(codec.encode(torch.stack([clip.video for clip in clips])))
    tracks = track_shapes(video, [clip.caption for clip in clips])
    assert tracks.open
    assert tracks.scenes == [clip.scene for clip in clips]
    # Tracks are those that the full captions lead to.
    full = track_shapes(video, [clip.scene.caption for clip in clips])
    assert not full.open
    assert torch.equal(tracks.centers, full.centers)
    assert torch.equal(tracks.misfits, full.misfits)


def test_a_shape_that_is_not_there_does_not_vary() -> None:
    """Neither in its way nor in the layout, whatever the other one does."""
    shapes = MovingShapes(12, seed=3, captions="subjects")
    clips = [shapes[index] for index in range(len(shapes))]
    tracks = track_shapes(torch.stack([clip.alone(0) for clip in clips]), [clip.caption for clip in clips])
    found = {(scene.layout, scene.shapes[1].direction, scene.shapes[1].speed) for scene in tracks.scenes}
    assert found == {("above", "right", "slowly")}


def test_a_still_does_not_vary_by_its_rounding() -> None:
    shapes, codec = MovingShapes(24, seed=3, captions="subjects"), BlockDCTCodec()
    clips = [shapes[index] for index in range(len(shapes))]
    stills = torch.stack([clip.video[:, :1].expand(-1, 17, -1, -1) for clip in clips])
    found = track_shapes(codec.decode(codec.encode(stills)), [clip.caption for clip in clips]).scenes
    ways = {(scene.layout, shape.direction, shape.speed) for scene in found for shape in scene.shapes}
    assert ways == {("above", "right", "slowly"), ("beside", "down", "slowly")}


@pytest.mark.parametrize(("share", "speed"), [(0.15, "slowly"), (0.3, "slowly"), (0.4, "quickly"), (0.7, "quickly")])
def test_the_speed_is_the_nearest_one(share: float, speed: str) -> None:
    scene = make_clip("circle", "red", "sand").scene
    tracks = []
    for place, shape in enumerate(scene.shapes):
        way = torch.linspace(-0.5, 0.5, FRAMES).unsqueeze(1) * share * SIZE * torch.tensor(DIRECTIONS[shape.direction])
        tracks.append(Track(shape, RADIUS * SIZE, torch.tensor([16.0, 8.0 + 16 * place]) + way))
    found = track_shapes(draw("sand", tracks, SIZE).unsqueeze(0), [scene.subjects]).scenes[0]
    assert [shape.speed for shape in found.shapes] == [speed] * 2
    assert [shape.direction for shape in found.shapes] == [shape.direction for shape in scene.shapes]


def test_captions_of_two_sorts_are_refused() -> None:
    clip = make_clip("circle", "red", "sand")
    with pytest.raises(
        ValueError, match="captions of one sort are expected, got 1 of 2 that name the two shapes alone"
    ):
        track_shapes(clip.video.expand(2, -1, -1, -1, -1), [clip.caption, clip.scene.subjects])


def test_wrong_input_is_refused() -> None:
    clip = make_clip("circle", "red", "sand")
    video = clip.video.unsqueeze(0)
    with pytest.raises(ValueError, match="one caption per clip is expected, got 2 for 1 clips"):
        track_shapes(video, [clip.caption] * 2)
    with pytest.raises(ValueError, match=r"a caption of MovingShapes is expected, as 'a red .* got 'a dog'"):
        track_shapes(video, ["a dog"])
    with pytest.raises(ValueError, match=r"square frames is expected, \[N, 3, F, S, S\], got \[1, 3, 5, 32, 16\]"):
        track_shapes(video[..., :16], [clip.caption])
