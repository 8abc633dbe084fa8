"""How far sets of videos are from real ones, beside how far real ones are from each other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean

import torch
from scipy.stats import wasserstein_distance
from torch import Tensor

from avd_trainer.evaluation.controls import CONTROLS, OF_SHAPES, RealClips
from avd_trainer.evaluation.reference import LIMIT_SHARE, LIMIT_STDS, Spread, spread_of
from avd_trainer.evaluation.video_measures import VIDEO_MEASURES

Values = Mapping[str, Sequence[float]]
"""By name of the measure, the value of each clip of a set."""

DRAWS = 100
"""How often clips are drawn from two sets that are compared."""
LEAST_CLIPS = 8
"""Of a reference: from fewer nobody can tell how real clips vary."""
VIDEO_CONTROLS = tuple(name for name in CONTROLS if name not in OF_SHAPES)
"""Nobody can take an object out of a video."""


@dataclass(frozen=True)
class RealVideos:
    """Real videos to compare with.

    Attributes:
        values: Of each clip.
        size: How many clips of each set are compared at a time.
        means: Of each measure, the mean over so many clips.
        distances: Of each measure, how far halves are from each other: see :meth:`distance`.
        steps: Of measures that have only some values, how far these are apart.
    """

    values: Values
    size: int
    means: Mapping[str, Spread]
    distances: Mapping[str, Spread]
    steps: Mapping[str, float] = field(default_factory=dict)

    @property
    def clips(self) -> int:
        """How many there are."""
        return _count(self.values)

    @classmethod
    def of(cls, values: Values, others: Sequence[Values], steps: Mapping[str, float]) -> RealVideos:
        """Split the clips at random into halves, again and again, and compare those.

        Args:
            values: Of at least :data:`LEAST_CLIPS` clips.
            others: The sets that are to be compared with them. No more clips are compared at a time than the smallest
                set has, since fewer clips are farther from each other.
        """
        count = _count(values)
        size = min([count // 2, *map(_count, others)])
        draws = torch.Generator().manual_seed(0)
        means: dict[str, list[float]] = {name: [] for name in VIDEO_MEASURES}
        distances: dict[str, list[float]] = {name: [] for name in VIDEO_MEASURES}
        for _ in range(DRAWS):
            order = torch.randperm(count, generator=draws).tolist()
            for name, own in values.items():
                one, other = ([own[place] for place in part] for part in (order[:size], order[size : 2 * size]))
                means[name].append(fmean(one))
                distances[name].append(float(wasserstein_distance(one, other)))
        return cls(
            values,
            size,
            {name: spread_of(each) for name, each in means.items()},
            {name: spread_of(each) for name, each in distances.items()},
            steps,
        )

    def distance(self, values: Values) -> dict[str, float]:
        """How far a set of clips is from the real ones, by measure and in its unit.

        The Wasserstein distance of the clips' values, ``int |P(x) - Q(x)| dx`` of the two distribution functions, so
        clips that are off to both sides do not cancel. A mean over :data:`DRAWS` draws of ``size`` clips of each set.
        """
        draws = torch.Generator().manual_seed(0)
        found: dict[str, list[float]] = {name: [] for name in VIDEO_MEASURES}
        for _ in range(DRAWS):
            own = torch.randperm(_count(values), generator=draws)[: self.size].tolist()
            real = torch.randperm(self.clips, generator=draws)[: self.size].tolist()
            for name, each in values.items():
                pair = [each[place] for place in own], [self.values[name][place] for place in real]
                found[name].append(float(wasserstein_distance(*pair)))
        return {name: fmean(each) for name, each in found.items()}

    def worse(self, distances: Mapping[str, float]) -> list[str]:
        """The measures by which clips are farther from real ones than halves of these are from each other.

        By more than 4 standard deviations of the halves' distances, 1% of the real clips' mean, and one step.
        """
        return [
            name
            for name, each in self.distances.items()
            if distances[name] - each.mean
            > max(LIMIT_STDS * each.std, LIMIT_SHARE * abs(self.means[name].mean), self.steps.get(name, 0.0))
        ]


class PixelCodec:
    """In place of a codec: latents are pixels, with a mean of 0 and a spread of about 1."""

    def encode(self, video: Tensor) -> Tensor:
        """[0, 1] to [-2, 2]."""
        return 4 * video - 2

    def decode(self, latents: Tensor) -> Tensor:
        """What a screen shows of them, in [0, 1]."""
        return ((latents + 2) / 4).clamp(0, 1)


def spoil(video: Tensor, name: str) -> Tensor:
    """One clip ``[3, F, H, W]`` in [0, 1], spoiled by a control at its usual strength."""
    control = CONTROLS[name]
    return control.spoil(RealClips(video.unsqueeze(0)), control.strength, PixelCodec()).video[0]


def _count(values: Values) -> int:
    return len(next(iter(values.values())))
