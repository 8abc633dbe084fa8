"""Whether clips of image to video go on from the image that they were made of: its pixels, and the shapes in it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from avd_trainer.evaluation.first_frame import first_frame_error
from avd_trainer.evaluation.shape_tracking import ShapeTracks, track_shapes

# A shape that starts so far from where the image shows it, as a share of the frame, is another one; two renderings of a
# caption are that far apart at most.
FARTHEST_START = 0.0625
# The largest distance of starts that is told apart, that of a shape that is not there at first.
MOST_START_ERROR = 0.125
# The largest distance in RGB of two colours that count as one. The palette's are 0.19 apart or more, and saturation
# x 1.3 moves them by 0.08.
SAME_COLOR = 0.06


def image_measures(video: Tensor, captions: Sequence[str], images: Tensor) -> dict[str, float]:
    """Measure a set of clips of moving shapes against their images.

    Args:
        video: ``[N, 3, F, S, S]``; values outside [0, 1] are clamped, as a screen does.
        captions: Of the N clips.
        images: ``[N, 3, S, S]`` what they are to begin with, in the same order and through the same codec.

    Returns:
        A finite number for each of :data:`~avd_trainer.evaluation.measures.IMAGE_MEASURES`, in its order.

    Raises:
        ValueError: If shapes do not fit each other, or a caption is of other clips.
    """
    error = first_frame_error(video, images)
    subjects = subject_measures(track_shapes(video, captions), track_shapes(images.unsqueeze(2), captions))
    return {name: float(each.mean()) for name, each in subjects.items()} | {"first_frame_error": error}


def subject_measures(tracks: ShapeTracks, seen: ShapeTracks) -> dict[str, Tensor]:
    """Measure each shape of each clip against the image.

    Args:
        tracks: What was found in the clips.
        seen: What was found in the images, as clips of one frame.

    Returns:
        By name, ``[N, 2]`` float32 without NaN:

        - ``subject_consistency``: 1 where the shape keeps what the image shows of it: it is visible in every frame,
          starts within a sixteenth of the frame's height from where it is in the image, its median colour is within
          0.06 of the image's, and the kind that fits it best is the one that does in the image.
        - ``start_error``: distance of its centre in the first frame to that in the image, in pixels. At most an eighth
          of the frame's height, the value of a shape that the first frame does not show.
    """
    start = (tracks.centers[:, :, 0] - seen.centers[:, :, 0]).norm(dim=-1)
    color = (tracks.colors - seen.colors).norm(dim=-1)
    kinds, wanted = (each.misfits.nanmean(2).nan_to_num(torch.inf).argmin(-1) for each in (tracks, seen))
    # What is not visible has no place and no colour: comparisons with NaN are false.
    kept = tracks.visible.all(-1) & (start <= FARTHEST_START * tracks.size) & (color <= SAME_COLOR) & (kinds == wanted)
    most = MOST_START_ERROR * tracks.size
    return {"subject_consistency": kept.float(), "start_error": start.nan_to_num(most).clamp_max(most)}
