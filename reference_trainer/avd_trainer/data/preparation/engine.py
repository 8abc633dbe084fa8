"""Hands the tasks of a schedule to processes, wherever these run, and what they tell back to the schedule.

The journal has one writer: the process that this loop runs in.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Generic, TypeVar

from avd_trainer.data.preparation.clip_reader import OpenReader, VideoReader
from avd_trainer.data.preparation.recipe import Recipe
from avd_trainer.data.preparation.schedule import Schedule
from avd_trainer.data.preparation.worker import Begun, Ending, Message, Task
from avd_trainer.runtime.errors import UserError
from avd_trainer.runtime.signals import StopSignals

TICK = 0.2
"""Seconds between two looks at what processes do."""


class StoppedError(UserError):
    """A person or a cluster asked the run to stop."""


class Process(ABC):
    """A process that does one task after another.

    Attributes:
        number: Which place it takes, from 0; processes that are alive have different ones.
    """

    def __init__(self, number: int) -> None:
        self.number = number

    @property
    @abstractmethod
    def alive(self) -> bool:
        """Whether it can be given another task."""

    @abstractmethod
    def give(self, task: Task) -> None:
        """Let it do a task."""

    @abstractmethod
    def listen(self) -> list[Message]:
        """What it told since the last call, at once; an ``Ending`` is the last of a task's messages."""

    @abstractmethod
    def end(self) -> None:
        """End it, whatever it does; once more does no harm."""


P = TypeVar("P", bound=Process)


class Engine(ABC, Generic[P]):
    """Processes that do tasks side by side.

    Args:
        recipe: Stages and settings.
        folder: Of the prepared videos.
        workers: Number of processes at most.
        gpus: Number of GPUs, of which each process has one; 0 for none.
        open_reader: How clips are read.
    """

    def __init__(
        self, recipe: Recipe, folder: Path, workers: int, *, gpus: int = 0, open_reader: OpenReader = VideoReader
    ) -> None:
        self._recipe, self._folder, self._workers, self._gpus = recipe, folder, workers, gpus
        self._open_reader = open_reader

    def run(self, schedule: Schedule) -> None:
        """Work until there is nothing left to do.

        Raises:
            StoppedError: On Ctrl-C, or a signal of a cluster; what was recorded stays.
            UserError: If nothing can go on, such as with a full disk.
        """
        with StopSignals() as stop, ExitStack() as ends:
            idle: dict[P, Task] = {}  # with what they did last
            busy: dict[P, Task] = {}
            while True:
                # One write to the disk for all that was told meanwhile, when new tasks are out: nobody waits for it.
                with schedule.together():
                    self._hear(schedule, busy, idle)
                    self._hand_out(schedule, busy, idle, ends)
                if not busy:
                    return
                self._wait(list(busy))
                if stop.received is not None:
                    raise StoppedError(
                        f"Stopped by {stop.received}. Nothing that was recorded is lost: the same command goes on."
                    )

    def _hear(self, schedule: Schedule, busy: dict[P, Task], idle: dict[P, Task]) -> None:
        for process, task in list(busy.items()):
            for message in process.listen():
                if not isinstance(message, Begun):
                    schedule.hear(task, message)
                if isinstance(message, Ending):
                    del busy[process]
                    if process.alive:
                        idle[process] = task
                    else:
                        process.end()  # what it held, such as a GPU, is for the one that takes over

    def _hand_out(self, schedule: Schedule, busy: dict[P, Task], idle: dict[P, Task], ends: ExitStack) -> None:
        while len(busy) < self._workers and (task := schedule.take()) is not None:
            if idle:
                # The one that did a file's last task has kept frames of it.
                process = next((each for each in idle if idle[each].path == task.path), next(iter(idle)))
                del idle[process]
            else:
                process = self._start(min(set(range(self._workers)) - {other.number for other in busy}))
                ends.callback(process.end)
            process.give(task)
            busy[process] = task

    @abstractmethod
    def _start(self, number: int) -> P:
        """A new process that takes this place."""

    @abstractmethod
    def _wait(self, processes: Sequence[P]) -> None:
        """Until one of them tells something, for :data:`TICK` at most."""
