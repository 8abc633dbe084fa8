"""Spectral roll-off points: below which frequency most of a map's energy lies, in space and along frames.

The idea of a roll-off radius that does not change when a map is turned is that of the paper "Spectral Roll-off Points
Help Reveal Useful Information Under Feature Maps" (arXiv 2102.00369). It gives neither the share nor the handling of
the mean; those are our reading: 0.85, as in audio, and the mean does not count.
"""

from __future__ import annotations

import torch
from torch import Tensor

from avd_core._checks import check_floating, check_number

# Values that differ by so many units of their own rounding count as equal.
_ROUNDING = 4


@torch.no_grad()
def spectral_rolloff(x: Tensor, *, share: float = 0.85, pool_dim: int | None = None) -> Tensor:
    r"""The radial frequency below which a share of a map's energy lies.

    .. math::
        r = \min\Bigl\{\rho : \sum_{|f| \le \rho} |\hat{x}(f)|^2 \ge \mathrm{share} \sum_f |\hat{x}(f)|^2\Bigr\}

    over the frequencies ``f`` of the two-dimensional discrete Fourier transform, without the mean, which is ``f = 0``.
    A low value means that the map is smooth, a high one that it is rough. It does not change when a map is turned by a
    quarter, mirrored, shifted in a circle, multiplied by a number other than 0, or when a constant is added. White
    noise on 8 x 8 has 0.54 on average, and 0.34 after a blur of 3 x 3.

    A map that is nearly empty counts as much as any other. Where maps belong together, as the frames of a clip do,
    ``pool_dim`` adds up their energies first.

    Costs one real FFT of all maps and a running sum, and never waits for the device.

    Args:
        x: ``[..., H, W]``, floating; the height may differ from the width.
        share: Of the energy, in (0, 1). Ours: 0.85.
        pool_dim: A dimension before the last two whose maps have one roll-off together; None: each has its own.

    Returns:
        ``[...]`` without ``pool_dim``, in cycles per sample, in [0, 0.7072]: 0.5 is the highest frequency along one
        axis. Float32, or float64 of such; without gradient. 0 for a map that is constant, also if only up to the
        rounding of its dtype; NaN for one with a value that is not finite.

    Raises:
        TypeError: If ``x`` is not floating.
        ValueError: If ``x`` has fewer than two dimensions or is empty, or an option is out of its range.
    """
    _check("[..., H, W]", x, 2, share)
    maps = x.unsqueeze(0) if pool_dim is None else x.movedim(_checked_pool(x, pool_dim), 0)
    height, width = x.shape[-2:]
    spectrum = torch.fft.rfft2(_deviations(maps, (-2, -1), (0, -2, -1)), norm="forward").abs().square().sum(0)
    rows = torch.arange(height, device=x.device)
    rows = torch.minimum(rows, height - rows)
    columns = torch.arange(width // 2 + 1, device=x.device)
    # Squares of radii as whole numbers, in units of 1 / (height * width): rounding must not order equal ones.
    squares = ((rows * width) ** 2).unsqueeze(1) + (columns * height) ** 2
    energy = (spectrum * _mirrored(columns, width)).flatten(-2)
    return _rolloff(energy, squares.flatten(), height * width, share)


@torch.no_grad()
def temporal_rolloff(x: Tensor, *, share: float = 0.85) -> Tensor:
    """The frequency along frames below which a share of a clip's change lies: :func:`spectral_rolloff` in time.

    Each pixel's mean over frames does not count, and the energies of all pixels are added up. A low value means that a
    clip drifts, a high one that it jitters; steady motion of an object lies between them.

    Args:
        x: ``[..., F, H, W]``, floating; latents ``[B, C, F, H, W]`` give ``[B, C]``.
        share: Of the energy, in (0, 1).

    Returns:
        ``[...]`` in cycles per frame, in [0, 0.5]; otherwise as :func:`spectral_rolloff`. 0 for a clip that stands
        still.

    Raises:
        TypeError: If ``x`` is not floating.
        ValueError: If ``x`` has fewer than three dimensions, fewer than two frames or is empty, or ``share`` is out of
            its range.
    """
    _check("[..., F, H, W]", x, 3, share)
    frames = x.shape[-3]
    if frames < 2:
        raise ValueError(
            f"temporal_rolloff needs at least 2 frames, got {frames} in {list(x.shape)}. Images do not change; of "
            "[B, F, C, H, W] pass x.transpose(1, 2)."
        )
    spectrum = torch.fft.rfft(_deviations(x, (-3,), (-3, -2, -1)), dim=-3, norm="forward").abs().square().sum((-2, -1))
    numbers = torch.arange(frames // 2 + 1, device=x.device)
    return _rolloff(spectrum * _mirrored(numbers, frames), numbers**2, frames, share)


def _deviations(x: Tensor, mean: tuple[int, ...], whole: tuple[int, ...]) -> Tensor:
    """Deviations from the mean over some dimensions, as shares of the largest one in the ``whole``.

    All 0 in a whole whose values differ by nothing but rounding.
    """
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    deviations = wide - wide.mean(mean, keepdim=True)
    largest = deviations.abs().amax(whole, keepdim=True)
    rounding = _ROUNDING * torch.finfo(x.dtype).eps * wide.abs().amax(whole, keepdim=True)
    return torch.where(largest <= rounding, 0.0, deviations / largest)


def _mirrored(numbers: Tensor, size: int) -> Tensor:
    """How often each frequency of a real FFT stands in the whole one: the negative ones are left out."""
    return torch.where((numbers == 0) | (2 * numbers == size), 1, 2)


def _rolloff(energy: Tensor, squares: Tensor, unit: int, share: float) -> Tensor:
    """The radius at which the running sum of ``energy`` ``[..., K]`` reaches its share; ``squares`` are ``[K]``."""
    ordered, order = squares.sort()
    sums = energy[..., order].cumsum(-1)
    reached = (sums >= share * sums[..., -1:]).int().argmax(-1)  # the first of those that are the largest
    radii = ordered.to(energy.dtype).sqrt() / unit
    return torch.where(sums[..., -1].isfinite(), radii[reached], torch.nan)


def _checked_pool(x: Tensor, pool_dim: int) -> int:
    if not -x.ndim <= pool_dim < x.ndim or pool_dim % x.ndim >= x.ndim - 2:
        raise ValueError(
            f"pool_dim must name a dimension of x {list(x.shape)} before the last two, got {pool_dim}. For the frames "
            "of [B, C, F, H, W] pass 2."
        )
    return pool_dim


def _check(layout: str, x: Tensor, dimensions: int, share: float) -> None:
    check_floating("x", x)
    check_number("share", share, above=0, below=1)
    if x.ndim < dimensions:
        raise ValueError(f"x must be {layout}, got shape {list(x.shape)}.")
    if x.numel() == 0:
        raise ValueError(f"x must not be empty, got shape {list(x.shape)}.")
