"""Similarities as a table and as violins."""

from __future__ import annotations

import math
import textwrap
from pathlib import Path
from typing import Any

import matplotlib

from avd_trainer.evaluation.similarity import CRITERION, QUANTILES, Similarities, SimilarityReport

matplotlib.use("Agg")

import matplotlib.pyplot as plt
from rich.table import Table

from avd_trainer.evaluation.palette import COLORS, write_png


def render(report: SimilarityReport) -> Table:
    """The numbers for a terminal, and how each step was decided."""
    table = Table(title="Similarity of adjacent frames", caption=CRITERION, caption_justify="left")
    for name in ("t", "median", *QUANTILES):
        table.add_column(name, justify="right")
    table.add_column("half rate: error, later change")
    for step in report.steps:
        sign, verdict = ("<=", "yes") if step.supports_half_rate else (">", "no")
        table.add_row(
            f"{step.timestep:.0f}",
            *(f"{figure:.3f}" for figure in (step.median, *step.quantiles.values())),
            f"{verdict}: {step.reinsertion_error:.3g} {sign} {step.remaining_change:.3g}",
        )
    return table


def save_violins(path: Path, similarities: Similarities, title: str) -> None:
    """Draw Fig. 15 of the paper, and below it what decides on half rate."""
    steps = similarities.report.steps
    places = list(range(len(steps)))
    width = max(6.0, 1.5 + 0.5 * len(steps))
    figure, (violins, costs) = plt.subplots(2, 1, figsize=(width, 7), sharex=True, layout="constrained")
    bodies: Any = violins.violinplot([row.numpy() for row in similarities.values], places, widths=0.8, showmedians=True)
    for body in bodies["bodies"]:
        body.set_facecolor(COLORS["avd"])
    # A title is as wide as the axes, where some 11 letters go on an inch; a path has no spaces to break at.
    title = textwrap.fill(title, int(11 * (width - 1)))
    violins.set_title(f"Adjacent frames of the clean prediction\n{title}", fontsize=10)
    violins.set_ylabel("cosine similarity", fontsize=9)
    for name, label, color in (
        ("reinsertion_error", "error of linear re-insertion", COLORS["dmd"]),
        ("remaining_change", "what later steps change", COLORS["avd"]),
    ):
        roots = [math.sqrt(getattr(step, name)) for step in steps]
        costs.plot(places, roots, color=color, marker="o", markersize=4, label=label)
    supported = similarities.report.half_rate_steps
    costs.axvspan(-0.5, supported - 0.5, color=COLORS["teacher"], alpha=0.2, linewidth=0)
    costs.set_title(
        f"The frames that half rate leaves out\n(shaded: it is supported at the first {supported} steps)", fontsize=10
    )
    costs.set_ylabel("root mean square", fontsize=9)
    costs.set_xlabel("timestep", fontsize=9)
    costs.set_xticks(places, [f"{step.timestep:.0f}" for step in steps])
    costs.legend(fontsize=8, frameon=False)
    for axis in (violins, costs):
        axis.tick_params(labelsize=8)
        axis.spines[["top", "right"]].set_visible(False)
    write_png(figure, path)
