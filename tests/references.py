"""References in plain Python: loops over lists of floats, without torch, so that no mistake is made twice."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any


def flatten(nested: Any) -> list[float]:
    """The numbers of a nested list, in order."""
    if isinstance(nested, list):
        return [number for part in nested for number in flatten(part)]
    return [nested]


def mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)


def reference_sample_losses(prediction: list[Any], target: list[Any]) -> list[float]:
    """L of Eq. 5 for each sample."""
    return [
        mean([(p - y) ** 2 for p, y in zip(flatten(sample), flatten(wanted), strict=True)])
        for sample, wanted in zip(prediction, target, strict=True)
    ]


def reference_weights(
    losses: list[float], means: list[float], sharpness: float, weight: float, spreads: list[float] | None = None
) -> list[float]:
    """Eq. 7 as printed: one minus the logistic function of the deviation, with spreads in units of 0.3 of them."""
    deviations = [loss - usual for loss, usual in zip(losses, means, strict=True)]
    if spreads is not None:
        deviations = [0.3 * d / spread if spread else 0.0 for d, spread in zip(deviations, spreads, strict=True)]
    return [weight * (1 - 1 / (1 + math.exp(-sharpness * deviation))) for deviation in deviations]


def reference_regression(
    prediction: list[Any], target: list[Any], means: list[float], sharpness: float = 3.0, weight: float = 2.0
) -> float:
    losses = reference_sample_losses(prediction, target)
    weights = reference_weights(losses, means, sharpness, weight)
    return mean([w * loss for w, loss in zip(weights, losses, strict=True)])


class ReferenceCache:
    """Eq. 6 over a dictionary; the spread from all losses and the weights that they have in the mean."""

    def __init__(self, decay: float = 0.95) -> None:
        self.decay = decay
        self.means: dict[float, float] = {}
        self.weighted: dict[float, list[tuple[float, float]]] = {}

    def read(self, timestep: float, loss: float) -> float:
        return self.means.get(timestep, loss)

    def iterate(self, samples: Iterable[tuple[float, float]]) -> None:
        """One iteration over (timestep of the grid, loss)."""
        by_timestep: dict[float, list[float]] = {}
        for timestep, loss in samples:
            if math.isfinite(loss):
                by_timestep.setdefault(timestep, []).append(loss)
        for timestep, losses in by_timestep.items():
            current = mean(losses)
            before = self.means.get(timestep, current)
            self.means[timestep] = self.decay * before + (1 - self.decay) * current
            earlier = self.weighted.get(timestep, [])
            new = 1 - self.decay if earlier else 1.0
            self.weighted[timestep] = [(self.decay * weight, loss) for weight, loss in earlier]
            self.weighted[timestep] += [(new / len(losses), loss) for loss in losses]

    def spread(self, timestep: float) -> float:
        """Standard deviation of the weighted losses, unbiased in the square; 0 if there are fewer than two."""
        weighted = self.weighted.get(timestep, [])
        if sum(weight > 0 for weight, _ in weighted) < 2:
            return 0.0
        center = math.fsum(weight * loss for weight, loss in weighted)
        variance = math.fsum(weight * (loss - center) ** 2 for weight, loss in weighted)
        return math.sqrt(variance / (1 - math.fsum(weight**2 for weight, _ in weighted)))


def reference_temporal_variance(x_BCFHW: list[Any]) -> float:
    """Variance along frames of every position, divided by the number of frames, averaged."""
    variances = []
    for sample in x_BCFHW:
        for channel_FHW in sample:
            for position in zip(*(flatten(frame) for frame in channel_FHW), strict=True):
                center = mean(position)
                variances.append(mean([(value - center) ** 2 for value in position]))
    return mean(variances)


def reference_motion(x_BCFHW: list[Any], floor: float = 0.6, eps: float = 1e-6, weight: float = 0.05) -> float:
    return weight * max(-math.log(reference_temporal_variance(x_BCFHW) + eps), floor)


def reference_matching_gradients(x_0: list[Any], real: list[Any], online: list[Any], eps: float) -> list[list[float]]:
    """g of Eq. 4 for each sample."""
    gradients = []
    for x, r, o in zip(map(flatten, x_0), map(flatten, real), map(flatten, online), strict=True):
        normalizer = max(mean([abs(a - b) for a, b in zip(x, r, strict=True)]), eps)
        gradients.append([(b - a) / normalizer for a, b in zip(r, o, strict=True)])
    return gradients


def central_differences(
    function: Callable[[list[float]], float], values: list[float], step: float = 1e-5
) -> list[float]:
    """The gradient of ``function`` at ``values``, by moving one number at a time."""
    gradient = []
    for i, value in enumerate(values):
        above, below = ([*values[:i], moved, *values[i + 1 :]] for moved in (value + step, value - step))
        gradient.append((function(above) - function(below)) / (2 * step))
    return gradient
