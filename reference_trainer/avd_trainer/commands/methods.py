"""``avd methods``: which there are."""

from __future__ import annotations

from rich.console import Console
from rich.table import Column, Table

from avd_trainer.methods.registry import list_methods


def methods() -> None:
    """List the methods that avd train knows: what each does, its paper, what it needs, costs, and how it is sampled.

    Forwards are those of transformers for each example of an update, a backward pass counted as two; of several phases
    those of each. Steps are a student's: re-noise adds noise between them, ode goes straight on.
    """
    table = Table(Column("--method", no_wrap=True), "what it does, its paper, what it needs", show_lines=True)
    for method in list_methods():
        facts = [f"needs {', '.join(method.needs)}"]
        if method.forwards:
            facts.append(f"{', then '.join(f'{forwards:g}' for forwards in method.forwards)} forwards")
        if method.sampled:
            facts.append(method.sampled)
        table.add_row(method.kind, f"{method.summary}\n{method.paper}\n{'; '.join(facts)}")
    Console().print(table)
