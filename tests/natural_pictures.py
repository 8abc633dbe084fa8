"""Pictures with the spectrum of photographs."""

import numpy as np
from numpy.typing import NDArray


def natural_picture(lines: int, seed: int = 0) -> NDArray[np.uint8]:
    """``[lines, 16 / 9 lines, 3]`` of noise whose amplitude falls with its frequency, as that of photographs does."""
    rng = np.random.default_rng(seed)
    columns = lines * 16 // 9
    rows, across = np.meshgrid(np.fft.fftfreq(lines), np.fft.fftfreq(columns), indexing="ij")
    frequency = np.hypot(rows, across)
    frequency[0, 0] = np.inf
    picture = np.fft.ifft2(np.fft.fft2(rng.standard_normal((lines, columns))) / frequency).real
    picture = (picture - picture.min()) / (picture.max() - picture.min())
    return np.round(255 * picture[..., None].repeat(3, axis=-1)).astype(np.uint8)
