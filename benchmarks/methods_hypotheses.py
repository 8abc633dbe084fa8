"""What the study `methods` says of each of its hypotheses, which docs/studies.md states and this file puts in numbers.

    .venv/bin/python benchmarks/methods_hypotheses.py runs/methods/results.json

Written before any run of the study. Prints a table for each hypothesis: every claim with its figure at equal forwards
and at equal seconds, and whether it holds (the interval excludes all else), is refuted (it excludes the claim) or is
open. Of two budgets both have to say so. Where a seed diverged there is no figure.
"""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import typer

from avd_trainer.evaluation.measures import ALL_MEASURES, headlines
from avd_trainer.studies.definition import SECONDS
from avd_trainer.studies.monitoring import SIGNS, true_kinds
from avd_trainer.studies.statistics import Estimate, estimate

Outcome = Literal["holds", "refuted", "open", "no figure"]

UNTRAINED = {"pcm": "untrained-ode", "dcm": "untrained-dcm", "scm": "untrained-scm", "rcm": "untrained-scm"}
DISTILLED = ("dmd", "dmd2", "lcm", "pcm", "dcm", "scm", "rcm", "vpae")
CONSISTENT = ("lcm", "pcm", "dcm", "scm")
MARGIN = 4
"""Standard deviations of real clips, as in every table."""


class Claim(NamedTuple):
    """A claim of a hypothesis.

    Attributes:
        number: Of the hypothesis.
        text: What is claimed of the figures.
        figures: One of each budget; None where a seed diverged, or none is measured.
        bound: Claimed to be on one side of it.
        below: Which side.
    """

    number: int
    text: str
    figures: Sequence[Estimate | None]
    bound: float
    below: bool

    @property
    def outcomes(self) -> list[Outcome]:
        """Of each budget."""
        return [outcome(figure, self.bound, below=self.below) for figure in self.figures]

    @property
    def outcome(self) -> Outcome:
        """What both budgets say."""
        return self.outcomes[0] if len({*self.outcomes}) == 1 else "open"


def outcome(figure: Estimate | None, bound: float, *, below: bool) -> Outcome:
    """Whether a figure's interval lies on one side of a bound."""
    if figure is None:
        return "no figure"
    if figure.low is None or figure.high is None:
        return "open"
    if figure.low >= bound and figure.high > bound:
        return "refuted" if below else "holds"
    if figure.high <= bound and figure.low < bound:
        return "holds" if below else "refuted"
    return "open"


class Results:
    """A study's ``results.json``.

    Args:
        content: What it holds.
    """

    def __init__(self, content: dict[str, Any]) -> None:
        self.variants: dict[str, Any] = content["variants"]
        self.real: dict[str, dict[str, float]] = content["reference"]["spreads"]
        self.controls: dict[str, Any] = content["controls"]["controls"]
        self.headlines = headlines(self.real)

    def budgets(self, name: str) -> list[str]:
        """A variant's name in each budget that it has."""
        return [each for each in (name, name + SECONDS) if each in self.variants]

    def beside(self, name: str, other: str) -> str:
        """What ``other`` is called in the budget of ``name``."""
        return other + SECONDS if name.endswith(SECONDS) and other + SECONDS in self.variants else other

    def values(self, name: str, measure: str) -> dict[str, float] | None:
        """By seed; None where one has diverged."""
        seeds = self.variants[name]["seeds"]
        if any("failed" in unit for unit in seeds.values()):
            return None
        return {seed: unit["values"][measure] for seed, unit in seeds.items()}

    def distances(self, name: str, measure: str) -> dict[str, float] | None:
        """Of each seed's value to real clips."""
        values, real = self.values(name, measure), self.real[measure]["mean"]
        return values and {seed: ALL_MEASURES[measure].distance(value, real) for seed, value in values.items()}

    def mean(self, name: str, measure: str) -> Estimate | None:
        """Over seeds."""
        values = self.values(name, measure)
        return estimate([*values.values()]) if values else None

    def differences(self, name: str, other: str, measure: str, *, farther: bool, share: float = 1) -> list[Any]:
        """Of each budget, value or distance of ``name`` less ``share`` of that of ``other``, over shared seeds."""
        read, found = self.distances if farther else self.values, []
        for each in self.budgets(name):
            own, others = read(each, measure), read(self.beside(each, other), measure)
            shared = sorted((own or {}).keys() & (others or {}).keys())
            found.append(estimate([own[s] - share * others[s] for s in shared]) if own and others and shared else None)
        return found


def claims(found: Results) -> Iterator[Claim]:
    """Hypotheses 1 to 6."""

    def nearer(number: int, name: str, other: str, *measures: str) -> Iterator[Claim]:
        for measure in measures:
            figures = found.differences(name, other, measure, farther=True)
            yield Claim(number, f"{name} nearer than {other}: {measure}", figures, 0, below=True)

    def raw(number: int, name: str, other: str, measure: str, *, below: bool) -> Claim:
        text = f"{name} {'below' if below else 'above'} {other}: {measure}"
        return Claim(number, text, found.differences(name, other, measure, farther=False), 0, below=below)

    def shift(number: int, name: str, bound: float, side: str) -> Claim:
        figures = [found.mean(each, "saturation_shift") for each in found.budgets(name)]
        return Claim(number, f"{name}: saturation_shift {side}", figures, bound, below=number == 3)

    for name in DISTILLED:
        yield from nearer(1, name, UNTRAINED.get(name, "untrained"), "visible", "preserved")
    for measure in found.headlines:
        figures = found.differences("regression", "untrained", measure, farther=True, share=0.9)
        yield Claim(2, f"regression no tenth nearer than untrained: {measure}", figures, 0, below=False)
    real = found.real["saturation_shift"]
    for name in CONSISTENT:
        yield shift(3, name, real["mean"] + MARGIN * real["std"], "below real clips' margin")
        yield raw(3, name, "dmd", "spatial_frequency", below=True)
    for name in ("dmd", "dmd2", "rcm"):
        yield shift(4, name, real["mean"], "above real clips' mean")
        yield raw(4, name, "teacher", "variety", below=True)
    for name in ("lcm", "pcm", "scm", "rcm"):
        yield raw(4, name, "dmd", "variety", below=False)
    yield raw(4, "rcm", "dmd", "saturation_shift", below=True)
    for name in ("dmd", "dmd2", "rcm", "data-forcing"):
        yield from nearer(5, f"{name}-avd", name, "saturation_error", "motion_distance")
        yield raw(5, f"{name}-avd", name, "variety", below=False)
    for name in (*CONSISTENT, "regression"):
        for measure in found.headlines:
            own = found.distances("dmd", measure)
            bound = sum(own.values()) / len(own) / 100 if own else 0.0
            figures = found.differences(f"{name}-avd", name, measure, farther=True)
            yield Claim(5, f"{name}-avd not farther than {name}: {measure}", figures, bound, below=True)
    yield raw(6, "data-forcing", "dmd2", "variety", below=False)
    yield from nearer(6, "data-forcing", "dmd2", "saturation_error")
    yield raw(6, "data-forcing-0", "data-forcing", "variety", below=True)
    yield from nearer(6, "data-forcing", "data-forcing-0", "saturation_error")


def costs(found: Results, made: Sequence[Claim]) -> Iterator[str]:
    """Hypothesis 7."""
    reference = found.variants["dmd"]["values"]["max_steps"]
    for name in ("lcm", "pcm", "scm", "dcm"):
        forwards, *seconds = (found.variants[each]["values"]["max_steps"] for each in found.budgets(name))
        text = f"{name}: {forwards} steps at equal forwards, {forwards / reference:.2f} times those of dmd"
        fewer = [f"; fewer at equal seconds, {each}: {'holds' if each < forwards else 'refuted'}" for each in seconds]
        yield text + "".join(fewer)
    turned = [claim.text for claim in made if claim.number < 6 and {"holds", "refuted"} <= {*claim.outcomes}]
    yield f"claims of 1 to 5 whose sign the budget changes: {'; '.join(turned) or 'none'}"


def alarms(found: Results) -> Iterator[str]:
    """Hypothesis 8."""
    real = {name: each["mean"] for name, each in found.real.items()}
    for key in ("while_training", "of_samples"):
        false: dict[str, int] = {}
        said = right = judged = 0
        for name, variant in found.variants.items():
            for unit in variant["seeds"].values():
                kinds = unit.get("monitor", {}).get(key)
                if kinds is None:
                    continue
                truth = true_kinds(unit["values"], real, found.controls)
                for kind in SIGNS:
                    if name == "dmd" and kind == "oversaturated":
                        judged, said = judged + 1, said + (kind in kinds)
                        right += kind in kinds and kind in truth
                    elif kind in kinds and kind not in truth:
                        false[f"{name} {kind}"] = false.get(f"{name} {kind}", 0) + 1
        others = ", ".join(f"{name} {count}" for name, count in false.items()) or "none"
        yield f"{key}: oversaturated said of {said} of {judged} students of dmd, rightly of {right}; false: {others}"


def show(claim: Claim) -> str:
    """A row of the table."""
    cells = []
    for figure in claim.figures:
        interval = "" if figure is None or figure.low is None else f" [{figure.low:+.4f}, {figure.high:+.4f}]"
        cells.append("" if figure is None else f"{figure.mean:+.4f}{interval}")
    side = f"{'<' if claim.below else '>'} {claim.bound:+.4f}"
    return f"| {claim.text} | {side} | {' | '.join([*cells, ''][:2])} | {claim.outcome} |"


def main(results: Annotated[Path, typer.Argument(help="The study's results.json.")]) -> None:
    """Print what holds, what is refuted and what is open."""
    found = Results(json.loads(results.read_text(encoding="utf-8")))
    made = [*claims(found)]
    for number in range(1, 7):
        print(f"\n**{number}**\n\n| claim | claimed | equal forwards | equal seconds | |\n|---|---|---|---|---|")
        print("\n".join(show(claim) for claim in made if claim.number == number))
    for number, lines in ((7, costs(found, made)), (8, alarms(found))):
        print(f"\n**{number}**\n\n" + "\n".join(f"- {line}" for line in lines))


if __name__ == "__main__":
    typer.run(main)
