"""The figure of a study: a panel for each headline measure, and in it every seed of every variant as a dot."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from textwrap import fill
from typing import Any

import matplotlib

from avd_trainer.evaluation.measures import ALL_MEASURES, MEASURES, Measure, headlines
from avd_trainer.evaluation.palette import COLORS, write_png

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes

COLUMNS = 3
# Dots of one variant stand side by side, in the order of seeds.
WIDTH_OF_DOTS = 0.4
# How far a panel reaches beyond dots and real clips, relative to their own height.
MARGIN = 0.2


def save_figure(path: Path, results: Mapping[str, Any]) -> None:
    """Draw the results of :func:`avd_trainer.studies.summary.summarise`; a file that is there is replaced at once."""
    names = headlines({**MEASURES, **{name: 0 for each in results["variants"].values() for name in each["measures"]}})
    save_panels(path, results, {name: ALL_MEASURES[name] for name in names}, "seeds")


def save_panels(path: Path, results: Mapping[str, Any], measures: Mapping[str, Measure], dots: str) -> None:
    """Draw some measures of such results; ``dots`` says what has the place of seeds in them."""
    rows = math.ceil(len(measures) / COLUMNS)
    figure, axes = plt.subplots(rows, COLUMNS, figsize=(5 * COLUMNS, 3.2 * rows), layout="constrained", squeeze=False)
    figure.suptitle(
        f"{results['title']}\nDots: {dots}; bars: mean and interval."
        + " Green: 95% of the sets of real clips. Crosses: real clips that were spoiled; arrows: far off."
        * bool(results["reference"])
    )
    for axis, measure in zip(axes.flat, measures.values(), strict=False):
        _draw_panel(axis, measure, results)
    for axis in axes.flat[len(measures) :]:
        axis.axis("off")
    write_png(figure, path)


def _draw_panel(axis: Axes, measure: Measure, results: Mapping[str, Any]) -> None:
    name = measure.name
    variants = {key: each for key, each in results["variants"].items() if each["measures"]}
    axis.set_title(fill(measure.title, 44), fontsize=9)
    for place, each in enumerate(variants.values()):
        dots = [unit["values"][name] for unit in each["seeds"].values() if unit["values"]]
        offsets = np.linspace(-WIDTH_OF_DOTS / 2, WIDTH_OF_DOTS / 2, len(dots)) if len(dots) > 1 else [0.0]
        axis.plot(place + np.asarray(offsets), dots, "o", markersize=4, color=COLORS["avd"], alpha=0.7)
        found = each["measures"][name]
        axis.hlines(found["mean"], place - 0.3, place + 0.3, color="black", linewidth=1.5)
        if found["low"] is not None:
            axis.vlines(place, found["low"], found["high"], color="black", linewidth=1.0)
    if results["reference"]:
        spread = results["reference"]["spreads"][name]
        axis.axhspan(spread["low"], spread["high"], color="tab:green", alpha=0.25, linewidth=0)
        axis.axhline(spread["mean"], color="tab:green", linewidth=0.8)
    controls = results["controls"]["controls"] if results["controls"] else {}
    _draw_controls(axis, {control: values[name] for control, values in controls.items()}, len(variants))
    axis.set_xticks(range(len(variants) + len(controls)), [*variants, *controls], rotation=45, ha="right", fontsize=8)
    for label in axis.get_xticklabels()[len(variants) :]:
        label.set_color(COLORS["teacher"])


def _draw_controls(axis: Axes, controls: Mapping[str, float], start: int) -> None:
    """Crosses; those that lie far off are arrows at the edge, so that the variants can be told apart."""
    low, high = axis.get_ylim()
    margin = MARGIN * (high - low)
    low, high = low - margin, high + margin
    axis.set_ylim(low, high)
    for place, value in enumerate(controls.values(), start):
        marker = "x" if low <= value <= high else "^" if value > high else "v"
        shown = min(max(value, low), high)
        axis.plot(place, shown, marker, markersize=5, color=COLORS["teacher"], clip_on=False)
