"""What clips are like, by latents and pixels alone: for any codec, any clips and no captions."""

from __future__ import annotations

import math

import torch
from scipy.stats import wasserstein_distance
from torch import Tensor

# What a screen of 8 bits rounds away, as a variance of pixels in [0, 1]: below it nothing is seen to vary.
UNSEEN = 1 / (12 * 255**2)
# Added to the variance along frames, as the paper does (Eq. 8): a still clip has a temporal loss of 13.8.
EPS = 1e-6
# Shares of the real clips' own scale that keep ratios finite where generated clips do not vary.
_LEAST_SPREAD = 1e-3
_LEAST_VARIANCE = 1e-4


def clip_measures(
    latents: Tensor, video: Tensor, real: Tensor, real_video: Tensor, *, paired: bool
) -> dict[str, float]:
    """Measure a set of clips.

    Args:
        latents: ``[N, C, F, h, w]`` floating.
        video: ``[N, 3, F', H, W]`` the same clips decoded, RGB; values outside [0, 1] are clamped, as a screen does.
        real: ``[M, C, F, h, w]`` latents of real clips that are not among ``latents``.
        real_video: ``[M, 3, F', H, W]`` what they decode to.
        paired: Whether clip i and real clip i are of one caption; then M is N. Otherwise the two sets are independent.

    Returns:
        One number each, for the set:

        - ``saturation``: mean HSV saturation of pixels, in [0, 1].
        - ``saturation_error``: mean distance of a clip's saturation to that of its real clip, which is the one of its
          caption, or, where clips are not paired, the one of its rank: the Wasserstein distance of the two sets.
        - ``channel_spread``: see :func:`channel_spread`.
        - ``autocorrelation``: mean over clips of :func:`autocorrelation`.
        - ``motion_distance``: :func:`energy_distance` of differences between neighbouring latent frames to the real
          clips'; in units of latents.
        - ``spatial_frequency``, ``temporal_frequency``: mean over clips of the functions of the same names.
        - ``temporal_loss``: mean over clips of ``-log(Var_t + 1e-6)``, each clip's variance along frames averaged over
          channels and positions; in nats, lower is more motion. The paper's 1.5 for its teacher is this mean of
          single clips' losses, not the loss of the pooled variance.
    """
    video, real_video = video.clamp(0, 1), real_video.clamp(0, 1)
    saturation, wanted = (hsv_saturation(x).flatten(1).mean(1) for x in (video, real_video))
    variance = latents.var(dim=2, correction=0).flatten(1).mean(1)
    return {
        "saturation": float(saturation.mean()),
        "saturation_error": float(
            (saturation - wanted).abs().mean() if paired else wasserstein_distance(saturation.numpy(), wanted.numpy())
        ),
        "channel_spread": channel_spread(latents, real),
        "autocorrelation": float(autocorrelation(latents, real).mean()),
        "motion_distance": energy_distance(latents.diff(dim=2), real.diff(dim=2), independent=not paired),
        "spatial_frequency": float(spatial_frequency(video).mean()),
        "temporal_frequency": float(temporal_frequency(video).mean()),
        "temporal_loss": float(-(variance + EPS).log().mean()),
    }


def hsv_saturation(video: Tensor) -> Tensor:
    """``(max - min) / max`` over the RGB channels (dimension 1), 0 for black; values in [0, 1]."""
    high, low = video.amax(dim=1), video.amin(dim=1)
    return torch.where(high > 0, (high - low) / high.clamp_min(1e-12), 0.0)


def channel_spread(latents: Tensor, real: Tensor) -> float:
    """``max_c |log(std_c / std_c,real)|``: how far the channel that is farthest off spreads from the real clips'.

    Standard deviations are over clips, frames and positions. 0 is as real; 0.26 is a channel that spreads 1.3 times as
    wide as it should, or 1/1.3 times. No channel counts as narrower than a thousandth of the real clips' spread.

    Args:
        latents: ``[N, C, ...]``.
        real: ``[M, C, ...]``.
    """
    own, wanted = (x.transpose(0, 1).flatten(1).std(dim=1, correction=0) for x in (latents, real))
    least = _LEAST_SPREAD * wanted.square().mean().sqrt()
    return float(((own + least) / (wanted + least)).log().abs().max())


def autocorrelation(latents: Tensor, real: Tensor) -> Tensor:
    """Correlation of a clip with itself one frame later, about its mean over frames.

    ``(sum_t d_t d_{t+1} + e) / (sum_t d_t^2 + e)`` with ``d_t = x_t - mean_t(x)``, summed over channels and positions
    too. e is a ten-thousandth of the mean denominator of the real clips, so that a clip that stands still has 1 rather
    than that of its rounding errors. Of n frames, a steady drift has ``1 - 3 / n`` and independent frames ``-1 / n``.

    Args:
        latents: ``[N, C, F, h, w]``.
        real: ``[M, C, F, h, w]`` real clips, which say how much motion counts as any.

    Returns:
        ``[N]`` in [-1, 1].
    """
    return lag_correlation(latents, _LEAST_VARIANCE * float(real.var(dim=2, correction=0).flatten(1).mean(1).mean()))


def lag_correlation(x: Tensor, least: float) -> Tensor:
    """:func:`autocorrelation` where ``e`` is so many values times the variance ``least``; ``[N, C, F, ...]`` to
    ``[N]``."""
    deviation = x - x.mean(dim=2, keepdim=True)
    neighbours = (deviation[:, :, 1:] * deviation[:, :, :-1]).flatten(1).sum(1)
    least = least * deviation[0].numel()
    return (neighbours + least) / (deviation.square().flatten(1).sum(1) + least)


def energy_distance(x: Tensor, y: Tensor, *, independent: bool = True) -> float:
    """``2 E|x - y| - E|x - x'| - E|y - y'|`` (Szekely and Rizzo 2013), divided by the root of the dimension.

    Args:
        x: ``[N, ...]``.
        y: ``[M, ...]``, the same shape beyond the first dimension.
        independent: Whether the sets were drawn independently. Then x' and y' are other members, which makes the
            estimate unbiased: 0 in expectation for one distribution, and it can be negative. Sets of the same captions
            are not independent, each member has its like in the other set. For them x' and y' are any members, itself
            included: the distance of the two sets as they are, never negative, and 0 for one set twice.
    """
    x, y = x.flatten(1).double(), y.flatten(1).double()
    distance = 2 * torch.cdist(x, y).mean() - _mean_within(x, independent) - _mean_within(y, independent)
    return float(distance / math.sqrt(x.shape[1]))


def spatial_frequency(video: Tensor) -> Tensor:
    """Mean radius of each clip's spatial power spectrum, in cycles per pixel: low is blur, high is noise or edges.

    ``sum |X(f)|^2 |f| / sum |X(f)|^2`` over frames, channels and frequencies other than 0, X the 2-D Fourier transform
    of a frame. A constant clip has 0. Neither brightness nor contrast matters, until contrast nears what a screen
    rounds away. Independent noise has about 0.38.

    Args:
        video: ``[N, C, F, H, W]`` in [0, 1].

    Returns:
        ``[N]``.
    """
    height, width = video.shape[-2:]
    power = torch.fft.fft2(video, norm="ortho").abs().square().mean(dim=2).sum(dim=1)
    radius = torch.hypot(torch.fft.fftfreq(height).unsqueeze(1), torch.fft.fftfreq(width).unsqueeze(0))
    power[:, 0, 0] = 0
    unseen = UNSEEN * video.shape[1] * height * width
    mean: Tensor = (power * radius).sum((1, 2)) / (power.sum((1, 2)) + unseen)
    return mean


def temporal_frequency(video: Tensor) -> Tensor:
    """Mean frequency of each clip's power spectrum along frames, in cycles per frame: low is drift, high is flicker.

    ``sum |X(f)|^2 |f| / sum |X(f)|^2`` over pixels, channels and frequencies other than 0, X the Fourier transform of a
    pixel along frames. A clip that stands still has 0, one whose frames are in no order about 0.25.

    Args:
        video: ``[N, C, F, H, W]`` in [0, 1].

    Returns:
        ``[N]`` in [0, 0.5].
    """
    frames = video.shape[2]
    power = torch.fft.fft(video, dim=2, norm="ortho").abs().square().mean((3, 4)).sum(1)
    power[:, 0] = 0
    unseen = UNSEEN * video.shape[1] * frames
    mean: Tensor = (power * torch.fft.fftfreq(frames).abs()).sum(1) / (power.sum(1) + unseen)
    return mean


def _mean_within(x: Tensor, independent: bool) -> Tensor:
    """Mean distance of two members, of two different ones where they are independent; 0 for a single one."""
    count = len(x)
    return torch.cdist(x, x).sum() / max(1, count * (count - 1) if independent else count**2)
