"""What :class:`avd_core.CollapseMonitor` says of a student, and whether it is right.

The monitor sees latents alone. Whether it is right is judged in pixels, where it does not look: a student counts as
frozen, jittering, oversaturated or washed out if it is more than half as far from real clips as real clips that were
spoiled so.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from avd_core import CollapseMonitor, LatentStatistics
from avd_trainer.runtime.files import read_json

SIGNS: Mapping[str, tuple[str, str, float]] = {
    "frozen": ("temporal_frequency", "frozen", 0.5),
    "jitter": ("temporal_frequency", "shuffled", 0.5),
    "oversaturated": ("saturation", "saturated", 0.5),
    "washed_out": ("saturation", "saturated", -0.5),
}
"""By kind of finding: the measure that shows it, the control that has it, and the share of the way from real clips to
the control beyond which a student has it. Washed out is the way from saturated clips to real ones, gone on."""


def judge_samples(samples: Tensor, real: Tensor) -> list[str]:
    """Kinds of what the monitor finds in samples ``[N, C, F, h, w]``, given real clips, in latents."""
    monitor = CollapseMonitor(LatentStatistics.measure(real), every=1, grace=0)
    monitor.after_step(1, {"x_0": samples})
    return _kinds([finding.kind for finding in monitor.findings])


def read_findings(path: Path) -> list[str] | None:
    """Kinds of what the monitor found while a student was trained, as its run's ``findings.json`` says.

    None where it judged no samples: there finding nothing is no verdict.
    """
    if not path.exists():
        return None
    said = read_json(path)
    return _kinds([finding["kind"] for finding in said["findings"]]) if said["samples_judged"] else None


class Bound(NamedTuple):
    """Where a kind begins to be so.

    Attributes:
        measure: That shows it.
        value: Of that measure.
        above: Which side has it.
    """

    measure: str
    value: float
    above: bool


def bounds(real: Mapping[str, float], controls: Mapping[str, Any]) -> dict[str, Bound]:
    """By kind of finding, from measures of real clips and, by control, of spoiled ones."""
    made = {}
    for kind, (shown, control, share) in SIGNS.items():
        # Where clips choose their backgrounds, the plain mean would be of their choice too.
        measure = "saturation_shift" if shown == "saturation" and "saturation_shift" in real else shown
        way = share * (controls[control][measure] - real[measure])
        made[kind] = Bound(measure, real[measure] + way, way > 0)
    return made


def true_kinds(values: Mapping[str, float], real: Mapping[str, float], controls: Mapping[str, Any]) -> list[str]:
    """Which of them a student has.

    Args:
        values: Its measures.
        real: Those of real clips.
        controls: Those of spoiled real clips, by control.
    """
    return [
        kind
        for kind, (measure, bound, above) in bounds(real, controls).items()
        if (values[measure] > bound if above else values[measure] < bound)
    ]


def monitor_table(variants: Mapping[str, Any], real: Mapping[str, float], controls: Mapping[str, Any]) -> list[str]:
    """Lines of a table in Markdown: what the monitor says of each variant's students, and how often it is right."""
    lines = [
        "| | said at any time while training | said of samples | is so at the end | first is right | second is right |",
        "| --- | --- | --- | --- | --: | --: |",
    ]
    for name, variant in variants.items():
        judged = [unit for unit in variant["seeds"].values() if "monitor" in unit]
        if not judged:
            continue
        truth = [true_kinds(unit["values"], real, controls) for unit in judged]
        cells = []
        for key in ("while_training", "of_samples"):
            looked = [place for place, unit in enumerate(judged) if key in unit["monitor"]]
            said = [judged[place]["monitor"][key] for place in looked]
            right = sum(one == truth[place] for one, place in zip(said, looked, strict=True))
            cells.append((_count(said), f"{right} of {len(said)}") if said else ("", ""))
        (training, right_training), (samples, right_samples) = cells
        lines.append(f"| {name} | {training} | {samples} | {_count(truth)} | {right_training} | {right_samples} |")
    return lines if len(lines) > 2 else []


def _kinds(found: Sequence[str]) -> list[str]:
    """Those that clips can show, each once, in the order of ``SIGNS``."""
    return [kind for kind in SIGNS if kind in found]


def _count(said: Sequence[Sequence[str]]) -> str:
    counts = Counter(kind for each in said for kind in each)
    return ", ".join(f"{kind} {counts[kind]}" for kind in SIGNS if counts[kind]) or "nothing"
