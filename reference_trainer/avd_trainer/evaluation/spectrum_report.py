"""Spectra of blocks as a table and as violins."""

from __future__ import annotations

import textwrap
from pathlib import Path
from typing import Any, Literal

import matplotlib
import torch
from torch import Tensor

from avd_trainer.evaluation.spectrum import CRITERION, Spectra, SpectrumReport

matplotlib.use("Agg")

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from rich.table import Table

from avd_trainer.evaluation.palette import COLORS, write_png

# Of clips and channels; violins of more look no different and take minutes.
_DRAWN = 4000


def render(report: SpectrumReport) -> Table:
    """Separations for a terminal, and which blocks are recommended and published."""
    table = Table(
        title="Real and generated clips apart, by block and timestep", caption=CRITERION, caption_justify="left"
    )
    timesteps = [f"{level.timestep:.0f}" for level in report.blocks[0].levels]
    for name in ("block", *timesteps, "all", "chance"):
        table.add_column(name, justify="right")
    for name in ("best", "published"):
        table.add_column(name, justify="center")
    for each in report.blocks:
        figures = [f"{level.separation:.2f}" for level in each.levels]
        marks = ["*" if each.block in blocks else "" for blocks in (report.recommended, report.published)]
        table.add_row(str(each.block), *figures, f"{each.separation:.2f}", f"{each.chance:.3f}", *marks)
    return table


def save_violins(path: Path, spectra: Spectra, title: str) -> None:
    """Draw the roll-offs of each block, real clips to the left and generated ones to the right, a row a noise level."""
    report = spectra.report
    width = max(7.0, 1.5 + 0.6 * len(report.blocks))
    rows = len(spectra.real)
    figure, axes = plt.subplots(
        rows, 1, figsize=(width, 1.5 + 1.6 * rows), sharex=True, squeeze=False, layout="constrained"
    )
    for axis, (level, real) in zip(axes.flat, spectra.real.items(), strict=True):
        _draw(axis, real, "real", "low")
        _draw(axis, spectra.generated[level], "avd", "high")
        for block in report.recommended:
            axis.axvspan(block - 0.5, block + 0.5, color=COLORS["teacher"], alpha=0.2, linewidth=0)
        axis.set_ylabel(f"t = {level:.0f}", fontsize=9)
        axis.tick_params(labelsize=8)
        axis.spines[["top", "right"]].set_visible(False)
    # A title is as wide as the axes, where some 11 letters go on an inch; a path has no spaces to break at.
    named = textwrap.fill(title, int(11 * (width - 1)))
    axes.flat[0].set_title(f"Roll-off of block outputs, cycles per token\n{named}", fontsize=10)
    axes.flat[-1].set_xticks(range(len(report.blocks)))
    axes.flat[-1].set_xlabel("block (left real, right generated; shaded: recommended)", fontsize=9)
    write_png(figure, path)


def _draw(axis: Axes, values: Tensor, color: str, side: Literal["low", "high"]) -> None:
    """One half of each block's violin; ``values`` are ``[K, N, D]``."""
    flat = values.flatten(1)
    # Some by chance: at regular distances they would all be of a few channels.
    chosen = torch.randperm(flat.shape[1], generator=torch.Generator().manual_seed(0))[:_DRAWN]
    drawn = flat[:, chosen].double().numpy()
    bodies: Any = axis.violinplot(
        [*drawn], range(len(drawn)), widths=0.9, side=side, showextrema=False, showmedians=True
    )
    for body in bodies["bodies"]:
        body.set_facecolor(COLORS[color])
        body.set_alpha(0.6)
    bodies["cmedians"].set_color(COLORS[color])
