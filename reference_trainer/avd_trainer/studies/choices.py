"""Which setting each method gets: a rule that is stated before a study, for studies that choose values."""

from __future__ import annotations

from collections.abc import Mapping
from statistics import fmean
from typing import Any, NamedTuple

from scipy import stats

from avd_trainer.evaluation.measures import headlines

CHOICES = "choices"
"""Key of results."""
NEAR = 0.5
"""Mean ranks that differ by no more count as equal."""
DECIDES = "saturation_error"
"""The measure that then decides."""


class Choice(NamedTuple):
    """What was chosen of a method's settings.

    Attributes:
        method: Its kind.
        chosen: The variant.
        ranks: Mean rank of each of its variants, 1 being the best; without those of which a seed diverged.
    """

    method: str
    chosen: str
    ranks: Mapping[str, float]


Variants = Mapping[str, Mapping[str, Any]]
"""Results by variant, as :func:`avd_trainer.studies.summary.summarise` gives them."""


def choose(variants: Variants, real: Mapping[str, float]) -> list[Choice]:
    """Choose one of each method's variants.

    Of each method the one with the lowest mean rank, among its own, of ``|value - real|`` over the headline measures
    that are not the same for all of them. Of those within ``NEAR`` of it, the nearest to real in saturation.

    Args:
        variants: Results by variant: ``measures`` by name with their ``mean`` over seeds, ``seeds``, and ``values``,
            the run's configuration.
        real: What real clips score, by measure; where it is empty nothing is chosen.

    Returns:
        By method, in the order of ``variants``; methods with less than two variants that are done are left out.
    """
    methods: dict[str, list[str]] = {}
    for name, each in variants.items():
        kind = each["values"].get("method", {}).get("kind")
        if kind is not None and each["measures"] and not any("failed" in unit for unit in each["seeds"].values()):
            methods.setdefault(kind, []).append(name)
    return [_choice(kind, names, variants, real) for kind, names in methods.items() if real and len(names) > 1]


def _choice(kind: str, names: list[str], variants: Variants, real: Mapping[str, float]) -> Choice:
    def distances(measure: str) -> list[float]:
        return [abs(variants[name]["measures"][measure]["mean"] - real[measure]) for name in names]

    columns = [column for measure in headlines(real) if len(set(column := distances(measure))) > 1]
    ranked = [stats.rankdata(column) for column in columns] or [[1.0] * len(names)]
    ranks = {name: float(fmean(column[place] for column in ranked)) for place, name in enumerate(names)}
    saturation = dict(zip(names, distances(DECIDES), strict=True))
    near = [name for name in names if ranks[name] <= min(ranks.values()) + NEAR]
    return Choice(kind, min(near, key=lambda name: saturation[name]), ranks)
