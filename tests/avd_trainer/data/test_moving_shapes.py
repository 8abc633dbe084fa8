import math
from collections import Counter
from collections.abc import Iterator
from itertools import permutations, product

import pytest
import torch

from avd_trainer.config.sections import ShapeCaptions
from avd_trainer.data.moving_shapes import (
    BACKGROUND_COLORS,
    DIRECTIONS,
    HELD_OUT_SHARE,
    LAYOUTS,
    SHAPE_COLORS,
    SHAPE_KINDS,
    SPEEDS,
    MovingShapes,
    Scene,
    Shape,
    coverage,
    is_held_out,
)

CAPTION = "a red circle moving quickly left above a blue square moving slowly right on a sand background"
SIZE = 32


def every_scene() -> Iterator[Scene]:
    for layout, background, colors in product(LAYOUTS, BACKGROUND_COLORS, permutations(SHAPE_COLORS, 2)):
        both = [product([color], SHAPE_KINDS, SPEEDS, LAYOUTS[layout]) for color in colors]
        for first, second in product(*both):
            yield Scene((Shape(*first), Shape(*second)), layout, background)


def test_a_clip_depends_on_seed_and_index_alone() -> None:
    first, again = MovingShapes(5, seed=3)[4], MovingShapes(9, seed=3)[4]
    assert torch.equal(first.video, again.video)
    assert first.scene == again.scene
    assert not torch.equal(first.video, MovingShapes(5, seed=4)[4].video)


def test_no_two_clips_are_the_same_within_or_across_seeds() -> None:
    videos = [MovingShapes(20, seed=seed)[index].video for seed in (0, 1, 2) for index in range(20)]
    different = {tuple(video[:, ::4, ::4, ::4].flatten().tolist()) for video in videos}
    assert len(different) == len(videos)


# --- Captions


def test_the_caption_says_all_of_a_scene() -> None:
    scene = Scene(
        (Shape("red", "circle", "quickly", "left"), Shape("blue", "square", "slowly", "right")), "above", "sand"
    )
    assert scene.caption == CAPTION
    orange = Scene((Shape("orange", "triangle", "slowly", "up"), scene.shapes[1]), "beside", "sage")
    assert orange.caption.startswith("an orange triangle moving slowly up beside a blue")


def test_captions_are_read_as_they_were_written() -> None:
    captions = [scene.caption for scene in every_scene()]
    assert len(set(captions)) == len(captions)
    assert all(Scene.from_caption(scene.caption) == scene for scene in every_scene())


@pytest.mark.parametrize(
    "caption",
    [
        "",
        "a red circle",
        CAPTION.replace("red", "pink"),
        CAPTION.replace("circle", "star"),
        CAPTION.replace("quickly", "fast"),
        CAPTION.replace("above", "near"),
        CAPTION.replace("sand", "grass"),
        CAPTION + ".",
    ],
)
def test_a_caption_of_other_words_is_refused(caption: str) -> None:
    with pytest.raises(ValueError, match="a caption of MovingShapes is expected, as 'a red circle moving") as error:
        Scene.from_caption(caption)
    assert repr(caption) in str(error.value)


def test_held_out_captions_are_a_fair_share() -> None:
    """Of every word in every place: a word that is never held out, or hardly trained on, would not be measured."""
    held_out, found = Counter[tuple[int, str]](), Counter[tuple[int, str]]()
    for scene in every_scene():
        (first, second), held = scene.shapes, is_held_out(scene.caption)
        words = (*vars(first).values(), *vars(second).values(), scene.layout, scene.background)
        for place in enumerate(words):
            found[place] += 1
            held_out[place] += held
    for place, count in found.items():
        assert 0.85 < HELD_OUT_SHARE * held_out[place] / count < 1.15, place


@pytest.mark.parametrize(("sort", "fewest"), [("full", 200), ("subjects", 25)])
def test_no_seed_trains_on_a_caption_that_is_held_out(sort: ShapeCaptions, fewest: int) -> None:
    captions = {
        held_out: {
            MovingShapes(60, seed, held_out=held_out, captions=sort)[index].caption
            for seed in range(4)
            for index in range(60)
        }
        for held_out in (False, True)
    }
    assert not captions[False] & captions[True]
    assert all(map(is_held_out, captions[True]))
    assert min(map(len, captions.values())) > fewest  # they are many


def test_a_caption_of_the_subjects_names_the_two_shapes_alone() -> None:
    scene = Scene.from_caption(CAPTION)
    assert scene.subjects == scene.said("subjects") == "a red circle and a blue square"
    assert scene.said("full") == CAPTION
    for each in every_scene():
        read = Scene.from_subjects(each.subjects)
        assert read is not None
        assert [(shape.color, shape.kind) for shape in read.shapes] == [(own.color, own.kind) for own in each.shapes]


@pytest.mark.parametrize("caption", ["", CAPTION, "a red circle", "a red circle and a pink square"])
def test_other_captions_are_none_of_the_subjects_alone(caption: str) -> None:
    assert Scene.from_subjects(caption) is None


def test_captions_of_the_subjects_are_held_out_with_every_word_in_every_place() -> None:
    """A colour or kind that is never held out, or always, would not be measured, or never learnt."""
    captions = {scene.subjects for scene in every_scene()}
    held_out = [caption for caption in captions if is_held_out(caption)]
    assert len(captions) == 270
    for part in (held_out, captions - set(held_out)):
        scenes = [Scene.from_subjects(caption) for caption in part]
        for place in range(2):
            shapes = [scene.shapes[place] for scene in scenes if scene is not None]
            assert {shape.color for shape in shapes} == set(SHAPE_COLORS)
            assert {shape.kind for shape in shapes} == set(SHAPE_KINDS)


def test_the_two_shapes_never_share_a_colour() -> None:
    clips = [MovingShapes(100, seed=2)[index] for index in range(100)]
    assert all(first.color != second.color for first, second in (clip.scene.shapes for clip in clips))


# --- What is in the picture


@pytest.mark.parametrize("index", range(12))
def test_the_ground_truth_says_what_is_in_the_picture(index: int) -> None:
    clip = MovingShapes(12, seed=0)[index]
    assert tuple(track.shape for track in clip.tracks) == clip.scene.shapes
    background = torch.tensor(BACKGROUND_COLORS[clip.scene.background])
    elsewhere = clip.video - background.view(3, 1, 1, 1)
    for track in clip.tracks:
        color = torch.tensor(SHAPE_COLORS[track.shape.color])
        for frame, (x, y) in enumerate(track.positions):
            assert torch.allclose(clip.video[:, frame, int(y), int(x)], color, atol=1e-6)
        elsewhere = elsewhere * (coverage(track.shape.kind, track.radius, track.positions, SIZE) == 0)
    assert elsewhere.abs().max() == 0


@pytest.mark.parametrize(
    ("kind", "area", "left", "top", "right", "bottom"),
    [
        ("circle", math.pi * 64, -8, -8, 8, 8),
        ("square", 14.08**2, -7.04, -7.04, 7.04, 7.04),
        ("triangle", 14.4 * 14.4 / 2, -7.2, -8, 7.2, 6.4),
    ],
)
def test_shapes_have_their_area_and_extent(
    kind: str, area: float, left: float, top: float, right: float, bottom: float
) -> None:
    """Of radius 8, by hand; a triangle has its apex above, its base below."""
    (inside,) = coverage(kind, 8.0, torch.tensor([[16.0, 17.0]]), SIZE)
    assert float(inside.sum()) == pytest.approx(area, rel=0.02)
    rows, columns = ((inside > 0.25).any(dim).nonzero().flatten() for dim in (1, 0))
    for found, expected in ((rows, (17 + top, 17 + bottom)), (columns, (16 + left, 16 + right))):
        assert float(found[0]) == pytest.approx(expected[0], abs=1.0)
        assert float(found[-1] + 1) == pytest.approx(expected[1], abs=1.0)
    widths = inside.sum(1)
    assert bool(widths[11] < 0.5 * widths[22]) is (kind == "triangle")


@pytest.mark.parametrize("index", range(24))
def test_each_shape_stays_on_its_half_of_the_frame(index: int) -> None:
    clip = MovingShapes(24, seed=7)[index]
    for place, track in enumerate(clip.tracks):
        # A tenth of a pixel: the fastest and largest just touch the edge.
        assert track.positions.min() >= track.radius - 0.1
        assert track.positions.max() <= SIZE - track.radius + 0.1
        across = track.positions[:, 1 if clip.scene.layout == "above" else 0]
        assert across.min() - track.radius > place * SIZE / 2
        assert across.max() + track.radius < (1 + place) * SIZE / 2


@pytest.mark.parametrize("index", range(24))
def test_shapes_move_as_their_caption_says(index: int) -> None:
    clip = MovingShapes(24, seed=7)[index]
    for track in clip.tracks:
        steps = track.positions.diff(dim=0)
        assert torch.allclose(steps, steps[0].expand_as(steps), atol=1e-4)
        wanted = torch.tensor(DIRECTIONS[track.shape.direction])
        travel = float((track.positions[-1] - track.positions[0]) @ wanted)
        assert travel == pytest.approx(SIZE * SPEEDS[track.shape.speed], rel=0.1 + 1e-6)
        assert (steps[:, wanted == 0] == 0).all()
        assert track.shape.direction in LAYOUTS[clip.scene.layout]


@pytest.mark.parametrize("frames", [1, 5])
def test_the_middle_of_the_path_is_the_middle_of_the_frame(frames: int) -> None:
    clip = MovingShapes(1, seed=1, frames=frames)[0]
    for track in clip.tracks:
        along = track.positions[frames // 2, 0 if clip.scene.layout == "above" else 1]
        assert float(along) == pytest.approx(SIZE / 2, abs=0.03 * SIZE)


# --- What a caption leaves open


def test_a_caption_can_be_rendered_again() -> None:
    shapes = MovingShapes(6, seed=5, held_out=True)
    for index in range(6):
        clip, again = shapes[index], shapes.render(index, 1)
        assert torch.equal(shapes.render(index, 0).video, clip.video)
        assert torch.equal(shapes.render(index, 1).video, again.video)
        assert again.scene == clip.scene
        assert not torch.equal(again.video, clip.video)


def test_renderings_of_a_caption_differ_little() -> None:
    shapes = MovingShapes(8, seed=5)
    clips = [shapes.render(0, rendering) for rendering in range(20)]
    for place in range(2):
        tracks = [clip.tracks[place] for clip in clips]
        positions = torch.stack([track.positions for track in tracks])
        assert (positions.amax(0) - positions.amin(0)).max() < 0.12 * SIZE
        radii = [track.radius for track in tracks]
        assert 1.01 < max(radii) / min(radii) < 1.09
    own = torch.stack([(clip.video - clips[0].video).square().mean() for clip in clips[1:]])
    others = torch.stack([(shapes[index].video - clips[0].video).square().mean() for index in range(1, 8)])
    assert own.max() < 0.25 * others.min()


def test_colours_leave_room_above_them() -> None:
    """Saturated by half as much again they are still colours, so that oversaturation can be seen and measured."""
    colors = torch.tensor([*SHAPE_COLORS.values(), *BACKGROUND_COLORS.values()])
    gray = colors.mean(1, keepdim=True)
    saturated = gray + 1.5 * (colors - gray)
    assert saturated.min() > 0
    assert saturated.max() < 1


def test_renderings_of_a_caption_of_the_subjects_show_other_scenes() -> None:
    shapes = MovingShapes(2, seed=5, captions="subjects")
    scenes = [shapes.render(0, rendering).scene for rendering in range(60)]
    assert shapes[0].scene == scenes[0]
    assert {scene.subjects for scene in scenes} == {shapes[0].caption}
    assert {scene.background for scene in scenes} == set(BACKGROUND_COLORS)
    assert {scene.layout for scene in scenes} == set(LAYOUTS)
    for place in range(2):
        assert {scene.shapes[place].direction for scene in scenes} == set(DIRECTIONS)
        assert {scene.shapes[place].speed for scene in scenes} == set(SPEEDS)


def test_held_out_captions_of_the_subjects_come_in_pairs() -> None:
    shapes = MovingShapes(40, seed=5, held_out=True, captions="subjects")
    pairs = [(shapes[index], shapes[index + 1]) for index in range(0, 40, 2)]
    assert all(first.caption == second.caption for first, second in pairs)
    assert len({first.caption for first, _ in pairs}) > 8
    assert sum(first.scene == second.scene for first, second in pairs) <= 2  # one in 128 by chance


# --- The form


def test_video_has_the_documented_form() -> None:
    assert MovingShapes(1, seed=0)[0].video.shape == (3, 17, SIZE, SIZE)
    clip = MovingShapes(1, seed=0, frames=9, size=48)[0]
    assert clip.video.shape == (3, 9, 48, 48)
    assert clip.video.dtype == torch.float32
    assert clip.video.min() >= 0
    assert clip.video.max() <= 1
    assert clip.tracks[0].positions.shape == (9, 2)
    assert clip.tracks[0].positions.dtype == torch.float32


def test_wrong_sizes_and_indices_are_refused() -> None:
    with pytest.raises(ValueError, match=r"size >= 16 and a saturation in .*, got 1, 17, 8 and"):
        MovingShapes(1, seed=0, size=8)
    with pytest.raises(ValueError, match="captions must be one of full, subjects, got 'none'"):
        MovingShapes(1, seed=0, captions="none")  # type: ignore[arg-type]
    for index in (2, -1):
        with pytest.raises(IndexError, match=f"clip {index} of a data set of 2"):
            MovingShapes(2, seed=0)[index]
