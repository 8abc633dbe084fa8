"""What a few seeds say: intervals by the bootstrap, of one variant or of two that share their seeds."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from scipy import stats

LEVEL = 0.95
LEAST_SEEDS = 6
"""Of fewer there is no interval: in 1 of 16 cases the truth lies beyond all of five values, where no resampling of them
can get."""
RESAMPLES = 20_000


class Estimate(NamedTuple):
    """A mean over seeds.

    Attributes:
        mean: Over the seeds.
        std: Sample standard deviation over the seeds; None for a single one.
        low: Lower end of the 95% interval of the mean; None of fewer than ``LEAST_SEEDS``.
        high: Its upper end.
        seeds: How many there are.
    """

    mean: float
    std: float | None
    low: float | None
    high: float | None
    seeds: int


def estimate(values: Sequence[float]) -> Estimate:
    """The mean of independent values, with its bootstrap interval.

    The values are drawn with replacement ``RESAMPLES`` times (always the same times, so that a table can be made
    again), and quantiles of the means of these draws are taken. The usual 2.5% and 97.5% are too narrow for few values;
    the quantiles here are widened so that they fit normal values (the "expanded percentile" interval, Hesterberg 2015,
    The American Statistician 69:371): with n values at ``Phi(-sqrt(n / (n - 1)) t)`` and its complement, where t is the
    97.5% quantile of Student's distribution of n - 1 degrees of freedom. For 8 values that is 0.57% and 99.43%.

    Args:
        values: At least one, finite.

    Raises:
        ValueError: If there are none, or one is not finite.
    """
    array = np.asarray(values, dtype=np.float64)
    count = len(array)
    if count == 0 or not np.isfinite(array).all():
        raise ValueError(f"at least one value is expected, all finite, got {list(values)}.")
    std = float(array.std(ddof=1)) if count > 1 else None
    if count < LEAST_SEEDS:
        return Estimate(float(array.mean()), std, None, None, count)
    draws = np.random.default_rng(0).integers(0, count, (RESAMPLES, count))
    tail = stats.norm.cdf(-math.sqrt(count / (count - 1)) * stats.t.ppf((1 + LEVEL) / 2, count - 1))
    low, high = np.quantile(array[draws].mean(axis=1), [tail, 1 - tail])
    return Estimate(float(array.mean()), std, float(low), float(high), count)


def compare(
    values: Mapping[int, float], baseline: Mapping[int, float], distance: Callable[[float], float]
) -> Estimate | None:
    """How much farther from real clips one variant is than another: ``distance(value) - distance(baseline)``.

    The difference is taken seed by seed, so what a seed does to both (its draws, the noise of its samples) cancels.
    Below 0 is closer to real than the baseline. The real clips' value counts as known.

    Args:
        values: One measure of the variant, by seed.
        baseline: The same of the baseline.
        distance: How far a value is from real clips'; see :meth:`Measure.distance`.

    Returns:
        Over the seeds that both have; None without any.
    """
    shared = sorted(values.keys() & baseline.keys())
    return estimate([distance(values[seed]) - distance(baseline[seed]) for seed in shared]) if shared else None
