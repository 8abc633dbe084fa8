"""What a demo shows, in words with the numbers behind them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import stdev
from typing import Literal

from scipy import stats

from avd_trainer.evaluation.measures import ALL_MEASURES, Measure
from avd_trainer.evaluation.reference import LIMIT_SHARE, LIMIT_STDS, Spread
from avd_trainer.studies.findings import TITLES, Findings

Outcome = Literal["nearer to real", "farther from real", "no difference"]
OUTCOMES: tuple[Outcome, ...] = ("nearer to real", "farther from real", "no difference")
ONE_SEED = "This is one seed, which proves nothing: docs/studies.md has the comparison over several."


@dataclass(frozen=True)
class Comparison:
    """AVD against DMD alone in one measure.

    Attributes:
        measure: Which.
        gain: How much nearer to real clips AVD is, in the measure's unit; negative where it is farther.
        limit: A gain of this size may be chance.
        rows: The values of teacher, dmd and avd.
        real: What real clips have.
    """

    measure: Measure
    gain: float
    limit: float
    rows: Mapping[str, float]
    real: Spread

    @property
    def outcome(self) -> Outcome:
        """Of AVD."""
        if abs(self.gain) <= self.limit:
            return "no difference"
        return "nearer to real" if self.gain > 0 else "farther from real"

    @property
    def name(self) -> str:
        """The measure's, in words."""
        return plain_name(self.measure.name)

    def __str__(self) -> str:
        values = ", ".join(f"{TITLES[name]} {self.rows[name]:.3g}" for name in ("avd", "dmd", "teacher"))
        real = f"{self.real.mean:.3g} ± {self.real.std:.1g}"
        return (
            f"{self.name}, {self.measure.title}: {self.outcome}. {values}; real clips {real}. "
            f"Differences up to {self.limit:.2g} count as none."
        )


def compare(findings: Findings) -> list[Comparison]:
    """Compare AVD with DMD alone, by how far each is from real clips, for each headline measure.

    Where higher or lower is better, whoever is beyond the real clips is as near as can be. A gain counts where it is
    larger than :attr:`Spread.margin`, by which sets of real clips differ too, and its 95% interval over groups of
    captions (Student's t) is of one sign. With less than four captions there are no groups, and the
    margin alone counts.
    """
    return [_compare(name, findings) for name in findings.headlines]


def summarize(findings: Findings) -> str:
    """One sentence that says what is better and what is worse, and one that says how little it proves."""
    comparisons = compare(findings)
    better, worse, same = (
        _join([each.name for each in comparisons if each.outcome == outcome]) for outcome in OUTCOMES
    )
    return (
        f"AVD is nearer to the real clips than DMD alone in {better}, farther from them in {worse}, and no different "
        f"in {same}. {ONE_SEED}"
    )


def plain_name(measure: str) -> str:
    """A measure's name as a person writes it."""
    return measure.replace("_", " ")


def render_verdict(findings: Findings) -> str:
    """The verdict as Markdown: the sentences, then a line for each measure."""
    lines = [f"- {comparison}" for comparison in compare(findings)]
    groups = len(findings.groups["avd"])
    over_groups = (
        f", and than half its 95% interval over {groups} groups of captions"
        if groups
        else "; there are too few captions to say how much they scatter"
    )
    rule = (
        f"Real clips: mean and standard deviation over {findings.reference.sets} sets of them. A difference counts "
        f"where it is larger than {LIMIT_STDS:g} of these standard deviations and than {LIMIT_SHARE:.0%} of the mean"
        f"{over_groups}."
    )
    return "\n".join([summarize(findings), "", *lines, "", rule, ""])


def _compare(name: str, findings: Findings) -> Comparison:
    measure, real = ALL_MEASURES[name], findings.reference.spreads[name]

    def gain(avd: Mapping[str, float], dmd: Mapping[str, float]) -> float:
        return measure.distance(dmd[name], real.mean) - measure.distance(avd[name], real.mean)

    scatter = [gain(*pair) for pair in zip(findings.groups["avd"], findings.groups["dmd"], strict=True)]
    half_interval = 0.0
    if scatter:
        half_interval = float(stats.t.ppf(0.975, len(scatter) - 1)) * stdev(scatter) / math.sqrt(len(scatter))
    return Comparison(
        measure,
        gain(findings.rows["avd"], findings.rows["dmd"]),
        max(real.margin, half_interval),
        {row: values[name] for row, values in findings.rows.items()},
        real,
    )


def _join(names: Sequence[str]) -> str:
    if len(names) < 2:
        return names[0] if names else "nothing"
    return f"{', '.join(names[:-1])} and {names[-1]}"
