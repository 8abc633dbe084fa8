"""Colours of figures: what is compared has the same in all of them."""

COLORS = {"real": "#333333", "teacher": "#8a8a8a", "dmd": "#c2452d", "avd": "#2b6cb0"}
"""By whose clips they are."""
