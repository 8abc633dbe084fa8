"""``avd methods``: which there are."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from avd_trainer.methods.registry import list_methods


def methods() -> None:
    """List the methods that avd train knows, with what each does and its paper."""
    table = Table("--method", "what it does", "paper")
    for method in list_methods():
        table.add_row(method.kind, method.summary, method.paper)
    Console().print(table)
