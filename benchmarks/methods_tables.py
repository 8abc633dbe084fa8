"""The tables of docs/results.md, from the results of the study `methods`.

    .venv/bin/python benchmarks/methods_tables.py benchmarks/results/methods.json

Prints Markdown. The page holds these tables as they are printed, and a test says so.
"""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated

import typer

from avd_trainer.evaluation.reference import Spread
from avd_trainer.studies.definition import SECONDS, named_start
from avd_trainer.studies.monitoring import bounds, monitor_table
from avd_trainer.studies.statistics import LEVEL, Estimate
from methods_hypotheses import Results

METHODS = ("dmd", "regression", "dmd2", "data-forcing", "lcm", "pcm", "dcm", "scm", "rcm", "vpae")
TERMS = "-avd"
BESIDE = ("teacher", "untrained", "untrained-ode", "untrained-scm", "untrained-dcm", "untrained-vpae")
UNTRAINED = {"pcm": "untrained-ode", "dcm": "untrained-dcm", "scm": "untrained-scm", "rcm": "untrained-scm"}
"""Whose untrained student is not ``untrained``: by sampler. That of ``vpae`` is, as it is to be better in one step."""
CONTROLS = {
    "noise": "white noise",
    "frozen": "a frozen real frame",
    "shuffled": "real frames, shuffled",
    "saturated": "real clips, saturation times 1.3",
    "repeated": "one real clip for each caption",
}
SHOWN = {
    "visible": "visible",
    "preserved": "preserved",
    "color_error": "colour error",
    "saturation_shift": "saturation shift",
    "spatial_frequency": "spatial frequency",
    "speed_distance": "speed distance",
    "motion_distance": "motion distance",
    "variety": "variety",
}
"""The columns of the first tables, of fifteen headline measures and the shift."""
COMPARED = {
    "visible": "visible",
    "preserved": "preserved",
    "color_error": "colour error",
    "saturation_error": "saturation error",
    "speed_distance": "speed distance",
    "motion_distance": "motion distance",
    "variety": "variety",
}
"""The columns of the differences: measures with a distance to real clips."""


def means(found: Results, *, seconds: bool) -> Iterator[str]:
    """A row for each student of a budget; at equal forwards also what stands beside them."""
    yield from _head(("", *SHOWN.values()))
    if not seconds:
        real = [f"{_show(found, key, found.real[key]['mean'])} ± {found.real[key]['std']:.4f}" for key in SHOWN]
        yield _row(("real clips ± the standard deviation of their sets", *real))
        for name in BESIDE:
            yield _row((f"`{name}`", *(_mean(found, name, key) for key in SHOWN)))
        for name, title in CONTROLS.items():
            yield _row((f"*{title}*", *(_show(found, key, found.controls[name][key]) for key in SHOWN)))
    for name in _students(found):
        shown = name + SECONDS if seconds else name
        if shown in found.variants and (not seconds or name != "dmd"):
            yield _row((f"`{name}`", *(_mean(found, shown, key) for key in SHOWN)))


def differences(found: Results, pairs: Sequence[tuple[str, str]]) -> Iterator[str]:
    """How much farther from real clips the first of each pair is than the second, in each budget.

    The last column counts over all headline measures. Below stands how many intervals would exclude 0 if no student
    differed from another, since with so many some do.
    """
    count = len(found.headlines)
    yield from _head(("", "than", "for the same", *COMPARED.values(), f"nearer, farther, of {count}"))
    told, excluding = 0, 0
    for name, other in pairs:
        columns = {key: found.differences(name, other, key, farther=True) for key in (*COMPARED, *found.headlines)}
        for place, budget in enumerate(found.budgets(name)):
            cells = [_difference(found, key, columns[key], place) for key in COMPARED]
            known = [value for key in found.headlines if (value := columns[key][place]) and value.low is not None]
            nearer, farther = (sum(_side(value) == side for value in known) for side in (-1, 1))
            told, excluding = told + len(known), excluding + nearer + farther
            counted = f"{nearer}, {farther}" if known else ""
            budget_name = "seconds" if budget.endswith(SECONDS) else "forwards"
            yield _row((f"`{name}`", f"`{other}`", budget_name, *cells, counted))
    if told:
        yield f"\n{excluding} of {told} intervals exclude 0; if nothing differed, {(1 - LEVEL) * told:.0f} would."


def costs(found: Results, measured: dict[str, dict[str, float]]) -> Iterator[str]:
    """What an update costs, how many each student had, and what student it went on from."""
    titles = "forwards", "seconds", "memory of a GPU, MB", "updates", "updates at equal seconds", "on top of"
    yield from _head(("", *titles))
    for name in _students(found):
        cost, values = measured[name], found.variants[name]["values"]
        steps = [str(found.variants[each]["values"]["max_steps"]) for each in found.budgets(name)]
        figures = f"{cost['forwards']:.0f}", f"{cost['seconds']:.2f}", f"{cost['memory']:.0f}"
        first = named_start(values.get("student_weights"))
        before = f"`{first}`, {found.variants[first]['values']['max_steps']} updates" if first else ""
        yield _row((f"`{name}`", *figures, *[*steps, ""][:2], before))


def monitor(found: Results) -> Iterator[str]:
    """What `CollapseMonitor` says of each student, whether it is right, and from where on each kind is so."""
    real = {name: each["mean"] for name, each in found.real.items()}
    yield from monitor_table(found.variants, real, found.controls)
    so = (
        f"{kind}: {measure} {'above' if above else 'below'} {_show(found, measure, value)}"
        for kind, (measure, value, above) in bounds(real, found.controls).items()
    )
    yield f"\nIs so at the end: {'; '.join(so)}."


def tables(content: dict[str, object]) -> dict[str, str]:
    """Every table by its name.

    Args:
        content: What the study's ``results.json`` holds.
    """
    found = Results(content)
    made = {
        "forwards": means(found, seconds=False),
        "seconds": means(found, seconds=True),
        "terms": differences(found, [(method + TERMS, method) for method in METHODS]),
        "training": differences(found, [(method, UNTRAINED.get(method, "untrained")) for method in METHODS]),
        "matching": differences(found, [(method, "dmd") for method in METHODS[1:]]),
        "costs": costs(found, content["costs"]),  # type: ignore[arg-type]
        "monitor": monitor(found),
    }
    return {name: "\n".join(lines) for name, lines in made.items()}


def _students(found: Results) -> list[str]:
    wanted = [each for method in METHODS for each in (method, method + TERMS)]
    wanted.insert(wanted.index("data-forcing") + 1, "data-forcing-0")
    return [name for name in wanted if name in found.variants]


def _mean(found: Results, name: str, key: str) -> str:
    """± the longer side of the 95% interval. Of what has diverged, how often."""
    seeds = found.variants[name]["seeds"]
    failed = sum("failed" in unit for unit in seeds.values())
    value = found.mean(name, key)
    if value is None:
        return f"{failed} of {len(seeds)} diverged" if failed else "not measured"
    shown = _show(found, key, value.mean)
    if value.low is None or value.high is None:
        return shown
    return f"{shown} ± {_show(found, key, max(value.mean - value.low, value.high - value.mean))}"


def _difference(found: Results, key: str, estimates: Sequence[Estimate | None], place: int) -> str:
    """In bold where the intervals of all budgets exclude 0 on the same side."""
    value = estimates[place]
    if value is None:
        return ""
    if value.low is None or value.high is None:
        return _show(found, key, value.mean, "+")
    sides = {_side(each) for each in estimates}
    counts = sides in ({-1}, {1})
    mean, low, high = (_show(found, key, each, "+") for each in (value.mean, value.low, value.high))
    text = f"{mean} [{low}, {high}]"
    return f"**{text}**" if counts else text


def _side(value: Estimate | None) -> int:
    """Of 0 that a whole interval is on: -1, 1, or 0 for neither or where there is none."""
    if value is None or value.low is None or value.high is None:
        return 0
    return (value.low > 0) - (value.high < 0)


def _show(found: Results, key: str, value: float, sign: str = "") -> str:
    return f"{value:{sign}.{Spread(**found.real[key]).decimals}f}"


def _head(titles: Sequence[str]) -> Iterator[str]:
    yield _row(titles)
    yield "|" + "---|" * len(titles)


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def main(results: Annotated[Path, typer.Argument(help="The study's results.json.")]) -> None:
    """Print the tables."""
    for name, table in tables(json.loads(results.read_text(encoding="utf-8"))).items():
        print(f"\n**{name}**\n\n{table}")


if __name__ == "__main__":
    typer.run(main)
