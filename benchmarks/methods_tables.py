"""The tables of docs/results.md, from the results of the study `methods`.

    .venv/bin/python benchmarks/methods_tables.py benchmarks/results/methods.json

Prints Markdown. The page holds these tables as they are printed, and a test says so.
"""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated

import typer

from avd_trainer.studies.definition import SECONDS
from avd_trainer.studies.monitoring import monitor_table
from avd_trainer.studies.statistics import Estimate
from methods_hypotheses import Results

METHODS = ("dmd", "regression", "dmd2", "data-forcing", "lcm", "pcm", "dcm", "scm", "rcm", "vpae")
TERMS = "-avd"
BESIDE = ("teacher", "untrained", "untrained-ode", "untrained-scm", "untrained-dcm", "untrained-vpae")
CONTROLS = {"noise": "white noise", "frozen": "a frozen real frame", "shuffled": "real frames, shuffled"}
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
        real = [f"{found.real[key]['mean']:.3f} ± {found.real[key]['std']:.3f}" for key in SHOWN]
        yield _row(("real clips, ± their standard deviation", *real))
        for name in BESIDE:
            yield _row((f"`{name}`", *(_mean(found.mean(name, key)) for key in SHOWN)))
        for name, title in CONTROLS.items():
            yield _row((f"*{title}*", *(f"{found.controls[name][key]:.3f}" for key in SHOWN)))
    for name in _students(found):
        shown = name + SECONDS if seconds else name
        if shown in found.variants and (not seconds or name != "dmd"):
            yield _row((f"`{name}`", *(_mean(found.mean(shown, key)) for key in SHOWN)))


def differences(found: Results) -> Iterator[str]:
    """Of each method and budget, how much farther from real clips it is with AVD's terms than alone."""
    yield from _head(("", "for the same", *COMPARED.values()))
    for method in METHODS:
        columns = [found.differences(method + TERMS, method, key, farther=True) for key in COMPARED]
        for place, budget in enumerate(found.budgets(method + TERMS)):
            cells = [_difference(estimates, place) for estimates in columns]
            yield _row((f"`{method}`", "seconds" if budget.endswith(SECONDS) else "forwards", *cells))


def costs(found: Results, measured: dict[str, dict[str, float]]) -> Iterator[str]:
    """What an update costs, and how many each student had."""
    yield from _head(("", "forwards", "seconds", "memory, MB", "updates", "updates at equal seconds"))
    for name in _students(found):
        cost = measured[name]
        steps = [str(found.variants[each]["values"]["max_steps"]) for each in found.budgets(name)]
        figures = f"{cost['forwards']:.0f}", f"{cost['seconds']:.2f}", f"{cost['memory']:.0f}"
        yield _row((f"`{name}`", *figures, *[*steps, ""][:2]))


def monitor(found: Results) -> Iterator[str]:
    """What `CollapseMonitor` says of each student, and whether it is right."""
    real = {name: each["mean"] for name, each in found.real.items()}
    yield from monitor_table(found.variants, real, found.controls)


def tables(content: dict[str, object]) -> dict[str, str]:
    """Every table by its name.

    Args:
        content: What the study's ``results.json`` holds.
    """
    found = Results(content)
    made = {
        "forwards": means(found, seconds=False),
        "seconds": means(found, seconds=True),
        "terms": differences(found),
        "costs": costs(found, content["costs"]),  # type: ignore[arg-type]
        "monitor": monitor(found),
    }
    return {name: "\n".join(lines) for name, lines in made.items()}


def _students(found: Results) -> list[str]:
    wanted = [each for method in METHODS for each in (method, method + TERMS)]
    wanted.insert(wanted.index("data-forcing") + 1, "data-forcing-0")
    return [name for name in wanted if name in found.variants]


def _mean(value: Estimate | None) -> str:
    if value is None:
        return "diverged"
    if value.low is None or value.high is None:
        return f"{value.mean:.3f}"
    return f"{value.mean:.3f} ± {max(value.mean - value.low, value.high - value.mean):.3f}"


def _difference(estimates: Sequence[Estimate | None], place: int) -> str:
    """In bold where the intervals of all budgets exclude 0 on the same side."""
    value = estimates[place]
    if value is None:
        return "diverged"
    if value.low is None or value.high is None:
        return f"{value.mean:+.3f}"
    ends = [(each.low, each.high) for each in estimates if each and each.low is not None and each.high is not None]
    counts = len(ends) == len(estimates) and (all(low > 0 for low, _ in ends) or all(high < 0 for _, high in ends))
    text = f"{value.mean:+.3f} [{value.low:+.3f}, {value.high:+.3f}]"
    return f"**{text}**" if counts else text


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
