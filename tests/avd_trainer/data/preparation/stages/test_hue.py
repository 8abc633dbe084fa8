import colorsys
from collections import Counter
from math import log2

import numpy as np
import pytest

from avd_trainer.data.preparation.stage import ClipSettings, Done, Frames, Row
from avd_trainer.data.preparation.stages.hue import Hue, hue_entropy


def entropy_by_hand(frame: Frames) -> float:
    hues = Counter(round(180 * colorsys.rgb_to_hsv(*(pixel / 255.0))[0]) % 180 for pixel in frame.reshape(-1, 3))
    total = sum(hues.values())
    return -sum(count / total * log2(count / total) for count in hues.values())


def test_it_is_the_entropy_of_the_hues() -> None:
    frame = np.random.default_rng(0).integers(0, 256, (1, 40, 60, 3), dtype=np.uint8)
    assert hue_entropy(frame)[0] == pytest.approx(entropy_by_hand(frame[0]), abs=0.02)  # hues round differently


@pytest.mark.parametrize("colour", [(0, 0, 0), (255, 255, 255), (90, 90, 90), (200, 30, 30)])
def test_one_colour_has_none(colour: tuple[int, int, int]) -> None:
    assert hue_entropy(np.full((2, 8, 8, 3), colour, np.uint8)) == [0.0, 0.0]


def test_black_and_white_footage_has_none() -> None:
    grey = np.random.default_rng(0).integers(0, 256, (1, 30, 30, 1), dtype=np.uint8).repeat(3, axis=-1)
    assert hue_entropy(grey) == [0.0]


@pytest.mark.parametrize("colours", [2, 4, 8])
def test_equal_shares_of_n_colours_have_log2_n_bits(colours: int) -> None:
    hues = [colorsys.hsv_to_rgb(number / colours, 1, 1) for number in range(colours)]
    frame = np.round(255 * np.array(hues)).astype(np.uint8)[None, :, None].repeat(5, axis=2)
    assert hue_entropy(frame)[0] == pytest.approx(log2(colours))


def test_brightness_and_place_do_not_matter() -> None:
    rng = np.random.default_rng(1)
    frame = rng.integers(0, 128, (1, 20, 20, 3), dtype=np.uint8)
    shuffled = rng.permutation(frame.reshape(-1, 3)).reshape(frame.shape)
    assert hue_entropy(shuffled) == pytest.approx(hue_entropy(frame))
    assert hue_entropy(2 * frame) == pytest.approx(hue_entropy(frame), abs=0.05)  # hues round differently


def test_a_clip_is_as_colourful_as_its_least_colourful_frame(row: Row) -> None:
    rng = np.random.default_rng(2)
    frames = rng.integers(0, 256, (4, 16, 16, 3), dtype=np.uint8)
    frames[2] = 0
    outcome = Hue(Hue.Settings(), ClipSettings()).run(row, frames)
    assert isinstance(outcome, Done)
    assert outcome.values["entropy"] == 0.0
    assert outcome.values["frames"] == hue_entropy(frames)
