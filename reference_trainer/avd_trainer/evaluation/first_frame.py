"""Whether clips of image to video begin with the image that they were made of."""

from __future__ import annotations

from torch import Tensor


def first_frame_error(video: Tensor, images: Tensor) -> float:
    """Root mean square difference of pixels between clips' first frames and the images that they should begin with.

    A model that does not look at the image scores as clips against those of other images of the same caption: compare
    with that, not with 0 alone. What comes after the first frame is not looked at.

    Args:
        video: ``[N, 3, F, H, W]`` floating; values outside [0, 1] are clamped, as a screen does.
        images: ``[N, 3, H, W]`` in [0, 1], in the same order, through the same codec where there is one.

    Raises:
        ValueError: If there are no clips, or shapes do not fit each other.
    """
    if video.ndim != 5 or len(video) == 0 or images.shape != (*video.shape[:2], *video.shape[3:]):
        raise ValueError(
            "video [N, 3, F, H, W] and an image [N, 3, H, W] for each clip are expected, got "
            f"{list(video.shape)} and {list(images.shape)}. Pass the images in the clips' size."
        )
    difference = video[:, :, 0].detach().float().clamp(0, 1) - images.to(video.device).float().clamp(0, 1)
    return float(difference.square().mean().sqrt())
