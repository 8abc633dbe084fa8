"""Runs a schedule in processes of this machine, each of which may crash, hang or take too much memory."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from multiprocessing.connection import Connection, wait
from pathlib import Path
from types import TracebackType
from typing import Self

from avd_trainer.data.preparation.clip_reader import OpenReader, VideoReader
from avd_trainer.data.preparation.recipe import Recipe
from avd_trainer.data.preparation.schedule import Schedule
from avd_trainer.data.preparation.worker import Begun, Changed, Finished, Message, Task, Worker
from avd_trainer.runtime.errors import UserError
from avd_trainer.runtime.signals import StopSignals

_TICK = 0.2
"""Seconds between two looks at limits."""
_THREADS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "OPENCV_FOR_THREADS_NUM")


class StoppedError(UserError):
    """A person or a cluster asked the run to stop."""


class LocalEngine:
    """Processes that do tasks side by side.

    Args:
        recipe: Stages and settings.
        folder: Of the prepared videos.
        workers: Number of processes.
        gpus: Number of GPUs, which processes take in turn.
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
            idle: list[_Process] = []
            busy: list[_Process] = []
            while True:
                while len(busy) < self._workers and (task := schedule.take()) is not None:
                    process = idle.pop() if idle else ends.enter_context(self._start(len(busy)))
                    process.give(task)
                    busy.append(process)
                if not busy:
                    return
                wait([process.connection for process in busy], _TICK)
                if stop.received is not None:
                    raise StoppedError(
                        f"Stopped by {stop.received}. Nothing that was recorded is lost: the same command goes on."
                    )
                with schedule.together():  # one write to the disk for all that was told meanwhile
                    ended = [process for process in busy if process.listen(schedule)]
                for process in ended:
                    busy.remove(process)
                    if process.alive:
                        idle.append(process)

    def _start(self, number: int) -> _Process:
        environment = dict.fromkeys(_THREADS, "1")
        if self._gpus:
            environment["CUDA_VISIBLE_DEVICES"] = _visible(number % self._gpus)
        return _Process(self._recipe, self._folder, self._open_reader, environment)


class _Process:
    """A process that does one task after another; a context manager that ends it."""

    def __init__(self, recipe: Recipe, folder: Path, open_reader: OpenReader, environment: Mapping[str, str]) -> None:
        context = multiprocessing.get_context("spawn")
        self.connection, theirs = context.Pipe()
        arguments = (theirs, recipe, folder, open_reader)
        self._process = context.Process(target=_serve, args=arguments, daemon=True)
        with _environment(environment):
            self._process.start()
        theirs.close()
        self._memory = 1e9 * recipe.head.memory_gb
        self._task: Task | None = None
        self._begun: Begun | None = None
        self._since = 0.0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end()
        self.connection.close()

    @property
    def alive(self) -> bool:
        """Whether it can be given another task."""
        return self._process.is_alive()

    def give(self, task: Task) -> None:
        """Let it do a task."""
        self._task, self._begun = task, None
        with suppress(OSError):  # that it is gone shows when it is listened to
            self.connection.send(task)

    def listen(self, schedule: Schedule) -> bool:
        """Pass on what it told, and see that it keeps its limits; whether its task has ended."""
        assert self._task is not None
        try:
            while self.connection.poll():
                message: Message = self.connection.recv()
                if isinstance(message, Begun):
                    self._begun, self._since = message, time.monotonic()
                else:
                    schedule.hear(self._task, message)
                if isinstance(message, Finished | Changed):
                    return True
            reason = self._beyond_limits()
        except (EOFError, OSError):
            self._process.join()
            reason = _fate(self._process.exitcode)
        if reason is None:
            return False
        self._end()
        if self._begun is None:
            raise UserError(f"A worker process {reason} before it began to work; what it said stands above.")
        schedule.lose(self._task, self._begun, reason)
        return True

    def _beyond_limits(self) -> str | None:
        if self._begun is not None and time.monotonic() - self._since > self._begun.limit:
            return f"did not end within {self._begun.limit:g} s"
        memory = _resident(self._process.pid)
        if memory > self._memory:
            return f"took {memory / 1e9:.1f} GB of memory, {self._memory / 1e9:g} are allowed (memory_gb)"
        return None

    def _end(self) -> None:
        self._process.kill()
        self._process.join()


def _serve(connection: Connection, recipe: Recipe, folder: Path, open_reader: OpenReader) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's affair
    threading.Thread(target=_die_with, args=(os.getppid(),), daemon=True).start()
    worker = Worker(recipe, folder, connection.send, open_reader)
    with suppress(EOFError, ConnectionError):  # the parent is gone
        while True:
            worker.work(connection.recv())


def _die_with(parent: int) -> None:
    """End this process soon after its parent: a decoder that hangs would never see that the pipe is closed."""
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)


@contextmanager
def _environment(values: Mapping[str, str]) -> Iterator[None]:
    """What processes that start meanwhile find in their environment."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _visible(number: int) -> str:
    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    return str(number) if given is None else given.split(",")[number]


def _resident(pid: int | None) -> int:
    """Bytes of main memory that a process holds."""
    import psutil

    try:
        return int(psutil.Process(pid).memory_info().rss)
    except psutil.NoSuchProcess:
        return 0


def _fate(code: int | None) -> str:
    if code is not None and code < 0:
        name = signal.Signals(-code).name
        return f"crashed with {name}" + (", as where the machine has no memory left" if name == "SIGKILL" else "")
    return f"ended its process with status {code}"
