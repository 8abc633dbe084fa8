"""Every measure moves one way with the strength of its own fault."""

import math
import re
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from itertools import pairwise
from statistics import fmean

import pytest
import torch
from torch import Tensor

from avd_trainer.data.moving_shapes import (
    BACKGROUND_COLORS,
    DIRECTIONS,
    LAYOUTS,
    RADIUS,
    SHAPE_KINDS,
    SPEEDS,
    MovingShapes,
    Scene,
    ShapeClip,
    Track,
    draw,
)
from avd_trainer.evaluation.controls import CONTROLS, Encoded, RealClips
from avd_trainer.evaluation.image_measures import image_measures
from avd_trainer.evaluation.measures import IMAGE_MEASURES, MEASURES, OPEN_MEASURES, headlines, measure
from avd_trainer.evaluation.reference import caught
from avd_trainer.models.codecs.block_dct import BlockDCTCodec

from .conftest import Measured

Spoil = Callable[[list[ShapeClip], float, BlockDCTCodec], Encoded]


def control(name: str) -> Spoil:
    return lambda clips, strength, codec: CONTROLS[name].spoil(RealClips.of_shapes(clips), strength, codec)


def drawn_again(change: Callable[[Track, float], Track]) -> Spoil:
    """Clips whose tracks were changed, all in the same way."""

    def spoil(clips: list[ShapeClip], strength: float, codec: BlockDCTCodec) -> Encoded:
        return encode([redraw(clip, lambda track: change(track, strength)) for clip in clips], codec)

    return spoil


def in_a_share(change: Callable[[ShapeClip], Tensor]) -> Spoil:
    """A share of the clips was changed."""

    def spoil(clips: list[ShapeClip], share: float, codec: BlockDCTCodec) -> Encoded:
        count = round(share * len(clips))
        return encode([change(clip) if i < count else clip.video for i, clip in enumerate(clips)], codec)

    return spoil


def redraw(clip: ShapeClip, change: Callable[[Track], Track]) -> Tensor:
    return draw(clip.scene.background, [change(track) for track in clip.tracks], clip.video.shape[-1])


def encode(videos: list[Tensor], codec: BlockDCTCodec) -> Encoded:
    latents = codec.encode(torch.stack(videos))
    return Encoded(latents, codec.decode(latents))


def of_another_kind(track: Track) -> Track:
    kind = SHAPE_KINDS[(SHAPE_KINDS.index(track.shape.kind) + 1) % len(SHAPE_KINDS)]
    return replace(track, shape=replace(track.shape, kind=kind))


def pulsing(track: Track, strength: float) -> Track:
    pulse = 1 + strength * torch.sin(torch.arange(len(track.positions)) * math.pi / 4)
    return replace(track, radius=track.radius * pulse.view(-1, 1, 1))


def slower(track: Track, strength: float) -> Track:
    middle = track.positions.mean(0)
    return replace(track, positions=middle + (1 - strength) * (track.positions - middle))


def at_a_speed(track: Track, factor: float) -> Track:
    return slower(track, 1 - factor)


def towards_one_speed(track: Track, share: float) -> Track:
    """Nearer to the captioned speed, of which captions leave a tenth open."""
    way = (track.positions[-1] - track.positions[0]).norm() / (SPEEDS[track.shape.speed] * 32)
    return at_a_speed(track, float(1 + (1 - share) * (way - 1)) / float(way))


def on_the_other_half(clip: ShapeClip) -> Tensor:
    return clip.video.flip(2 if clip.scene.layout == "above" else 3)


def in_two_ways(spoil: Spoil) -> Spoil:
    """One half of the clips has too much, the other too little, by the same share."""

    def both(clips: list[ShapeClip], share: float, codec: BlockDCTCodec) -> Encoded:
        half = len(clips) // 2
        parts = spoil(clips[:half], 1 + share, codec), spoil(clips[half:], 1 - share, codec)
        return Encoded(*(torch.cat(each) for each in zip(*parts, strict=True)))

    return both


def with_swapped_speeds(clip: ShapeClip) -> Tensor:
    """Quick shapes move slowly, slow ones quickly."""

    def swap(track: Track) -> Track:
        middle, own = track.positions.mean(0), SPEEDS[track.shape.speed]
        other = sum(SPEEDS.values()) - own
        return replace(track, positions=middle + other / own * (track.positions - middle))

    return redraw(clip, swap)


def with_jitter(speed: str) -> Spoil:
    """Shapes of one speed tremble across their way by some pixels."""

    def tremble(track: Track, pixels: float) -> Track:
        if track.shape.speed != speed:
            return track
        way = DIRECTIONS[track.shape.direction]
        sign = torch.where(torch.arange(len(track.positions)) // 4 % 2 == 0, 1.0, -1.0).unsqueeze(1)
        return replace(track, positions=track.positions + pixels * sign * torch.tensor([way[1], way[0]]))

    return drawn_again(tremble)


def in_the_first_clips(spoil: Spoil) -> Spoil:
    """A quarter of the clips is spoiled."""

    def first(clips: list[ShapeClip], strength: float, codec: BlockDCTCodec) -> Encoded:
        count = len(clips) // 4
        parts = spoil(clips[:count], strength, codec), encode([clip.video for clip in clips[count:]], codec)
        return Encoded(*(torch.cat(each) for each in zip(*parts, strict=True)))

    return first


def still(clip: ShapeClip) -> Tensor:
    return clip.video[:, :1].expand_as(clip.video)


ERASED, SHUFFLED, SATURATED = control("erased"), control("shuffled"), control("saturated")
STILL = in_a_share(still)
SHARES = (0.0, 0.25, 0.5, 0.75, 1.0)
FACTORS = (1.0, 1.1, 1.2, 1.3, 1.5)
# Of each measure: what is wrong, how much of it, and which way the measure goes.
FAULTS: dict[str, tuple[Spoil, tuple[float, ...], int]] = {
    "visible": (ERASED, SHARES, -1),
    "complete": (ERASED, SHARES, -1),
    "kind": (in_a_share(lambda clip: redraw(clip, of_another_kind)), SHARES, -1),
    "preserved": (SHUFFLED, (0.0, 0.12, 0.24, 0.36), -1),
    "area_change": (drawn_again(pulsing), (0.0, 0.05, 0.1, 0.2, 0.3), 1),
    "color_error": (SATURATED, FACTORS, 1),
    "placed": (in_a_share(on_the_other_half), SHARES, -1),
    "direction": (in_a_share(lambda clip: clip.video.flip(1)), SHARES, -1),
    "moves": (STILL, SHARES, -1),
    "speed_error": (drawn_again(slower), SHARES, 1),
    "speed_distance": (drawn_again(slower), SHARES, 1),
    "jerk": (SHUFFLED, (0.0, 0.12, 0.24, 0.5), 1),
    "saturation": (SATURATED, FACTORS, 1),
    "saturation_error": (in_two_ways(SATURATED), (0.0, 0.1, 0.2, 0.3, 0.5), 1),
    "channel_spread": (SATURATED, FACTORS[1:], 1),
    "spatial_frequency": (control("blurred"), (0.0, 0.4, 0.6, 0.8, 1.2), -1),
    "temporal_frequency": (SHUFFLED, SHARES, 1),
    "autocorrelation": (SHUFFLED, SHARES, -1),
    "motion_distance": (control("noise"), SHARES, 1),
    "temporal_loss": (STILL, SHARES, 1),
}


def test_every_measure_has_a_fault() -> None:
    assert list(FAULTS) == list(MEASURES)


Score = Callable[[Spoil, float], dict[str, float]]


@pytest.fixture(scope="module")
def score(measured: Measured, codec: BlockDCTCodec) -> Score:
    """What clips score with a fault of some strength; each is measured once."""

    @cache
    def score(spoil: Spoil, strength: float) -> dict[str, float]:
        return measured(spoil(measured.clips, strength, codec))

    return score


@pytest.mark.parametrize("name", MEASURES)
def test_a_measure_moves_one_way_with_its_fault(name: str, measured: Measured, score: Score) -> None:
    spoil, strengths, way = FAULTS[name]
    values = [score(spoil, strength)[name] for strength in strengths]
    assert len(values) >= 4
    assert all(way * (after - before) > 0 for before, after in pairwise(values)), values
    # The strongest is far from real.
    spread = measured.reference.spreads[name]
    assert abs(values[-1] - spread.mean) > spread.margin
    if MEASURES[name].better != "as real":
        assert way == (1 if MEASURES[name].better == "lower" else -1)


# What is to be as real has two wrong sides; the other one.
@pytest.mark.parametrize(
    ("name", "spoil", "strengths", "way"),
    [
        ("saturation", SATURATED, (1.0, 0.9, 0.7, 0.5), -1),
        ("channel_spread", SATURATED, (0.9, 0.8, 0.7, 0.5), 1),
        ("spatial_frequency", control("noise"), SHARES, 1),
        ("temporal_frequency", STILL, SHARES, -1),
        ("autocorrelation", STILL, SHARES, 1),
        ("temporal_loss", SATURATED, FACTORS, -1),
    ],
)
def test_the_other_side_of_real(name: str, spoil: Spoil, strengths: tuple[float, ...], way: int, score: Score) -> None:
    values = [score(spoil, strength)[name] for strength in strengths]
    assert all(way * (after - before) > 0 for before, after in pairwise(values)), values


@pytest.mark.parametrize(
    ("name", "spoil", "strength"),
    [
        ("jerk", with_jitter("quickly"), 2.0),
        ("jerk", with_jitter("slowly"), 2.0),
        ("jerk", in_the_first_clips(with_jitter("quickly")), 4.0),
        ("jerk", STILL, 1.0),
        ("color_error", in_two_ways(SATURATED), 0.2),
        ("saturation_error", in_two_ways(SATURATED), 0.2),
        ("speed_distance", in_a_share(with_swapped_speeds), 1.0),
        ("speed_distance", in_two_ways(drawn_again(at_a_speed)), 0.2),
        ("placed", in_a_share(on_the_other_half), 0.5),
    ],
)
def test_faults_of_a_part_and_opposite_faults_are_caught(
    name: str, spoil: Spoil, strength: float, measured: Measured, score: Score
) -> None:
    assert name in caught(score(spoil, strength), measured.reference)


def test_one_speed_where_captions_leave_several_open_is_seen_by_the_distance_of_speeds_alone(
    measured: Measured, score: Score
) -> None:
    spoil = drawn_again(towards_one_speed)
    values = [score(spoil, share) for share in (0.0, 0.25, 0.5, 0.75, 1.0)]
    assert all(after["speed_distance"] > before["speed_distance"] for before, after in pairwise(values))
    assert all(after["speed_error"] < before["speed_error"] for before, after in pairwise(values))
    spread = measured.reference.spreads["speed_distance"]
    assert values[0]["speed_distance"] < spread.high
    assert values[-1]["speed_distance"] > 2 * spread.mean


def test_clips_without_captions_get_what_needs_none(measured: Measured, codec: BlockDCTCodec) -> None:
    real = measured.reference.real
    values = measure(*real, None, real)
    assert list(values) == [name for name, each in MEASURES.items() if not each.needs_captions]
    everything = measure(*real, measured.captions, real)
    assert list(everything) == list(MEASURES)
    # Without captions nobody knows which clips belong together.
    unpaired = {"motion_distance"}
    assert {name for name in values if values[name] != everything[name]} == unpaired


# --- Captions that leave something open


def test_clips_of_open_captions_have_one_measure_more(measured_open: Measured) -> None:
    assert list(measured_open.reference.spreads) == [*MEASURES, *OPEN_MEASURES]


def test_variety_falls_with_the_share_of_repeated_clips(measured_open: Measured, codec: BlockDCTCodec) -> None:
    values = [measured_open(control("repeated")(measured_open.clips, s, codec))["variety"] for s in (0, 0.25, 0.5, 1)]
    assert all(after < before for before, after in pairwise(values))
    assert values[-1] == 0
    assert values[0] == pytest.approx((3 / 4 + 5 / 2) / 6, abs=0.05)  # 4 backgrounds, and five times one of two


def test_one_choice_for_all_captions_is_seen_by_its_variety(measured_open: Measured, codec: BlockDCTCodec) -> None:
    """Each background the same: of the six things left open, one does not vary."""
    videos = [draw("sand", list(clip.tracks), 32) for clip in measured_open.clips]
    values = measured_open(encode(videos, codec))
    own = measured_open(encode([clip.video for clip in measured_open.clips], codec))
    assert values["variety"] == pytest.approx(own["variety"] - 3 / 4 / 6, abs=0.03)
    assert "variety" in caught(values, measured_open.reference)


def test_four_scenes_for_all_captions_vary_and_repeat(measured_open: Measured, codec: BlockDCTCodec) -> None:
    """Each of six things is of all kinds often enough, and all six at once are of four kinds."""
    backgrounds, layouts = list(BACKGROUND_COLORS), list(LAYOUTS)
    videos = []
    for place, clip in enumerate(measured_open.clips):
        # Held-out captions are in pairs; a stride of three brings all four to each caption.
        kind = 3 * (place // 2) + place
        layout = layouts[kind % 2]
        shapes = [
            replace(shape, direction=LAYOUTS[layout][(kind // 2) % 2], speed=list(SPEEDS)[(kind // 2 + own) % 2])
            for own, shape in enumerate(clip.scene.shapes)
        ]
        scene = replace(clip.scene, shapes=tuple(shapes), layout=layout, background=backgrounds[kind % 4])
        videos.append(draw(scene.background, [drawn_track(scene, own) for own in range(2)], 32))
    values = measured_open(encode(videos, codec))
    spreads = measured_open.reference.spreads
    assert values["variety"] > spreads["variety"].mean
    assert values["repetition"] > 0.15
    assert spreads["repetition"].mean == pytest.approx(1 / 128, abs=0.01)
    assert "repetition" in caught(values, measured_open.reference)


def drawn_track(scene: Scene, place: int) -> Track:
    shape = scene.shapes[place]
    across = 8.0 + 16 * place
    middle = torch.tensor([16.0, across] if scene.layout == "above" else [across, 16.0])
    way = (
        torch.linspace(-0.5, 0.5, 17).unsqueeze(1)
        * SPEEDS[shape.speed]
        * 32
        * torch.tensor(DIRECTIONS[shape.direction])
    )
    return Track(shape, RADIUS * 32, middle + way)


def test_a_background_that_none_has_is_an_error_of_the_background(
    measured_open: Measured, codec: BlockDCTCodec
) -> None:
    """Half of the way to the mean of all four, as of a model that cannot choose; everything else stays."""
    mean = torch.tensor(list(BACKGROUND_COLORS.values())).mean(0).view(3, 1, 1, 1)
    values = []
    for share in (0.0, 0.25, 0.5):
        videos = []
        for clip in measured_open.clips:
            own = torch.tensor(BACKGROUND_COLORS[clip.scene.background]).view(3, 1, 1, 1)
            is_ground = ((clip.video - own).abs().amax(0) < 1e-4).float()
            videos.append(clip.video + share * is_ground * (mean - own))
        values.append(measured_open(encode(videos, codec)))
    errors = [each["background_error"] for each in values]
    assert errors[0] < errors[1] < errors[2]
    distance = float((torch.tensor(list(BACKGROUND_COLORS.values())) - mean.flatten()).norm(dim=1).mean())
    assert errors[2] == pytest.approx(0.5 * distance, rel=0.2)
    assert caught(values[0], measured_open.reference) == []
    assert "background_error" in caught(values[2], measured_open.reference)


def test_which_background_is_chosen_is_no_matter_of_saturation(measured_open: Measured, codec: BlockDCTCodec) -> None:
    """Clips differ in saturation by 0.06 by their background alone; the codec leaves a fifteenth of that."""
    found, spreads = [], measured_open.reference.spreads
    for name in BACKGROUND_COLORS:
        values = measured_open(encode([draw(name, list(clip.tracks), 32) for clip in measured_open.clips], codec))
        found.append(values["saturation"])
        assert "background_error" not in caught(values, measured_open.reference)
        for key in ("saturation_error", "saturation_shift"):
            assert values[key] == pytest.approx(spreads[key].mean, abs=0.004), (name, key)
    assert max(found) - min(found) > 0.05


@pytest.mark.parametrize(("factor", "sign"), [(1.3, 1), (0.7, -1)])
def test_the_shift_of_saturation_has_a_sign(
    factor: float, sign: int, measured_open: Measured, codec: BlockDCTCodec
) -> None:
    values = measured_open(control("saturated")(measured_open.clips, factor, codec))
    assert sign * values["saturation_shift"] > 0.04
    assert values["saturation_error"] > 0.04


@pytest.mark.parametrize("speed", [*SPEEDS.values(), fmean(SPEEDS.values())])
def test_one_speed_for_all_is_far_from_real_ones(speed: float, measured_open: Measured, codec: BlockDCTCodec) -> None:
    """Be it one of the two or their mean, of which either half is off by (0.5 - 0.2) / 2 of a mean of 0.35."""

    def at_it(track: Track) -> Track:
        return at_a_speed(track, speed * 32 / float((track.positions[-1] - track.positions[0]).norm()))

    values = measured_open(encode([redraw(clip, at_it) for clip in measured_open.clips], codec))
    assert values["speed_distance"] == pytest.approx(0.15 / 0.35, abs=0.1)
    assert "speed_distance" in caught(values, measured_open.reference)


def test_variety_needs_two_clips_of_a_caption(codec: BlockDCTCodec) -> None:
    clips = [MovingShapes(2, seed=3, captions="subjects")[index] for index in range(2)]
    real = encode([clip.video for clip in clips], codec)
    with pytest.raises(ValueError, match="of which some share a caption are expected, got 2 of as many captions"):
        measure(*real, [clip.caption for clip in clips], real)


# --- Clips that were to begin with an image


def moved(track: Track, pixels: float) -> Track:
    """Elsewhere along its way, all the time."""
    way = torch.tensor(DIRECTIONS[track.shape.direction])
    return replace(track, positions=track.positions + pixels * way)


def of_another_image(clips: list[ShapeClip], share: float, codec: BlockDCTCodec) -> Encoded:
    """In a share of the clips, what an image of the next caption would give."""
    count = round(share * len(clips))
    others = clips[1:] + clips[:1]
    return encode([other.video if i < count else clips[i].video for i, other in enumerate(others)], codec)


@pytest.fixture(scope="module")
def images(measured: Measured, codec: BlockDCTCodec) -> Tensor:
    return encode([clip.video for clip in measured.clips], codec).video[:, :, 0]


@pytest.mark.parametrize(
    ("name", "spoil", "strengths"),
    [
        ("subject_consistency", in_a_share(lambda clip: redraw(clip, of_another_kind)), SHARES),
        ("subject_consistency", in_a_share(on_the_other_half), SHARES),
        ("subject_consistency", of_another_image, SHARES),
        ("subject_consistency", ERASED, SHARES),
        ("subject_consistency", SATURATED, (1.0, 1.25, 1.3, 1.5)),
        ("start_error", drawn_again(moved), (0.0, 0.5, 1.0, 2.0, 3.0)),
        ("start_error", ERASED, SHARES),
        ("first_frame_error", of_another_image, SHARES),
        ("first_frame_error", control("blurred"), (0.0, 0.4, 0.6, 0.8, 1.2)),
    ],
)
def test_what_is_not_as_in_the_image_moves_its_measure(
    name: str, spoil: Spoil, strengths: tuple[float, ...], measured: Measured, codec: BlockDCTCodec, images: Tensor
) -> None:
    values = [
        image_measures(spoil(measured.clips, strength, codec).video, measured.captions, images)[name]
        for strength in strengths
    ]
    way = 1 if IMAGE_MEASURES[name].better == "lower" else -1
    assert all(way * (after - before) > 0 for before, after in pairwise(values)), values
    assert values[0] == pytest.approx(1.0 if way < 0 else 0.0, abs=0.03)  # real clips keep their own first frame


def test_another_rendering_of_the_caption_is_told_from_the_image(
    measured: Measured, codec: BlockDCTCodec, images: Tensor
) -> None:
    """What the caption leaves open: a model that does not look at the image scores so."""
    shapes = MovingShapes(len(measured.clips), 1_000_007, held_out=True)
    other = encode([shapes.render(index, 101).video for index in range(len(shapes))], codec)
    found = image_measures(other.video, measured.captions, images)
    assert 0.5 < found["start_error"] < 2
    assert 0.01 < found["first_frame_error"] < 0.06
    # A still keeps all that the image shows: that it goes on is for other measures to see.
    frozen = CONTROLS["frozen"].spoil(RealClips.of_shapes(measured.clips), 1.0, codec)
    assert image_measures(frozen.video, measured.captions, images)["subject_consistency"] > 0.97


def test_with_images_their_measures_come_after_the_others(measured: Measured, images: Tensor) -> None:
    real = measured.reference.real
    assert list(measure(*real, measured.captions, real, images)) == [*MEASURES, *IMAGE_MEASURES]
    with pytest.raises(ValueError, match="captions of clips with images are expected, got none"):
        measure(*real, None, real, images)


def test_a_shape_that_is_not_there_at_first_has_the_worst_start(measured: Measured, images: Tensor) -> None:
    gone = images.mean((2, 3), keepdim=True).expand_as(images).unsqueeze(2).repeat(1, 1, 5, 1, 1)
    found = image_measures(gone, measured.captions, images)
    assert (found["subject_consistency"], found["start_error"]) == (0, 4)


def test_headlines_are_in_order_and_of_what_is_there() -> None:
    assert headlines(MEASURES) == [name for name, each in MEASURES.items() if each.headline]
    assert headlines({"jerk": 1.0, "temporal_loss": 0.5, "visible": 1.0}) == ["visible", "jerk"]


@pytest.mark.parametrize(
    ("name", "value", "distance"),
    [
        ("visible", 0.75, 0.25),
        ("visible", 1.25, 0.0),
        ("motion_distance", 1.25, 0.25),
        ("motion_distance", 0.75, 0.0),
        ("jerk", 1.25, 0.25),
        ("jerk", 0.75, 0.25),
    ],
)
def test_distance_to_real_clips_has_the_sides_of_its_measure(name: str, value: float, distance: float) -> None:
    assert MEASURES[name].distance(value, 1.0) == distance


def broken(tensor: Tensor) -> Tensor:
    tensor = tensor.clone()
    tensor[1, 0, 0, 0, 0] = math.nan
    return tensor


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x, v, r: (x[:1], v[:1], r), "latents of at least 2 clips and 2 frames are expected"),
        (lambda x, v, r: (x[:, :, :1], v, r), "latents of at least 2 clips and 2 frames are expected"),
        (lambda x, v, r: (x, v[:3], r), "video of the same 4 clips is expected"),
        (lambda x, v, r: (x, v[:, :2], r), "video of the same 4 clips is expected"),
        (lambda x, v, r: (x, v, r[:, :, :3]), r"real latents of at least 2 clips are expected, [M, 16, 5, 8, 8], got"),
        (lambda x, v, r: (broken(x), v, r), "finite latents are expected, got 1 of 4 clips"),
        (lambda x, v, r: (x, broken(v), r), "finite video are expected, got 1 of 4 clips"),
        (lambda x, v, r: (x, v, broken(r)), "finite real latents are expected, got 1 of 4 clips"),
    ],
)
def test_wrong_input_is_refused(
    change: Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor, Tensor]], message: str, codec: BlockDCTCodec
) -> None:
    latents = codec.encode(torch.stack([MovingShapes(4, 0)[i].video for i in range(4)]))
    video = codec.decode(latents)
    x, v, r = change(latents, video, latents)
    with pytest.raises(ValueError, match=re.escape(message)):
        measure(x, v, None, Encoded(r, video))
