"""``avd methods``: which there are."""

from __future__ import annotations

from rich.console import Console
from rich.table import Column, Table

from avd_trainer.methods.registry import list_methods


def methods() -> None:
    """List the methods that avd train knows: what each does, its paper, what it needs, and what an update costs.

    Forwards are those of transformers for each example, a backward pass counted as two.
    """
    table = Table(Column("--method", no_wrap=True), "what it does, its paper, what it needs", show_lines=True)
    for method in list_methods():
        cost = f"; {method.forwards:g} forwards" if method.forwards else ""
        table.add_row(method.kind, f"{method.summary}\n{method.paper}\n{', '.join(method.needs)}{cost}")
    Console().print(table)
