"""Measures of shapes on tracks that are made up: each says what it should, and hiding a shape never pays."""

import math
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from scipy.stats import wasserstein_distance
from torch import Tensor

from avd_trainer.data.moving_shapes import BACKGROUND_COLORS, SHAPE_COLORS, Scene
from avd_trainer.evaluation.shape_measures import shape_measures, speed_distance
from avd_trainer.evaluation.shape_tracking import ShapeTracks

SCENE = Scene.from_caption(
    "a red circle moving quickly right above a blue square moving slowly left on a sand background"
)
FRAMES, SIZE = 17, 32
HIGHER = ("visible", "complete", "kind", "preserved", "placed", "direction", "moves")
LOWER = ("speed_error", "jerk", "area_change", "color_error")


def make_tracks() -> ShapeTracks:
    """One clip, exactly as captioned."""
    time = torch.arange(float(FRAMES)) / (FRAMES - 1)
    right = torch.stack([8 + 16 * time, torch.full((FRAMES,), 8.0)], dim=-1)
    left = torch.stack([19.2 - 6.4 * time, torch.full((FRAMES,), 24.0)], dim=-1)
    misfits = torch.tensor([[0.1, 0.2, 0.3], [0.2, 0.1, 0.3]]).view(1, 2, 1, 3).repeat(1, 1, FRAMES, 1)
    return ShapeTracks(
        [SCENE],
        torch.ones(1, 2, FRAMES, dtype=torch.bool),
        torch.stack([right, left]).unsqueeze(0),
        torch.full((1, 2, FRAMES), 100.0),
        torch.tensor([[SHAPE_COLORS["red"], SHAPE_COLORS["blue"]]]),
        misfits,
        SIZE,
    )


def first(tracks: ShapeTracks) -> dict[str, float]:
    """Measures of the first shape, and of the clip."""
    return {name: float(values[0] if values.ndim == 1 else values[0, 0]) for name, values in _measure(tracks).items()}


def _measure(tracks: ShapeTracks) -> dict[str, Tensor]:
    values = shape_measures(tracks)
    assert all(value.isfinite().all() for value in values.values())
    return values


def hide(tracks: ShapeTracks, frames: list[int]) -> ShapeTracks:
    """The first shape is not found in some frames."""
    visible, values = tracks.visible.clone(), {}
    visible[0, 0, frames] = False
    for name in ("centers", "areas", "misfits"):
        values[name] = getattr(tracks, name).clone()
        values[name][0, 0, frames] = math.nan
    colors = tracks.colors.clone()
    if not visible[0, 0].any():
        colors[0, 0] = math.nan
    return replace(tracks, visible=visible, colors=colors, **values)


def test_what_is_as_captioned_is_faultless() -> None:
    values = _measure(make_tracks())
    assert all((values[name] == 1).all() for name in HIGHER)
    for name in LOWER:
        assert values[name].flatten().tolist() == pytest.approx([0, 0], abs=1e-5)


def test_a_shape_that_is_never_found_has_the_worst_of_all_values() -> None:
    gone = first(hide(make_tracks(), list(range(FRAMES))))
    assert [gone[name] for name in HIGHER] == [0] * len(HIGHER)
    assert gone["speed_error"] == 1
    assert gone["jerk"] == 4
    assert gone["area_change"] == 1
    assert gone["color_error"] == pytest.approx(math.dist(BACKGROUND_COLORS["sand"], SHAPE_COLORS["red"]), abs=1e-6)


@pytest.mark.parametrize("fault", ["jumps", "pulses", "faultless"])
def test_hiding_more_frames_never_helps(fault: str) -> None:
    tracks = make_tracks()
    if fault == "jumps":
        tracks.centers[0, 0, ::2] += 9
    elif fault == "pulses":
        tracks.areas[0, 0, ::2] *= 1.5
    measures = [first(hide(tracks, list(range(FRAMES - count, FRAMES)))) for count in (0, 4, 8, 12, 17)]
    for better, worse in pairwise(measures):
        assert all(worse[name] <= better[name] for name in HIGHER)
        assert all(worse[name] >= better[name] - 1e-6 for name in ("speed_error", "jerk", "color_error"))
        # It may hide the frames that differ, but pays for each of them with a whole area.
        assert worse["area_change"] >= better["area_change"] - 1e-6


def test_a_shape_that_changes_its_kind_is_not_preserved() -> None:
    tracks = make_tracks()
    tracks.misfits[0, 0, 10:] = torch.tensor([0.2, 0.3, 0.1])
    values = first(tracks)
    assert values["preserved"] == 0
    assert values["kind"] == 1  # the captioned one still fits best over the clip
    tracks.misfits[0, 0, 2:] = torch.tensor([0.2, 0.3, 0.1])
    assert first(tracks)["kind"] == 0


def test_a_shape_that_jumps_is_not_preserved() -> None:
    tracks = make_tracks()
    tracks.centers[0, 0, 8:] += torch.tensor([0.0, 4.0])
    values = first(tracks)
    assert values["preserved"] == 0
    assert values["jerk"] > 1


@pytest.mark.parametrize(
    ("way", "direction", "moves", "error"),
    [
        ((16.0, 0.0), 1, 1, 0.0),
        ((9.0, 0.0), 1, 1, 7 / 16),
        ((7.0, 0.0), 0, 0, 9 / 16),
        ((-16.0, 0.0), 0, 1, 1.0),
        ((9.0, 10.0), 0, 1, 7 / 16),
        ((0.0, 0.0), 0, 0, 1.0),
        ((20.0, 0.0), 1, 1, 4 / 16),
    ],
)
def test_direction_and_speed_of_a_way(way: tuple[float, float], direction: int, moves: int, error: float) -> None:
    tracks = make_tracks()
    time = torch.arange(float(FRAMES)) / (FRAMES - 1)
    tracks.centers[0, 0] = torch.tensor([8.0, 8.0]) + time.unsqueeze(1) * torch.tensor(way)
    values = first(tracks)
    assert (values["direction"], values["moves"]) == (direction, moves)
    assert values["speed_error"] == pytest.approx(error, abs=1e-5)
    # A way is known from the frames that show it, as long as those are half of them.
    half = first(hide(tracks, [0, 3, 4, 9, 10, 12, 15, 16]))
    assert half["speed_error"] == pytest.approx(error, abs=1e-5)


def test_a_way_that_too_few_frames_show_is_not_known() -> None:
    shown = first(hide(make_tracks(), list(range(9, FRAMES))))
    assert (shown["direction"], shown["moves"], shown["speed_error"]) == (1, 1, pytest.approx(0.0, abs=1e-5))
    hidden = first(hide(make_tracks(), list(range(8, FRAMES))))
    assert (hidden["direction"], hidden["moves"], hidden["speed_error"]) == (0, 0, 1)


def at_speeds(*speeds: float) -> ShapeTracks:
    """Clips whose shapes move at this times the captioned speed."""
    one, time = make_tracks(), (torch.arange(float(FRAMES)) / (FRAMES - 1)).view(-1, 1)
    ways = torch.tensor([[[16.0, 0.0]], [[-6.4, 0.0]]])
    fields = {name: torch.cat([getattr(one, name)] * len(speeds)) for name in ("visible", "areas", "colors", "misfits")}
    centers = torch.stack([16 + time * speed * ways for speed in speeds])
    return replace(one, scenes=[SCENE] * len(speeds), centers=centers, **fields)


@pytest.mark.parametrize(
    ("speeds", "real", "distance"),
    [
        ((1.1, 0.9), (0.9, 1.1), 0.0),  # in any order
        ((1.0, 1.0), (0.9, 1.1), 0.1),
        ((0.9, 0.9), (0.9, 1.1), 0.1),
        ((0.0, 0.0), (0.9, 1.1), 1.0),
        ((-1.0, 0.9), (0.9, 1.1), (0.9 + 0.2) / 2),  # backwards is as a still
        ((2.0, 3.0), (0.9, 1.1), 0.5),  # no more is told apart
    ],
)
def test_the_distance_of_speeds_is_that_of_two_distributions(
    speeds: tuple[float, ...], real: tuple[float, ...], distance: float
) -> None:
    assert speed_distance(at_speeds(*speeds), at_speeds(*real)) == pytest.approx(distance, abs=1e-5)
    assert distance == pytest.approx(wasserstein_distance([min(max(x, 0), 1.5) for x in speeds], real), abs=1e-6)


def test_a_shape_that_is_hidden_counts_as_a_still() -> None:
    real, hidden = at_speeds(0.9, 1.1), at_speeds(0.9, 1.1)
    hidden.visible[1] = False
    hidden.centers[1] = math.nan
    assert speed_distance(hidden, real) == pytest.approx(0.5 * (0.9 + 0.2), abs=1e-5)


def test_quick_and_slow_shapes_are_compared_apart() -> None:
    """A quick shape that is too slow is not made up for by a slow one that is too quick."""
    own = at_speeds(0.9)
    own.centers[0, 1] = at_speeds(1.1).centers[0, 1]
    other = at_speeds(1.1)
    other.centers[0, 1] = at_speeds(0.9).centers[0, 1]
    assert speed_distance(own, other) == pytest.approx(0.2, abs=1e-5)


def test_jerk_is_the_root_mean_square_of_third_differences_up_to_a_cap() -> None:
    tracks = make_tracks()
    time = torch.arange(float(FRAMES))
    tracks.centers[0, 0, :, 0] = 8 + 0.001 * time**3  # its third difference is 0.006 everywhere
    assert first(tracks)["jerk"] == pytest.approx(0.006, rel=1e-2)
    tracks.centers[0, 0, ::2] += 100
    assert first(tracks)["jerk"] == 4


def test_placed_is_on_the_captioned_half() -> None:
    tracks = make_tracks()
    assert _measure(tracks)["placed"].tolist() == [[1, 1]]
    tracks.centers[0, :, :, 1] += 9  # the upper one is now below the middle
    assert _measure(tracks)["placed"].tolist() == [[0, 1]]
    beside = replace(tracks, scenes=[replace(SCENE, layout="beside")])
    beside.centers[0, :, :, 0] = torch.tensor([[20.0], [20.0]])
    assert _measure(beside)["placed"].tolist() == [[0, 1]]


def test_area_change_is_relative_to_the_mean() -> None:
    tracks = make_tracks()
    tracks.areas[0, 0] = torch.tensor([90.0, 110.0]).repeat(9)[:FRAMES]
    assert first(tracks)["area_change"] == pytest.approx(0.1, rel=0.02)


def test_color_error_is_a_distance_in_rgb() -> None:
    tracks = make_tracks()
    tracks.colors[0, 0] += torch.tensor([0.3, 0.0, -0.4])
    assert first(tracks)["color_error"] == pytest.approx(0.5, rel=1e-5)
