"""Fig. 13 of You et al. 2026 with what was measured: the adaptive weight, and the deviations that it judged."""

from __future__ import annotations

import math
import textwrap
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from statistics import fmean
from typing import Any

import matplotlib

from avd_trainer.evaluation.palette import COLORS, STEP_COLORS, write_png
from avd_trainer.training.metrics_log import read_series

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes

QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
COLUMNS = 3


def read_deviations(metrics: Path) -> dict[str, list[float]]:
    """How far what the weight judges lay from its mean, in the unit of Eq. 7's sigmoid, by few step.

    Args:
        metrics: A run's ``metrics.jsonl``.

    Returns:
        The 5, 25, 50, 75 and 95% quantiles over all clips of the run by timestep, falling; empty without a regression.
    """
    steps: dict[float, list[float]] = defaultdict(list)
    timesteps, means = (_read_lists(metrics, name) for name in ("timesteps", "means"))
    judged = _read_lists(metrics, "judged") or _read_lists(metrics, "sample_losses")
    absolute = [[a - b for a, b in zip(*each, strict=True)] for each in zip(judged, means, strict=True)]
    deviations = _read_lists(metrics, "deviations") or absolute
    for of_step, values in zip(timesteps, deviations, strict=True):
        for timestep, value in zip(of_step, values, strict=True):
            if math.isfinite(value):
                steps[timestep].append(value)
    return {f"{step:g}": np.quantile(steps[step], QUANTILES).tolist() for step in sorted(steps, reverse=True)}


def save_deviations(path: Path, results: Mapping[str, Any]) -> None:
    """Draw a panel for each variant with a regression; no file where there is none."""
    variants = {name: each for name, each in results["variants"].items() if _deviations(each)}
    if not variants:
        return
    columns = min(COLUMNS, len(variants))
    rows = math.ceil(len(variants) / columns)
    figure, axes = plt.subplots(rows, columns, figsize=(5 * columns, 3.4 * rows), layout="constrained", squeeze=False)
    title = (
        "The weight of Eq. 7 over the deviation. Below it, by few step, the deviations that the runs had: 5 to 95% of "
        "the clips, 25 to 75%, and the median; mean over seeds."
    )
    figure.suptitle(textwrap.fill(title, 55 * columns), fontsize=10)
    for axis, (name, each) in zip(axes.flat, variants.items(), strict=False):
        axis.set_title(name, fontsize=9)
        method = each["values"]["method"]
        regression = method.get("regression") or method["avd"]["regression"]  # method avd's own, or on top of another
        _draw_panel(axis, _deviations(each), regression["sharpness"])
    for axis in axes.flat[len(variants) :]:
        axis.axis("off")
    write_png(figure, path)


def _read_lists(metrics: Path, name: str) -> list[list[float]]:
    return [values for values in read_series(metrics, f"regression/{name}") if isinstance(values, list)]


def _deviations(variant: Mapping[str, Any]) -> dict[str, list[float]]:
    """The quantiles of a variant, as means over its seeds."""
    found = [unit["deviations"] for unit in variant["seeds"].values() if unit.get("deviations")]
    return {
        step: [fmean(values) for values in zip(*(each[step] for each in found if step in each), strict=True)]
        for step in sorted({step for each in found for step in each}, key=float, reverse=True)
    }


def _draw_panel(axis: Axes, deviations: Mapping[str, list[float]], sharpness: float) -> None:
    reach = 1.1 * max(0.1, *(abs(value) for values in deviations.values() for value in values))
    over = np.linspace(-reach, reach, 200)
    axis.plot(over, 1 / (1 + np.exp(sharpness * over)), color=COLORS["avd"], label=f"weight / w_reg, k = {sharpness:g}")
    for place, ((step, values), color) in enumerate(zip(deviations.items(), STEP_COLORS, strict=False), 1):
        low, lower, middle, upper, high = values
        axis.hlines(-0.12 * place, low, high, color=color, linewidth=1, label=f"t = {step}")
        axis.hlines(-0.12 * place, lower, upper, color=color, linewidth=4)
        axis.plot(middle, -0.12 * place, "|", color="white", markersize=8)
    axis.set_yticks([0, 0.5, 1])
    axis.legend(fontsize=7)
