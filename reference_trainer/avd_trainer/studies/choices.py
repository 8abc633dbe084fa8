"""Which setting each method gets: a rule that is stated before a study, for studies that choose values."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any, NamedTuple

from scipy import stats

from avd_trainer.evaluation.measures import headlines
from avd_trainer.studies.definition import SECONDS

CHOICES = "choices"
"""Key of results."""
NEAR = 0.1
"""Mean ranks that differ by no more than this share of the ranks' range count as equal: half a rank of six settings."""
DECIDES = "saturation_error"
"""The measure that then decides."""


class Choice(NamedTuple):
    """What was chosen of a method's settings.

    Attributes:
        method: Its kind.
        chosen: The variant; None if all diverged, or no seed is measured of all others.
        ranks: Mean rank of each of its variants, 1 being the best; without those of which a seed diverged.
        diverged: The variants of which a seed diverged.
        seeds: Those that were compared: all that each of the ranked variants has.
        complete: Whether each variant has all seeds that were asked for, or diverged.
    """

    method: str
    chosen: str | None
    ranks: Mapping[str, float]
    diverged: Sequence[str]
    seeds: Sequence[int]
    complete: bool


Variants = Mapping[str, Mapping[str, Any]]
"""Results by variant, as :func:`avd_trainer.studies.summary.summarise` gives them."""


def choose(variants: Variants, real: Mapping[str, float], seeds: Sequence[int]) -> list[Choice]:
    """Choose one of each method's variants.

    Of each method the one with the lowest mean rank, among its own, of ``|value - real|`` over the headline measures
    that are not the same for all of them, values being means over the seeds that all of them have. Of those within
    ``NEAR * (n - 1)`` of it, where the method has n settings, the nearest to real in saturation. One of which a seed
    diverged is not chosen.

    Args:
        variants: Results by variant: of each of its ``seeds`` the ``values`` by measure, or ``failed``; and ``values``,
            the run's configuration. Those that are trained for equal seconds are left out: a setting is judged once.
        real: What real clips score, by measure; where it is empty nothing is chosen.
        seeds: That were asked for.

    Returns:
        By method, in the order of ``variants``; methods of which less than two variants have results are left out.
    """
    methods: dict[str, list[str]] = {}
    for name, each in variants.items():
        kind = each["values"].get("method", {}).get("kind")
        if kind is not None and not name.endswith(SECONDS):
            methods.setdefault(kind, []).append(name)
    found = {kind: {name: variants[name]["seeds"] for name in names} for kind, names in methods.items()}
    begun = {kind: sum(any(map(_is_result, own.values())) for own in each.values()) for kind, each in found.items()}
    return [_choice(kind, found[kind], real, seeds) for kind in methods if real and begun[kind] > 1]


Units = Mapping[str, Mapping[str, Any]]
"""Results of a variant, by seed."""


def _is_result(unit: Mapping[str, Any]) -> bool:
    return "failed" in unit or bool(unit.get("values"))


def _choice(kind: str, settings: Mapping[str, Units], real: Mapping[str, float], seeds: Sequence[int]) -> Choice:
    diverged = [name for name, units in settings.items() if any("failed" in unit for unit in units.values())]
    left = {name: units for name, units in settings.items() if name not in diverged}
    ranked = {name: units for name, units in left.items() if units}
    shared = [seed for seed in seeds if ranked and all(str(seed) in units for units in ranked.values())]
    complete = all(str(seed) in units for units in left.values() for seed in seeds)
    if not shared:
        return Choice(kind, None, {}, diverged, shared, complete)

    def distances(measure: str) -> list[float]:
        means = [fmean(units[str(seed)]["values"][measure] for seed in shared) for units in ranked.values()]
        return [abs(mean - real[measure]) for mean in means]

    columns = [column for measure in headlines(real) if len(set(column := distances(measure))) > 1]
    places = [stats.rankdata(column) for column in columns] or [[1.0] * len(ranked)]
    ranks = {name: float(fmean(column[place] for column in places)) for place, name in enumerate(ranked)}
    saturation = dict(zip(ranked, distances(DECIDES), strict=True))
    limit = min(ranks.values()) + NEAR * (len(settings) - 1) + 1e-9  # 1.6 is near 1.4, however that is rounded
    near = [name for name in ranked if ranks[name] <= limit]
    return Choice(kind, min(near, key=lambda name: saturation[name]), ranks, diverged, shared, complete)
