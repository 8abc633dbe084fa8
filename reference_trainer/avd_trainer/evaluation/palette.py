"""Colours of figures: one for each of those that are compared, the same in all of them."""

from __future__ import annotations

COLORS = {"real": "#333333", "teacher": "#8a8a8a", "dmd": "#c2452d", "avd": "#2b6cb0"}
STEP_COLORS = ("#1b2a49", "#2b6cb0", "#3f9b8f", "#b08d2b", "#8a4fa3", "#777777")
"""Of the few steps, in order."""
