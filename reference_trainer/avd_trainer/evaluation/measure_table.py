"""Measures as a table: real clips first, then what is compared, then the controls."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from rich.table import Table

from avd_trainer.evaluation.measures import ALL_MEASURES, headlines
from avd_trainer.evaluation.reference import LIMIT_SHARE, LIMIT_STDS, Reference, Spread, is_worse

GOALS = {"higher": "high", "lower": "low", "as real": "as real"}


@dataclass(frozen=True)
class Row:
    """One set of clips in a table.

    Attributes:
        title: What was measured.
        values: By name of the measure; a measure that is missing leaves its cell empty.
        intervals: Of values that have one, from and to.
    """

    title: str
    values: Mapping[str, float]
    intervals: Mapping[str, tuple[float, float]] = field(default_factory=dict)


def markdown_table(
    rows: Sequence[Row], reference: Reference, controls: Sequence[Row] = (), *, names: Sequence[str] | None = None
) -> str:
    """The table in Markdown, and below it how to read it.

    Args:
        rows: What is compared.
        reference: What real clips score. Values outside it have an exclamation mark.
        controls: Real clips that were spoiled.
        names: Which measures; the headline ones by default.
    """
    names = _names(reference, names)
    table = markdown_lines(
        [_heading(name) for name in names],
        [
            ["real", *_reference_cells(reference, names)],
            *([row.title, *_cells(row, reference, names)] for row in rows),
            *([f"*{row.title}*", *_cells(row, reference, names)] for row in controls),
        ],
    )
    return f"{table}\n\n{_caption(reference)}\n"


def markdown_lines(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table whose rows begin with their titles."""
    lines = [["", *headings], ["---", *("--:" for _ in headings)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def rich_table(
    rows: Sequence[Row], reference: Reference, *, names: Sequence[str] | None = None, title: str | None = None
) -> Table:
    """The same for a terminal, a measure a line, without controls, which would not fit beside a few rows' columns.

    Arguments are those of :func:`markdown_table`.
    """
    names = _names(reference, names)
    table = Table(title=title, caption=_caption(reference), caption_justify="left")
    table.add_column("")
    for heading in ("real", *(row.title for row in rows)):
        table.add_column(heading, justify="right")
    columns = [_reference_cells(reference, names), *(_cells(row, reference, names) for row in rows)]
    for name, *cells in zip(names, *columns, strict=True):
        table.add_row(_heading(name), *cells)
    return table


def _names(reference: Reference, names: Sequence[str] | None) -> Sequence[str]:
    return headlines(reference.spreads) if names is None else names


def _heading(name: str) -> str:
    return f"{name.replace('_', ' ')} ({GOALS[ALL_MEASURES[name].better]})"


def _reference_cells(reference: Reference, names: Sequence[str]) -> list[str]:
    return [with_spread(reference.spreads[name]) for name in names]


def _cells(row: Row, reference: Reference, names: Sequence[str]) -> list[str]:
    return [_cell(row, reference, name) if name in row.values else "" for name in names]


def _cell(row: Row, reference: Reference, name: str) -> str:
    return with_interval(row, name) + " !" * is_worse(name, row.values[name], reference.spreads[name])


def with_interval(row: Row, name: str) -> str:
    """A value, and its interval where it has one."""
    text = _number(row.values[name])
    if name in row.intervals:
        low, high = row.intervals[name]
        text += f" [{_number(low)}, {_number(high)}]"
    return text


def with_spread(spread: Spread) -> str:
    """What real clips have."""
    return f"{_number(spread.mean)} ± {spread.std:.1g}"


def _number(value: float) -> str:
    return f"{value:.3f}" if abs(value) < 10 else f"{value:.1f}"


def _caption(reference: Reference) -> str:
    return (
        f"real: mean ± standard deviation of {reference.sets} sets of {reference.clips} real clips.\n"
        f"!: worse than real clips by more than {LIMIT_STDS:.0f} standard deviations and {LIMIT_SHARE:.0%} of the mean."
    )
