"""The figure of a study: a panel for each headline measure, and in it every seed of every variant as a dot."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from textwrap import fill
from typing import Any

import matplotlib

from avd_trainer.evaluation.measures import ALL_MEASURES, Measure, headlines
from avd_trainer.evaluation.palette import COLORS, write_png

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes

COLUMNS = 5
# Inches, of a panel and of a row in it: names at the left of a row stay readable however many there are.
PANEL_WIDTH, NAMES_WIDTH, ROW_HEIGHT, TITLE_HEIGHT = 2.9, 1.6, 0.17, 0.75
# Dots of one variant lie one above the other, in the order of seeds.
HEIGHT_OF_DOTS = 0.5
# How far a panel reaches beyond dots and real clips, relative to their own range.
MARGIN = 0.1
# Dots farther from the middle half of all dots than so many times its width are arrows, so that a variant that fails
# does not hide how all others differ.
FAR = 4.0


def save_figure(path: Path, results: Mapping[str, Any]) -> None:
    """Draw the results of :func:`avd_trainer.studies.summary.summarise`; a file that is there is replaced at once."""
    names = headlines({name: 0 for each in results["variants"].values() for name in each["measures"]})
    save_panels(path, results, {name: ALL_MEASURES[name] for name in names}, "seeds")


def save_panels(path: Path, results: Mapping[str, Any], measures: Mapping[str, Measure], dots: str) -> None:
    """Draw some measures of such results; ``dots`` says what has the place of seeds in them."""
    variants = {key: each for key, each in results["variants"].items() if each["measures"]}
    controls = results["controls"]["controls"] if results["controls"] else {}
    names = [*variants, *controls]
    columns = min(COLUMNS, max(1, len(measures)))
    rows = max(1, math.ceil(len(measures) / columns))  # of a study that has measured nothing yet, an empty one
    size = (NAMES_WIDTH + PANEL_WIDTH * columns, 0.8 + rows * (TITLE_HEIGHT + ROW_HEIGHT * len(names)))
    figure, axes = plt.subplots(rows, columns, figsize=size, layout="constrained", squeeze=False, sharey=True)
    figure.suptitle("\n".join(_explain(results, variants, dots)))
    for axis, measure in zip(axes.flat, measures.values(), strict=False):
        _draw_panel(axis, measure, results["reference"], variants, controls)
    for axis in axes.flat[len(measures) :]:
        axis.axis("off")
    for axis in axes[:, 0]:
        axis.set_yticks(range(len(names)), names, fontsize=8)
        for label in axis.get_yticklabels()[len(variants) :]:
            label.set_color(COLORS["teacher"])
    axes[0, 0].set_ylim(len(names) - 0.4, -0.6)  # the first at the top
    write_png(figure, path)


def _explain(results: Mapping[str, Any], variants: Mapping[str, Any], dots: str) -> list[str]:
    lines = [results["title"], f"Dots: {dots}; bars: mean and interval; arrows: far off."]
    if len({_color(each) for each in variants.values()}) > 1:
        lines[-1] += " Blue: with AVD's terms; red: without; grey: not trained."
    if results["reference"]:
        lines[-1] += " Green: 95% of the sets of real clips. Crosses: real clips that were spoiled."
    return lines


def _draw_panel(
    axis: Axes,
    measure: Measure,
    reference: Mapping[str, Any] | None,
    variants: Mapping[str, Any],
    controls: Mapping[str, Mapping[str, float]],
) -> None:
    name = measure.name
    axis.set_title(fill(measure.title, 34), fontsize=9)
    axis.grid(axis="y", linewidth=0.3)
    axis.tick_params(labelsize=8)
    axis.locator_params(axis="x", nbins=4)
    axis.ticklabel_format(axis="x", useOffset=False)
    values = [[unit["values"][name] for unit in each["seeds"].values() if unit["values"]] for each in variants.values()]
    spread = reference["spreads"][name] if reference else None
    low, high = _limits([value for own in values for value in own], spread)
    axis.set_xlim(low, high)
    for place, (each, own) in enumerate(zip(variants.values(), values, strict=True)):
        offsets = np.linspace(-HEIGHT_OF_DOTS / 2, HEIGHT_OF_DOTS / 2, len(own)) if len(own) > 1 else [0.0]
        for value, offset in zip(own, offsets, strict=True):
            _draw_value(axis, value, place + offset, "o", _color(each), 3.5)
        found = each["measures"][name]
        axis.vlines(found["mean"], place - 0.35, place + 0.35, color="black", linewidth=1.3)
        if found["low"] is not None:
            axis.hlines(place, found["low"], found["high"], color="black", linewidth=1.0)
    if spread is not None:
        axis.axvspan(spread["low"], spread["high"], color="tab:green", alpha=0.25, linewidth=0)
        axis.axvline(spread["mean"], color="tab:green", linewidth=0.8)
    for place, own_values in enumerate(controls.values(), len(variants)):
        _draw_value(axis, own_values[name], place, "x", COLORS["teacher"], 4.5)


def _draw_value(axis: Axes, value: float, place: float, marker: str, color: str, size: float) -> None:
    """A marker; an arrow at the edge where it lies beyond."""
    low, high = axis.get_xlim()
    shown = min(max(value, low), high)
    marker = marker if shown == value else ">" if value > high else "<"
    axis.plot(shown, place, marker, markersize=size, color=color, alpha=0.8, clip_on=False)


def _limits(values: Sequence[float], spread: Mapping[str, float] | None) -> tuple[float, float]:
    """Of a panel: all dots but those that lie far off, and real clips."""
    first, third = np.quantile(values, [0.25, 0.75])
    reach = FAR * (third - first)
    near = [value for value in values if first - reach <= value <= third + reach or reach == 0]
    if spread is not None:
        near += [spread["low"], spread["high"]]
    margin = MARGIN * (max(near) - min(near)) or 1e-3
    return min(near) - margin, max(near) + margin


def _color(variant: Mapping[str, Any]) -> str:
    """By what a variant is: a method alone, one with AVD's terms, or nothing that is trained."""
    values = variant.get("values", {})
    if "teacher_of" in values:
        return COLORS["teacher"]
    method = values.get("method")
    alone = method is not None and method["kind"] != "avd" and not method.get("avd")
    return COLORS["dmd" if alone else "avd"]
