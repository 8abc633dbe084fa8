"""Hue entropy: finds clips of one colour, or of none."""

from __future__ import annotations

import numpy as np

from avd_trainer.data.preparation.frames import NamedFrames, NamedFramesStage
from avd_trainer.data.preparation.stage import Frames, Score

HUES = 180
"""Hues that OpenCV tells apart in 8 bits, two degrees each; the entropy can be log2(180) = 7.49 at most."""


def hue_entropy(frames: Frames) -> list[float]:
    """``-sum_h p_h log2 p_h`` of each frame, p_h the share of its pixels with hue h.

    Pixels without a hue (black, white, grey) count as hue 0, as OpenCV has it: black-and-white footage has 0. Natural
    frames have 3.5 to 6.2.

    Args:
        frames: ``[F, H, W, 3]`` uint8, RGB.

    Returns:
        Bits per frame, in [0, 7.49]; not divided by their largest value.
    """
    import cv2

    entropies = []
    for frame in frames:
        counts = cv2.calcHist([cv2.cvtColor(frame, cv2.COLOR_RGB2HSV)], [0], None, [HUES], [0, HUES])
        shares = counts[counts > 0].astype(np.float64) / counts.sum(dtype=np.float64)
        entropies.append(abs(float((shares * np.log2(shares)).sum())))
    return entropies


class Hue(NamedFramesStage[NamedFrames]):
    """The paper's monochromatic scene detection (Sec. 6.2), which rejects below 0.60."""

    name = "hue"
    Settings = NamedFrames
    score = Score("entropy", "entropy of the hue histogram, in bits; the lowest of the frames")
    measure = staticmethod(hue_entropy)


STAGE = Hue
