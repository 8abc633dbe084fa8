import cv2
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from avd_trainer.data.preparation.frames import luma
from avd_trainer.data.preparation.stage import ClipSettings, Done, Row
from avd_trainer.data.preparation.stages.detail import Detail, _luma, detail
from natural_pictures import natural_picture


@given(share=st.integers(2, 60))
def test_a_cosine_needs_the_share_of_its_frequency(share: int) -> None:
    """Of 64 x 64 pixels, frequency k of the transform is the (k + 1)th."""
    wave = np.cos(np.pi * share * (np.arange(64) + 0.5) / 64)
    frame = np.round(128 + 100 * wave)[None, :, None].repeat(64, axis=0).repeat(3, axis=-1).astype(np.uint8)
    assert detail(frame[None])[0] == pytest.approx((share + 1) / 64)


def test_brightness_does_not_matter() -> None:
    dim = natural_picture(96)[None] // 2
    assert detail(dim + 100) == pytest.approx(detail(dim))


def test_a_frame_of_one_colour_needs_a_pixel() -> None:
    assert detail(np.full((1, 32, 64, 3), 9, np.uint8)) == [1 / 64]


@pytest.mark.parametrize("interpolation", [cv2.INTER_LINEAR, cv2.INTER_CUBIC, cv2.INTER_LANCZOS4])
def test_sixteen_lines_that_were_enlarged_are_seen(interpolation: int) -> None:
    tiny = cv2.resize(natural_picture(480), (28, 16), interpolation=cv2.INTER_AREA)
    enlarged = cv2.resize(tiny, (853, 480), interpolation=interpolation)
    assert detail(enlarged[None])[0] < 0.08
    assert detail(natural_picture(480)[None])[0] > 0.4


@pytest.mark.parametrize(("frames", "expected"), [(81, (10, 30, 50, 70)), (17, (2, 6, 10, 14)), (2, (0, 1))])
def test_frames_that_are_not_named_are_evenly_spread(row: Row, frames: int, expected: tuple[int, ...]) -> None:
    stage = Detail(Detail.Settings(at=None), ClipSettings(frames=frames))
    assert stage.frames(row).indices == expected


def test_one_frame_with_detail_is_enough(row: Row) -> None:
    frames = np.stack([natural_picture(64), np.full((64, 113, 3), 90, np.uint8)])
    outcome = Detail(Detail.Settings(at=(1, 2)), ClipSettings()).run(row, frames)
    assert isinstance(outcome, Done)
    assert outcome.values["detail"] == max(detail(frames)) > 0.4


def test_its_luma_is_that_of_the_other_stages() -> None:
    """All greens, and every fifth red and third blue."""
    colours = np.mgrid[0:256:5, 0:256, 0:256:3].reshape(3, 1, 1, -1).transpose(1, 2, 3, 0).astype(np.uint8)
    assert np.array_equal(_luma(colours), luma(colours))
