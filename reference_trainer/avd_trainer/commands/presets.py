"""``avd presets``: which there are."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from avd_trainer.config.loading import default_method, describe_preset
from avd_trainer.config.loading import presets as find_presets


def presets() -> None:
    """List the presets that avd train knows, with the methods that each has values for."""
    table = Table("PRESET", "--method", "what it is")
    for name, methods in find_presets().items():
        for method in methods:
            default = " (default)" if len(methods) > 1 and method == default_method(methods) else ""
            table.add_row(name, method + default, describe_preset(name, method))
    Console().print(table)
