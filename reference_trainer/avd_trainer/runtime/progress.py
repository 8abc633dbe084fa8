"""Progress of long work: a bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import resource
import sys
import time
from collections import deque
from collections.abc import Iterable, Mapping
from datetime import timedelta
from types import TracebackType
from typing import Self

from rich.console import Console, RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.text import Text

SECONDS_BETWEEN_LINES = 10.0
STEPS_OF_THROUGHPUT = 20
"""How many calls the throughput is taken over: few enough to show a change, enough to even out a checkpoint."""

console = Console(stderr=True)


class ProgressBar:
    """Shows the progress of one piece of work on standard error, with throughput, time left and peak memory.

    A context manager.

    Args:
        description: What is done.
        total: At how many calls of :meth:`advance` the work is done.
        start: How many of them are done already. Time left is reckoned from those that follow.
        samples: Examples that a call stands for, over all processes; with it the throughput is in samples.
        quiet: Show nothing; for all processes of a run but one.
    """

    def __init__(
        self, description: str, total: int, *, start: int = 0, samples: int | None = None, quiet: bool = False
    ) -> None:
        self._description, self._total, self._start, self._done = description, total, start, start
        self._samples, self._quiet = samples, quiet
        self._started = self._last_line = time.monotonic()
        self._recent = deque([self._started], maxlen=STEPS_OF_THROUGHPUT + 1)
        self._bar: _Bar | None = None
        self._task = TaskID(0)
        if console.is_terminal and not quiet:
            self._bar = _Bar(
                TextColumn("{task.description}"),
                BarColumn(bar_width=None),  # what the others leave
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                TextColumn("{task.fields[status]}"),
                console=console,
                expand=True,
            )
            self._task = self._bar.add_task(description, total=total, completed=start, status="", values="")

    def advance(self, values: Mapping[str, float] | None = None) -> None:
        """One more is done; ``values`` are shown below the bar."""
        self.reach(self._done + 1, values)

    def reach(self, done: int, values: Mapping[str, float] | None = None) -> None:
        """So many are done, by whomever; where it is no more than before, nothing happens."""
        if done <= self._done:
            return
        now = time.monotonic()
        self._recent.extend([now] * (done - self._done))
        self._done = done
        if self._quiet:
            return
        shown = " ".join(f"{name} {value:.3g}" for name, value in (values or {}).items())
        if self._bar is not None:
            status = f"{self._left(now)} left, {self._throughput()}, {_memory()}"
            self._bar.update(self._task, completed=self._done, status=status, values=shown)
        elif now - self._last_line >= SECONDS_BETWEEN_LINES or self._done == self._total:
            self._last_line = now
            progress = f"{self._description}: {self._done}/{self._total}, {self._left(now)} left"
            speed = f"({self._throughput()}, {_memory()})"
            console.print(" ".join(filter(None, [progress, shown, speed])), soft_wrap=True)

    def _left(self, now: float) -> str:
        per_call = (now - self._started) / (self._done - self._start)
        seconds = round(per_call * (self._total - self._done))
        return f"{seconds} s" if seconds < 100 else str(timedelta(seconds=seconds))

    def _throughput(self) -> str:
        seconds = max(self._recent[-1] - self._recent[0], 1e-9)
        per_second = (len(self._recent) - 1) / seconds
        return f"{per_second:.3g}/s" if self._samples is None else f"{per_second * self._samples:.3g} samples/s"

    def __enter__(self) -> Self:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()


class _Bar(Progress):
    """Values have a line of their own, so that a narrow terminal cuts them and not the counts."""

    def get_renderables(self) -> Iterable[RenderableType]:
        yield from super().get_renderables()
        for task in self.tasks:
            if values := task.fields["values"]:
                yield Text(values, no_wrap=True, overflow="ellipsis")


def peak_memory() -> int:
    """Bytes: the most that tensors took on the GPU if one is in use, otherwise the most that the process held."""
    torch = sys.modules.get("torch")  # imported by those who compute with it alone
    if torch is not None and torch.cuda.is_initialized():
        return int(torch.cuda.max_memory_allocated())
    held = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return held if sys.platform == "darwin" else 1024 * held  # macOS counts in bytes, Linux in KiB


def _memory() -> str:
    return f"peak {peak_memory() / 1e9:.1f} GB"
