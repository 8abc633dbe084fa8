"""Detail: finds tiny pictures that were enlarged."""

from __future__ import annotations

from collections.abc import Iterable
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from avd_trainer.data.preparation.frames import NamedFrames, NamedFramesStage
from avd_trainer.data.preparation.stage import Frames, Score

SHARE = 0.999
"""Of a picture's variance, what the frequencies that count hold; the rest may be noise of compression."""
_WEIGHTS = np.array([9798, 19235, 3735], dtype=np.float32)
"""0.299, 0.587 and 0.114 in units of 2^-15, in which OpenCV computes too."""


def detail(frames: Frames) -> list[float]:
    """Share of its size that a frame would need at least to hold what can be seen in it.

    The lowest frequencies of the luma's cosine transform, a share s of them along either side, that hold 99.9% of its
    variance. Natural frames have 0.5 to 0.9; a picture of 16 lines that was enlarged to 480 by smooth interpolation
    0.03 to 0.06, one of 240 lines 0.2 to 0.45. Enlarging by repeated pixels leaves sharp edges, and is not seen.

    Args:
        frames: ``[F, H, W, 3]`` uint8, RGB.

    Returns:
        One number a frame, in (0, 1].
    """
    from scipy.fft import dctn

    return [_share(np.asarray(dctn(grey, norm="ortho", overwrite_x=True))) for grey in _luma(frames)]


def _luma(frames: Frames) -> list[NDArray[np.float32]]:
    """As :func:`~avd_trainer.data.preparation.frames.luma`, to the digit, without OpenCV, which ``avd data encode``
    does not need."""
    # Whole numbers below 2^24, which float32 holds exactly.
    return [np.floor((frame.astype(np.float32) @ _WEIGHTS + 2**14) / 2**15) for frame in frames]


def _share(spectrum: NDArray[np.float32]) -> float:
    power = np.square(spectrum)
    power[0, 0] = 0  # the mean
    if not power.any():
        return float(1 / max(power.shape))  # of one colour: a single pixel would hold it
    steps = max(power.shape)
    held = np.cumsum(np.bincount(_boxes(power.shape), power.ravel(), minlength=steps))
    return float((np.searchsorted(held, SHARE * held[-1]) + 1) / steps)


@lru_cache(maxsize=4)
def _boxes(shape: tuple[int, int]) -> NDArray[np.intp]:
    """The box that each frequency (i, j) lies at the edge of, in steps of the finer of the two sides; flat."""
    steps = max(shape)
    rows, columns = (np.arange(size) * steps // size for size in shape)
    return np.maximum(rows[:, None], columns).ravel()


class Detail(NamedFramesStage[NamedFrames]):
    """Whether the pictures have the size that their pixels say. Not in the paper."""

    name = "detail"
    Settings = NamedFrames
    score = Score("detail", "share of its size that a frame needs to hold its detail; the highest of the frames")
    measure = staticmethod(detail)

    def missing(self) -> None:
        return None

    @staticmethod
    def choose(measured: Iterable[float]) -> float:
        """The highest: a frame out of focus says nothing about the source, one with detail does."""
        return max(measured)


STAGE = Detail
