"""The report of a demo: frames, what the measures say, and the curves of training below."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib

from avd_trainer.evaluation.palette import COLORS, write_png

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import SubFigure
from matplotlib.transforms import Bbox
from torch import Tensor

from avd_trainer.evaluation.controls import CONTROLS
from avd_trainer.evaluation.measures import ALL_MEASURES
from avd_trainer.evaluation.reference import is_worse
from avd_trainer.studies.curves import draw_curves, plain
from avd_trainer.studies.findings import TITLES, Findings
from avd_trainer.studies.pictures import draw_strip
from avd_trainer.studies.verdict import plain_name, summarize

CLIPS_PER_SHEET = 3
FRAMES_PER_CLIP = 5
PANELS_PER_ROW = 5
WIDTH = 15.0
OUTSIDE = "#c2452d"
TWO_LINES = 1.8
"""Of the table, in heights of its other rows."""
GOALS = {"higher": "higher is better", "lower": "lower is better", "as real": "as in real clips"}
"""In words, by :attr:`Measure.better`."""


def save_report(
    path: Path,
    videos: Mapping[str, Tensor],
    captions: Sequence[str],
    findings: Findings,
    histories: Mapping[str, Path],
    timesteps: Sequence[float],
    floor: float | None,
    real: Mapping[str, float],
) -> None:
    """Draw ``report.png``.

    Args:
        path: File to write.
        videos: Per row ``[N, 3, F, H, W]`` decoded clips; all rows in the order of ``captions``.
        captions: Of the clips, the same in all rows.
        findings: What was measured.
        histories: Files of training metrics of ``dmd`` and ``avd``.
        timesteps: The few steps.
        floor: Floor of the motion term, if there is one.
        real: As for :func:`draw_curves`.
    """
    headlines = findings.headlines
    panels = -(-len(headlines) // PANELS_PER_ROW)
    table_rows = 2 + len(findings.rows) + len(findings.controls)
    heights = (5.0, 0.9, 1.6 * panels + 0.3, 0.22 * table_rows + 0.7, 5.0)
    figure = plt.figure(figsize=(WIDTH, sum(heights)), layout="constrained")
    sheet, words, dots, table, curves = figure.subfigures(len(heights), 1, height_ratios=heights)  # type: ignore[misc]
    _draw_sheet(sheet, videos, captions)
    words.text(0.01, 0.5, textwrap.fill(summarize(findings), 170), fontsize=12, va="center")
    _draw_dots(dots, findings, panels)
    _draw_table(table, findings)
    draw_curves(curves, histories, TITLES, timesteps, floor, real)
    write_png(figure, path)


def _draw_sheet(figure: SubFigure, videos: Mapping[str, Tensor], captions: Sequence[str]) -> None:
    axes = figure.subplots(len(videos), CLIPS_PER_SHEET, squeeze=False, gridspec_kw={"wspace": 0.04, "hspace": 0.02})
    for number, (row, (name, video)) in enumerate(zip(axes, videos.items(), strict=True)):
        for column, axis in enumerate(row):
            axis.axis("off")
            if column >= len(video):
                continue
            axis.imshow(np.asarray(draw_strip(video[column], FRAMES_PER_CLIP)))
            if number == 0:
                axis.set_title(textwrap.fill(captions[column], 62), fontsize=10, color="#333333", loc="left")
        row[0].text(
            -0.02, 0.5, TITLES[name], transform=row[0].transAxes, rotation=90, ha="right", va="center",
            fontsize=12, color=COLORS[name], fontweight="bold",
        )  # fmt: skip
    figure.suptitle(
        "Frames of decoded clips, time to the right. Real ones are held out from training; models share one noise.",
        fontsize=11,
    )


def _draw_dots(figure: SubFigure, findings: Findings, panels: int) -> None:
    """A panel for each headline measure: a dot per row, and the band in which real clips lie."""
    axes = figure.subplots(panels, PANELS_PER_ROW, squeeze=False).flatten()
    for axis in axes[len(findings.headlines) :]:
        axis.axis("off")
    names = list(findings.rows)
    for number, (axis, measure) in enumerate(zip(axes, findings.headlines, strict=False)):
        spread = findings.reference.spreads[measure]
        axis.axvspan(spread.mean - 2 * spread.std, spread.mean + 2 * spread.std, color="#cccccc", alpha=0.7)
        axis.axvline(spread.mean, color=COLORS["real"], linewidth=0.8, linestyle=":")
        values = [findings.rows[name][measure] for name in names]
        places = range(len(names), 0, -1)
        axis.scatter(values, places, color=[COLORS[name] for name in names], s=45, zorder=3)
        for value, place in zip(values, places, strict=True):
            axis.annotate(_number(value), (value, place), (0, 5), textcoords="offset points", ha="center", fontsize=8)
        axis.set_yticks(list(places), [TITLES[name] for name in names] if number % PANELS_PER_ROW == 0 else [])
        axis.set_ylim(0.5, len(names) + 0.8)
        axis.margins(x=0.15)
        title = textwrap.fill(f"{plain_name(measure)}: {ALL_MEASURES[measure].title}", 38)
        axis.set_title(f"{title}\n({GOALS[ALL_MEASURES[measure].better]})", fontsize=9)
        plain(axis)
    figure.suptitle("Grey: sets of real clips, their mean with two standard deviations", fontsize=11)


def _draw_table(figure: SubFigure, findings: Findings) -> None:
    """All rows and the controls; what lies outside of the real clips' band is red."""
    axis: Axes = figure.subplots()
    axis.axis("off")
    measures = findings.headlines
    spreads = findings.reference.spreads
    reference = [f"{_number(spreads[name].mean)}\n± {spreads[name].std:.1g}" for name in measures]
    rows = {TITLES[name]: values for name, values in findings.rows.items()}
    rows |= {CONTROLS[name].title: values for name, values in findings.controls.items()}
    cells = [reference, *([_number(values[name]) for name in measures] for values in rows.values())]
    titles = [textwrap.fill(plain_name(name), 12) for name in measures]
    table = axis.table(
        cells, rowLabels=["Real", *rows], colLabels=titles, cellLoc="center", bbox=Bbox.from_bounds(0.14, 0, 0.85, 1)
    )
    table.auto_set_font_size(False)
    table.set_fontsize(8.5)
    for (row, _), cell in table.get_celld().items():
        cell.set_linewidth(0.3)
        cell.set_height(TWO_LINES if row <= 1 else 1.0)
    for number, values in enumerate(rows.values(), start=2):
        for column, name in enumerate(measures):
            if is_worse(name, values[name], spreads[name]):
                table[number, column].get_text().set_color(OUTSIDE)
    figure.suptitle(
        "Below the models: controls, which are known to be wrong. Red: worse than real clips, beyond their spread.",
        fontsize=11,
    )


def _number(value: float) -> str:
    """Three digits; what is as good as zero is not written as 4e-10."""
    return f"{value:.3g}" if abs(value) >= 5e-4 else "0"
