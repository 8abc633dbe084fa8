"""The loop that all engines have, with processes that are pretended."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import pytest

from avd_trainer.data.preparation.engine import Engine, Process
from avd_trainer.data.preparation.local_engine import LocalEngine, LocalProcess
from avd_trainer.data.preparation.worker import Finished, Lost, Message, Task
from toy_runs import toy_recipe


class Pretended(Process):
    """Takes three looks for each task; is lost in those that say so."""

    alive = True
    looks = 0
    task: Task

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.given: list[str] = []

    def give(self, task: Task) -> None:
        self.task, self.looks = task, 3
        self.given.append(task.path.name)

    def listen(self) -> list[Message]:
        self.looks -= 1 if self.task.path.name != "slow" else 0.1
        if self.looks > 0:
            return []
        self.alive = self.task.path.name != "lost"
        return [Finished() if self.alive else Lost(None, "is lost")]

    def end(self) -> None:
        self.alive = False


class PretendedEngine(Engine[Pretended]):
    """Notes which place each process takes."""

    def __init__(self, workers: int) -> None:
        super().__init__(toy_recipe(), Path(), workers)
        self.started: list[int] = []
        self.processes: list[Pretended] = []

    def _start(self, number: int) -> Pretended:
        self.started.append(number)
        self.processes.append(Pretended(number))
        return self.processes[-1]

    def _wait(self, processes: Sequence[Pretended]) -> None:
        assert len({process.number for process in processes}) == len(processes)


class Listed:
    """A schedule of given tasks."""

    def __init__(self, *names: str) -> None:
        self.names = list(names)
        self.heard: list[Message] = []

    def take(self) -> Task | None:
        return Task(Path(self.names.pop(0))) if self.names else None

    def hear(self, task: Task, message: Message) -> None:
        self.heard.append(message)

    def together(self) -> AbstractContextManager[None]:
        return nullcontext()


def test_a_process_that_takes_over_takes_the_place_that_is_free() -> None:
    """Places stand for GPUs: two processes on one would run out of memory, with another GPU idle."""
    engine, schedule = PretendedEngine(2), Listed("lost", "slow", "a", "b", "lost", "c")
    engine.run(schedule)  # type: ignore[arg-type]
    assert engine.started == [0, 1, 0, 0]
    assert len(schedule.heard) == 6


class InThreeTasks(Listed):
    """A schedule of files, each of which takes three tasks; the first by name is handed out first."""

    def hear(self, task: Task, message: Message) -> None:
        super().hear(task, message)
        if self.taken.count(task.path.name) < 3:
            self.names = sorted([task.path.name, *self.names])

    def __init__(self, *names: str) -> None:
        super().__init__(*names)
        self.taken: list[str] = []

    def take(self) -> Task | None:
        task = super().take()
        self.taken += [] if task is None else [task.path.name]
        return task


def test_a_file_stays_with_the_process_that_did_its_last_task() -> None:
    """Which has kept frames of it."""
    engine, schedule = PretendedEngine(2), InThreeTasks("a", "b", "c")
    engine.run(schedule)  # type: ignore[arg-type]
    assert sorted(name for process in engine.processes for name in process.given) == sorted("abc" * 3)
    for process in engine.processes:
        for name in set(process.given):
            assert process.given.count(name) == 3


@pytest.mark.parametrize(("given", "seen"), [(None, "1"), ("3, GPU-ab12", "GPU-ab12")])
def test_gpus_are_those_that_this_process_may_use(
    given: str | None, seen: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    found: list[str] = []
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if given is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", given)
    monkeypatch.setattr(
        LocalProcess, "__init__", lambda *arguments: found.append(arguments[-1]["CUDA_VISIBLE_DEVICES"])
    )
    LocalEngine(toy_recipe(), Path(), 2, gpus=2)._start(1)
    assert found == [seen]
