"""What all figures share: a colour for each of those that are compared, and how a file is written."""

from __future__ import annotations

from pathlib import Path

import matplotlib.pyplot as plt
from matplotlib.figure import Figure

COLORS = {"real": "#333333", "teacher": "#8a8a8a", "dmd": "#c2452d", "avd": "#2b6cb0"}
STEP_COLORS = ("#1b2a49", "#2b6cb0", "#3f9b8f", "#b08d2b", "#8a4fa3", "#777777")
"""Of the few steps, in order."""


def write_png(figure: Figure, path: Path) -> None:
    """Write a figure as PNG, and close it; the file is either the old or the new one, never half."""
    part = path.with_name(path.name + ".part")
    figure.savefig(part, dpi=100, format="png")
    plt.close(figure)
    part.replace(path)
