"""Data preparation without processes of its own, for tests of what comes out of it: it starts at once."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import pytest

from avd_trainer.data.preparation import prepare
from avd_trainer.data.preparation.engine import Engine, Process
from avd_trainer.data.preparation.worker import Message, Task, Worker


class NoProcess(Process):
    """Does a task at once; what crashes, hangs or eats memory takes the tests with it."""

    alive = True

    def __init__(self, worker: Worker, told: list[Message]) -> None:
        super().__init__(0)
        self._worker, self._told = worker, told

    def give(self, task: Task) -> None:
        self._worker.work(task)

    def listen(self) -> list[Message]:
        told = list(self._told)
        self._told.clear()
        return told

    def end(self) -> None:
        pass


class EngineInThisProcess(Engine[NoProcess]):
    """One task after another."""

    def _start(self, number: int) -> NoProcess:
        told: list[Message] = []
        return NoProcess(Worker(self._recipe, self._folder, told.append, self._open_reader), told)

    def _wait(self, processes: Sequence[NoProcess]) -> None:
        pass


@contextmanager
def prepared_in_this_process() -> Iterator[None]:
    """Within it, data is prepared so."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prepare, "Workers", partial(prepare.Workers, engine=EngineInThisProcess))
        yield
