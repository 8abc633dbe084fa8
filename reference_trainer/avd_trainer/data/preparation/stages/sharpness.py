"""Variance of the Laplacian: finds clips that are out of focus or smeared by motion."""

from __future__ import annotations

from avd_trainer.data.preparation.frames import NamedFrames, NamedFramesStage, luma
from avd_trainer.data.preparation.stage import Frames, Score


def laplacian_variance(frames: Frames) -> list[float]:
    """Variance over the pixels of each frame's Laplacian, ``4 x - left - right - above - below`` of the luma.

    It depends on the size strongly: one natural clip has 33 at its own size, and 9 once it is enlarged to 480p.

    Args:
        frames: ``[F, H, W, 3]`` uint8, RGB.

    Returns:
        One number a frame, at least 0; in squares of grey levels of 0 to 255.
    """
    import cv2

    variances = []
    for grey in luma(frames):
        curvature = cv2.Laplacian(grey, cv2.CV_16S)  # at most 4 x 255
        # Sums of whole numbers, so the same on each machine.
        mean, square = cv2.sumElems(curvature)[0] / grey.size, cv2.norm(curvature, cv2.NORM_L2SQR) / grey.size
        variances.append(square - mean**2)
    return variances


class Sharpness(NamedFramesStage[NamedFrames]):
    """The paper's blur detection (Sec. 6.2), which rejects below 20.0."""

    name = "sharpness"
    Settings = NamedFrames
    score = Score(
        "laplacian", "variance of the Laplacian of the luma, in squared grey levels; the lowest of the frames"
    )
    measure = staticmethod(laplacian_variance)


STAGE = Sharpness
