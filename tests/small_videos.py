"""Videos of a few frames, from whose brightness one reads a frame's number."""

from __future__ import annotations

from pathlib import Path

import av
import numpy as np
from torch import Tensor

FIRST = 20
"""Mean brightness of the first frame."""


def write_video(
    path: Path,
    frames: int,
    *,
    rate: int = 16,
    width: int = 64,
    height: int = 48,
    step: float = 4,
    times: int = 1,
    codec: str = "mpeg4",
    pixel_format: str = "yuv420p",
) -> Path:
    """A video of stripes whose mean brightness in frame n is ``20 + step * n``.

    Args:
        path: Of the file.
        frames: How many.
        rate: Frames per second.
        width: In pixels, as ``height``.
        height: Of a frame.
        step: 0 for a video that stands still.
        times: How often each frame is shown in a row.
        codec: By FFmpeg's name.
        pixel_format: Likewise.
    """
    stripes = np.where(np.arange(width) % 8 < 4, -10, 10)[None, :, None]
    # Key frames alone: others hold back what changes slowly.
    with av.open(path, "w") as container:
        stream = container.add_stream(codec, rate=rate, options={"qscale": "2", "g": "1"})
        stream.width, stream.height, stream.pix_fmt = width, height, pixel_format
        for number in range(frames):
            bright = round(FIRST + step * (number // times))
            pixels = np.broadcast_to(bright + stripes, (height, width, 3)).astype(np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode(None))
    return path


def numbers_of(frames: Tensor, step: float = 4) -> list[int]:
    """Which frames of :func:`write_video` these are: ``[F, 3, H, W]`` in 0..255."""
    return [round((float(frame.float().mean()) - FIRST) / step) for frame in frames]
