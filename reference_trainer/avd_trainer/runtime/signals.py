"""Signals that ask a run to stop, from a person or a cluster."""

from __future__ import annotations

import signal
import time
from types import FrameType, TracebackType
from typing import Any, Self

# What launchers, SLURM (on time-out and with --signal=USR1@300) and Ctrl-C send.
SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
SECONDS_TO_SECOND = 1.0
"""What comes sooner is the first Ctrl-C, sent again."""


class StopSignals:
    """Turns signals into a flag that a training loop looks at between steps; a context manager.

    A second Ctrl-C, for those in a hurry, interrupts as usual. It has to come a second later at the earliest: a
    terminal sends Ctrl-C to the launcher and its processes, and the launcher sends it to them once more.

    Inside another one, what came is told to that one at the end: what is around a run that was nearly done has to stop
    too.

    Attributes:
        received: The name of the first signal that came, or None.
    """

    def __init__(self) -> None:
        self.received: str | None = None
        self._since = 0.0
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Self:
        for number in SIGNALS:
            self._before[number] = signal.signal(number, self._receive)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
            outer = getattr(handler, "__self__", None)
            if isinstance(outer, StopSignals) and number.name == self.received:
                outer._receive(number, None)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if self.received is None:
            self.received, self._since = signal.Signals(number).name, time.monotonic()
        elif number == signal.SIGINT and time.monotonic() - self._since > SECONDS_TO_SECOND:
            raise KeyboardInterrupt
