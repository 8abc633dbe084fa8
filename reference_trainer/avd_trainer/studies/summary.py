"""What a study found, made from its units at any time: ``results.json``, ``table.md`` and figures."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence, Set
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

import torch

from avd_trainer.evaluation.controls import CONTROLS as CONTROL_TITLES
from avd_trainer.evaluation.controls import Encoded
from avd_trainer.evaluation.measure_table import Row, markdown_table
from avd_trainer.evaluation.measures import ALL_MEASURES, headlines
from avd_trainer.evaluation.reference import Reference, Spread
from avd_trainer.runtime.environment import environment
from avd_trainer.runtime.errors import UserError
from avd_trainer.runtime.files import read_json, write_json, write_text
from avd_trainer.studies.choices import CHOICES, NEAR, choose
from avd_trainer.studies.definition import CONTROLS, COSTS, REFERENCE, SECONDS, Study, Unit
from avd_trainer.studies.deviations import save_deviations
from avd_trainer.studies.dots import save_figure
from avd_trainer.studies.monitoring import monitor_table
from avd_trainer.studies.runner import OVERRIDES, SAVED, result_file
from avd_trainer.studies.statistics import LEAST_SEEDS, LEVEL, Estimate, compare, estimate
from avd_trainer.training.folder import locked

RESULTS = "results.json"
TABLE = "table.md"
FIGURE = "figure.png"
DEVIATIONS = "deviations.png"


def write_summary(study: Study, folder: Path, seeds: Sequence[int]) -> dict[str, Any]:
    """Write ``results.json``, ``table.md``, ``figure.png`` and, where a variant has a regression, ``deviations.png``.

    Covers all variants that the folder has results of, also those that ``study`` leaves out.

    Args:
        study: Says titles, order and baseline.
        folder: A study's, done or not.
        seeds: Which seeds to report; results of others are left out.

    Returns:
        What is in ``results.json``.

    Raises:
        UserError: If the folder holds no results of this study.
    """
    saved = read_json(folder / SAVED)
    if saved["study"] != study.name:
        raise UserError(
            f"{folder} holds results of study {saved['study']}, not of {study.name}. Choose another --output."
        )
    with locked(folder, wait=True):
        results = summarise(study, folder, saved, seeds)
        write_json(folder / RESULTS, results)
        write_text(folder / TABLE, render(results))
        save_figure(folder / FIGURE, results)
        save_deviations(folder / DEVIATIONS, results)
    return results


def summarise(study: Study, folder: Path, saved: Mapping[str, Any], seeds: Sequence[int]) -> dict[str, Any]:
    """All there is to say of the units that are done, as plain values."""
    real = _read(folder, Unit(REFERENCE, study.data.seed))
    controls = _read(folder, Unit(CONTROLS, study.data.seed))
    units = {
        name: {seed: unit for seed in seeds if (unit := _read(folder, Unit(name, seed)))}
        for name in study.order
        if name in saved["variants"]
    }
    values = {
        name: {seed: _mean(unit) for seed, unit in own.items() if "noises" in unit} for name, own in units.items()
    }
    variants = {}
    for name, own in units.items():
        against = study.compared_with(name, units)
        measures: dict[str, dict[str, Any]] = {}
        for measure in ALL_MEASURES:
            of_seeds = _column(values[name], measure)
            if not of_seeds:
                continue
            measures[measure] = _told(estimate(list(of_seeds.values())), units[name])
            if real and against is not None:
                distance = partial(ALL_MEASURES[measure].distance, real=real["spreads"][measure]["mean"])
                found = compare(of_seeds, _column(values.get(against, {}), measure), distance)
                compared = units[name], units.get(against, {})
                measures[measure]["against_baseline"] = None if found is None else _told(found, *compared)
        variants[name] = {
            "title": _title(study, name),
            "against": against,
            "measures": measures,
            "seeds": {
                str(seed): {"values": values[name].get(seed)}
                | {key: value for key, value in unit.items() if key not in ("variant", "seed")}
                for seed, unit in own.items()
            },
            "values": saved["variants"][name],
        }
    means = {name: each["mean"] for name, each in real["spreads"].items()} if real else {}
    return {
        "study": study.name,
        "title": study.title,
        "command": _command(study, saved, seeds, {name for name, own in units.items() if own} | study.worked_on),
        "baseline": study.baseline,
        "evaluation": saved["evaluation"],
        "seeds": list(seeds),
        "statistics": f"{LEVEL:.0%} intervals (bootstrap, expanded percentile) from {LEAST_SEEDS} seeds on; none where "
        "one has diverged",
        "reference": real,
        "controls": controls,
        "variants": variants,
        CHOICES: [choice._asdict() for choice in choose(variants, means, seeds)] if study.config.choose else [],
        COSTS: saved.get(COSTS, {}),
        "environment": environment(),
    }


def render(results: Mapping[str, Any]) -> str:
    """The tables in Markdown: what each variant scores, and whether it is closer to real clips than the baseline."""
    variants = {name: each for name, each in results["variants"].items() if each["seeds"]}
    lines = [f"# {results['study']}", "", results["title"], ""]
    lines += [f"- {name} ({_progress(each, results['seeds'])}): {each['title']}" for name, each in variants.items()]
    if results["reference"] is None:
        return "\n".join([*lines, "", "Real clips are not measured yet, so nothing can be compared.", ""])
    spreads = {name: Spread(**each) for name, each in results["reference"]["spreads"].items()}
    # The clips themselves are of no use to a table.
    none = Encoded(torch.empty(0), torch.empty(0))
    reference = Reference(spreads, results["reference"]["sets"], results["evaluation"]["captions"], none)
    rows = [
        Row(
            _labelled(name, each),
            {key: found["mean"] for key, found in each["measures"].items()},
            {key: (found["low"], found["high"]) for key, found in each["measures"].items() if found["low"] is not None},
        )
        for name, each in variants.items()
        if each["measures"]
    ]
    controls = [Row(CONTROL_TITLES[name].title, values) for name, values in _controls(results).items()]
    lines += ["", f"## Means over seeds, with {results['statistics']}", "", markdown_table(rows, reference, controls)]
    names = headlines(spreads)
    lines += [
        "## How much farther from real than another variant",
        "",
        "Mean over seeds of the distance to real clips less that of the variant in the second column: below 0 is "
        "closer than that one. In bold where the interval excludes 0.",
        "",
        f"| | than | {' | '.join(name.replace('_', ' ') for name in names)} |",
        f"| --- | --- |{' --: |' * len(names)}",
    ]
    for name, each in variants.items():
        found = {key: values.get("against_baseline") for key, values in each["measures"].items()}
        if any(found.values()):
            differences = " | ".join(_difference(found[key], spreads[key]) for key in names)
            lines.append(f"| {name} | {each['against']} | {differences} |")
    means = {name: spread.mean for name, spread in spreads.items()}
    if results["controls"] and (judged := monitor_table(variants, means, _controls(results))):
        lines += [
            "",
            "## What the monitor says of the students, and whether it is right",
            "",
            "Of so many seeds. Is so at the end: by pixels, more than half as far from real clips as the control. "
            "Right: nothing is missed, and nothing else is said. While training batches are small and weights are not "
            "averaged, and what was found then may be over by the end.",
            "",
            *judged,
        ]
    if results[CHOICES]:
        lines += ["", "## Which setting each method gets", "", *_choices(results)]
    if results[COSTS]:
        lines += ["", "## What a step costs, and how many each student had", "", *_costs(results)]
    return "\n".join(lines) + "\n"


def _choices(results: Mapping[str, Any]) -> list[str]:
    lines = [
        f"Of each method the lowest mean rank, among its settings, of the distance to real clips in the headline "
        f"measures; of n settings those within {NEAR:g} (n - 1) of the lowest, and of these the nearest in saturation. "
        "Without settings of which a seed diverged, and over the seeds that all others have. As long as seeds are "
        "missing, this is a guess.",
        "",
        "| | chosen | mean ranks | diverged | seeds |",
        "| --- | --- | --- | --- | --- |",
    ]
    for each in results[CHOICES]:
        ranks = ", ".join(f"{name} {rank:.2f}" for name, rank in each["ranks"].items())
        seeds = ", ".join(map(str, each["seeds"])) + ("" if each["complete"] else " (some are missing)")
        lines.append(
            f"| {each['method']} | {each['chosen'] or 'none'} | {ranks} | {', '.join(each['diverged'])} | {seeds} |"
        )
    return lines


def _costs(results: Mapping[str, Any]) -> list[str]:
    lines = [
        "Forward equivalents of all examples of a batch, a backward pass counted as two; seconds of one process, "
        "measured when the study began; memory in tensors on a GPU, computed. Steps are those for equal forwards, but "
        "for what goes on from another student, which has its own.",
        "",
        "| | forwards | seconds | memory, MB | steps | steps for equal seconds |",
        "| --- | --: | --: | --: | --: | --: |",
    ]
    for name, cost in results[COSTS].items():
        steps = [
            f"{variant['values']['max_steps']}" if (variant := results["variants"].get(each)) else ""
            for each in (name, name + SECONDS)
        ]
        lines.append(
            f"| {name} | {cost['forwards']:g} | {_blank(cost['seconds'])} | {cost['memory']:g} | {' | '.join(steps)} |"
        )
    return lines


def _blank(seconds: float | None) -> str:
    return "" if seconds is None else f"{seconds:.3g}"


def _title(study: Study, name: str) -> str:
    own = study.titles[name.removesuffix(SECONDS)]
    return own if name == name.removesuffix(SECONDS) else f"{own} For as many seconds as {study.config.budget_of}."


def _told(found: Estimate, *variants: Mapping[int, Mapping[str, Any]]) -> dict[str, Any]:
    """An estimate as plain values; without an interval where a seed diverged, since those left are the better ones."""
    diverged = any("failed" in unit for units in variants for unit in units.values())
    return (found._replace(low=None, high=None) if diverged else found)._asdict()


def _command(study: Study, saved: Mapping[str, Any], seeds: Sequence[int], variants: Set[str]) -> str:
    """What would do it again, in the shell's words."""
    words = ["avd", "study", study.source, "--output", "DIR", "--seeds", ",".join(map(str, seeds))]
    variants = {name.removesuffix(SECONDS) for name in variants}
    if variants < set(study.config.variants):
        words += ["--variants", ",".join(name for name in study.config.variants if name in variants)]
    for override in saved[OVERRIDES]:
        words += ["--set", override]
    if study.asked_baseline is not None:
        words += ["--baseline", study.asked_baseline]
    return shlex.join(words)


def _controls(results: Mapping[str, Any]) -> Mapping[str, Mapping[str, float]]:
    return results["controls"]["controls"] if results["controls"] else {}


def _read(folder: Path, unit: Unit) -> dict[str, Any] | None:
    file = result_file(folder, unit)
    return read_json(file) if file.exists() else None


def _mean(unit: Mapping[str, Any]) -> dict[str, float]:
    return {name: fmean(each[name] for each in unit["noises"]) for name in unit["noises"][0]}


def _column(values: Mapping[int, Mapping[str, float]], measure: str) -> dict[int, float]:
    return {seed: each[measure] for seed, each in values.items() if measure in each}


def _progress(variant: Mapping[str, Any], seeds: Sequence[int]) -> str:
    failed = sum("failed" in unit for unit in variant["seeds"].values())
    diverged = f", {failed} diverged" if failed else ""
    return f"{len(variant['seeds'])} of {len(seeds)} seeds{diverged}"


def _labelled(name: str, variant: Mapping[str, Any]) -> str:
    """A variant's name; with the number of students that its means are over, where some have diverged."""
    values = [unit for unit in variant["seeds"].values() if "failed" not in unit]
    return name if len(values) == len(variant["seeds"]) else f"{name} (n = {len(values)})"


def _difference(found: Mapping[str, Any] | None, real: Spread) -> str:
    if found is None:
        return ""
    places = real.decimals
    text = f"{found['mean']:+.{places}f}"
    if found["low"] is None:
        return f"{text} (n = {found['seeds']})"
    text = f"{text} [{found['low']:+.{places}f}, {found['high']:+.{places}f}]"
    return f"**{text}**" if found["low"] > 0 or found["high"] < 0 else text
