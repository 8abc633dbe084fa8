"""Progress of long work: a bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import time
from collections.abc import Mapping
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

SECONDS_BETWEEN_LINES = 10.0

console = Console(stderr=True)


class ProgressBar:
    """Shows the progress of one piece of work on standard error; a context manager.

    Args:
        description: What is done.
        total: How often :meth:`advance` will be called.
    """

    def __init__(self, description: str, total: int) -> None:
        self._description, self._total, self._done = description, total, 0
        self._started = self._last_line = time.monotonic()
        self._bar: Progress | None = None
        self._task = TaskID(0)
        if console.is_terminal:
            self._bar = Progress(
                TextColumn("{task.description}"),
                BarColumn(bar_width=24),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                TimeRemainingColumn(),
                TextColumn("{task.fields[values]}"),
                console=console,
            )
            self._task = self._bar.add_task(description, total=total, values="")

    def advance(self, values: Mapping[str, float] | None = None) -> None:
        """One more is done; ``values`` are shown beside the bar."""
        self._done += 1
        shown = " ".join(f"{name} {value:.3g}" for name, value in (values or {}).items())
        if self._bar is not None:
            self._bar.update(self._task, advance=1, values=shown)
            return
        now = time.monotonic()
        if now - self._last_line >= SECONDS_BETWEEN_LINES or self._done == self._total:
            self._last_line = now
            left = (now - self._started) / self._done * (self._total - self._done)
            console.print(
                f"{self._description}: {self._done}/{self._total}, {left:.0f} s left {shown}".rstrip(), soft_wrap=True
            )

    def __enter__(self) -> Self:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()
