import cv2
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from avd_trainer.data.preparation.stage import ClipSettings, Done, Frames, Row
from avd_trainer.data.preparation.stages.flow import Algorithm, Flow, flow_magnitude, pair_starts
from natural_pictures import natural_picture

RNG = np.random.default_rng(0)
TEXTURE = cv2.GaussianBlur(RNG.integers(0, 256, (160, 480), dtype=np.uint8), (0, 0), 3)
TEXTURE = cv2.normalize(TEXTURE, None, 0, 255, cv2.NORM_MINMAX)  # type: ignore[call-overload]


def shifted(pixels: float) -> np.ndarray:
    """``[120, 240]`` of the texture, moved to the left."""
    matrix = np.array([[1, 0, -100 - pixels], [0, 1, -20]], np.float32)
    return cv2.warpAffine(TEXTURE, matrix, (240, 120), flags=cv2.INTER_CUBIC)


def scroll(frames: int, pixels: float) -> Frames:
    return np.stack([shifted(pixels * number) for number in range(frames)])[..., None].repeat(3, axis=-1)


@pytest.mark.parametrize("algorithm", ["farneback", "dis"])
@pytest.mark.parametrize("speed", [1.0, 3.0, 6.0])
def test_a_texture_at_a_known_speed(algorithm: Algorithm, speed: float) -> None:
    assert flow_magnitude(shifted(0), shifted(speed), algorithm) == pytest.approx(speed, rel=0.12)


@pytest.mark.parametrize("algorithm", ["farneback", "dis"])
def test_nothing_moves_in_a_still(algorithm: Algorithm) -> None:
    assert flow_magnitude(shifted(0), shifted(0), algorithm) < 1e-3


def test_a_moving_square_counts_by_its_area() -> None:
    """A quarter of the picture moves by 2 pixels: half a pixel on average, and a little more around its edges."""
    one, other = shifted(0), shifted(0)
    square = TEXTURE[60:120, 40:160]
    one[30:90, 60:180] = square
    other[30:90, 62:182] = square
    assert 0.45 < flow_magnitude(one, other, "farneback") < 0.75


@pytest.mark.parametrize("iterations", [2, 3])
@pytest.mark.parametrize("speed", [0.2, 1.0, 4.0])
def test_small_frames_measure_the_same_motion_in_pixels_of_480p(speed: float, iterations: int) -> None:
    """A camera that turns over a picture of natural spectrum: 0.2 is the paper's threshold."""
    picture = natural_picture(480)[..., 0].astype(float)
    turned = np.exp(2j * np.pi * np.fft.fftfreq(picture.shape[1]) * speed)
    moved = np.fft.ifft2(np.fft.fft2(picture) * turned).real.clip(0, 255)
    one, other = (
        cv2.resize(frame, (213, 120), interpolation=cv2.INTER_AREA).round().astype(np.uint8)
        for frame in (picture, moved)
    )
    assert 4 * flow_magnitude(one, other, "farneback", iterations) == pytest.approx(speed, rel=0.15)


@given(frames=st.integers(2, 100), pairs=st.integers(1, 100))
def test_pairs_lie_within_the_clip_and_differ(frames: int, pairs: int) -> None:
    starts = pair_starts(frames, pairs)
    assert len(set(starts)) == len(starts) == min(pairs, frames - 1)
    assert sorted(starts) == list(starts)
    assert starts[0] == 0
    assert starts[-1] <= frames - 2


@pytest.mark.parametrize("pairs", [3, 16])
def test_a_clip_has_the_mean_of_its_pairs_in_pixels_of_480p(row: Row, pairs: int) -> None:
    stage = Flow(Flow.Settings(pairs=pairs), ClipSettings(frames=17))
    wanted = stage.frames(row)
    clip = scroll(17, 0.5)
    outcome = stage.run(row, clip[list(wanted.indices)])
    assert isinstance(outcome, Done)
    assert wanted.short_side == 120
    assert len(outcome.values["pairs"]) == pairs
    assert outcome.values["motion"] == pytest.approx(4 * 0.5, rel=0.12)  # 480 / 120 = 4


def test_fewer_iterations_see_fast_motion_as_slower(row: Row) -> None:
    clip = scroll(9, 9.0)
    few, many = (
        Flow(Flow.Settings(iterations=count, pairs=8), ClipSettings(frames=9)).run(row, clip) for count in (1, 3)
    )
    assert few.values["motion"] < 0.95 * many.values["motion"]


def test_the_unit_changes_the_number_alone(row: Row) -> None:
    clip = scroll(9, 1.0)
    small, large = (
        Flow(Flow.Settings(unit_side=unit, pairs=8), ClipSettings(frames=9)).run(row, clip) for unit in (120, 480)
    )
    assert large.values["motion"] == pytest.approx(4 * small.values["motion"])
