import cv2
import numpy as np
import pytest
from scipy.ndimage import laplace

from avd_trainer.data.preparation.frames import luma
from avd_trainer.data.preparation.stage import Frames
from avd_trainer.data.preparation.stages.sharpness import laplacian_variance

NOISE: Frames = np.random.default_rng(0).integers(0, 256, (3, 48, 64, 3), dtype=np.uint8)


def test_it_is_the_variance_of_the_laplacian() -> None:
    wanted = [laplace(grey.astype(float), mode="mirror").var() for grey in luma(NOISE)]
    assert laplacian_variance(NOISE) == pytest.approx(wanted)


def test_a_checkerboard_has_a_known_one() -> None:
    board = (np.indices((32, 32)).sum(axis=0) % 2 * 10).astype(np.uint8)[None, :, :, None].repeat(3, axis=-1)
    # Every pixel differs by 10 from all four neighbours: 40 and -40 in equal shares.
    assert laplacian_variance(board) == [1600.0]


def test_one_colour_and_a_ramp_have_none() -> None:
    assert laplacian_variance(np.full((1, 20, 20, 3), 77, np.uint8)) == [0.0]
    ramp = np.arange(40, dtype=np.uint8)[None, None, :, None].repeat(20, axis=1).repeat(3, axis=-1)
    # Mirrored edges alone: 2 in the first of 40 columns, -2 in the last.
    assert laplacian_variance(ramp) == pytest.approx([2 * 2**2 / 40])


def test_blur_lowers_it_and_noise_of_twice_the_contrast_has_four_times_as_much() -> None:
    sharp = NOISE // 2
    blurred = np.stack([cv2.GaussianBlur(frame, (0, 0), 2) for frame in sharp])
    assert max(laplacian_variance(blurred)) < 0.01 * min(laplacian_variance(sharp))
    assert laplacian_variance(2 * sharp) == pytest.approx([4 * one for one in laplacian_variance(sharp)], rel=0.01)


def test_it_depends_on_the_size() -> None:
    """Why the size belongs to the settings: enlarged by two, it is a fraction of what it was."""
    frame = cv2.GaussianBlur(NOISE[0], (0, 0), 1)
    enlarged = cv2.resize(frame, None, fx=2, fy=2, interpolation=cv2.INTER_CUBIC)
    assert laplacian_variance(enlarged[None])[0] < 0.3 * laplacian_variance(frame[None])[0]
