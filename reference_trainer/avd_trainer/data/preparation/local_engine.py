"""Runs a schedule in processes of this machine, each of which may crash, hang or take too much memory."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from multiprocessing.connection import Connection, wait
from pathlib import Path

from avd_trainer.data.preparation.clip_reader import OpenReader
from avd_trainer.data.preparation.engine import TICK, Engine, Process
from avd_trainer.data.preparation.recipe import Recipe
from avd_trainer.data.preparation.worker import (
    DECODING,
    LOADING,
    Begun,
    Ending,
    Lost,
    Message,
    Task,
    Worker,
    own_memory,
)

_MOST_A_LOOK = 10 * TICK
"""Seconds that count between two looks at most. If there are more, this process was stopped itself, as by Ctrl-Z, and
so were those that it looks after."""
_THREADS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "OPENCV_FOR_THREADS_NUM")


class LocalProcess(Process):
    """A process of this machine, which is ended if it exceeds a limit of the recipe.

    Args:
        number: As of :class:`Process`.
        recipe: Stages and settings.
        folder: Of the prepared videos.
        open_reader: How clips are read.
        environment: Variables that it finds, besides those of this process.
    """

    def __init__(
        self,
        number: int,
        recipe: Recipe,
        folder: Path,
        open_reader: OpenReader,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(number)
        context = multiprocessing.get_context("spawn")
        self.connection, theirs = context.Pipe()
        arguments = (theirs, os.getpid(), recipe, folder, open_reader)
        self._process = context.Process(target=_serve, args=arguments, daemon=True)
        with _environment({**dict.fromkeys(_THREADS, "1"), **(environment or {})}):
            self._process.start()
        theirs.close()
        self._memory_gb = recipe.head.memory_gb
        self._begun: Begun | None = None
        self._spent = 0.0
        self._looked = 0.0

    @property
    def alive(self) -> bool:
        return self._process.is_alive()

    def give(self, task: Task) -> None:
        self._begun = None
        with suppress(OSError):  # that it is gone shows when it is listened to
            self.connection.send(task)

    def listen(self) -> list[Message]:
        told: list[Message] = []
        try:
            while self.connection.poll():
                message: Message = self.connection.recv()
                told.append(message)
                if isinstance(message, Begun):
                    self._begun, self._spent, self._looked = message, 0.0, time.monotonic()
                elif isinstance(message, Ending):
                    return told
            lost = self._beyond_limits()
        except (EOFError, OSError):
            self._process.join()
            lost = _fate(self._begun, self._process.exitcode)
        if lost is not None:
            self.end()
            told.append(lost)
        return told

    def end(self) -> None:
        self._process.kill()
        self._process.join()
        self.connection.close()

    def _beyond_limits(self) -> Lost | None:
        begun = self._begun
        if begun is None:
            return None
        now = time.monotonic()
        self._spent += min(now - self._looked, _MOST_A_LOOK)
        self._looked = now
        if self._spent > begun.limit:
            setting = "decode_limit" if begun.doing == DECODING else "time_limit"
            return Lost(begun, f"did not end within {begun.limit:g} s", limit=(setting, begun.limit))
        if begun.doing == LOADING:
            return None
        memory = (own_memory(self._process.pid) - begun.weights) / 1e9
        if memory > self._memory_gb:
            return Lost(
                begun,
                f"took {memory:.1f} GB of memory, {self._memory_gb:g} are allowed (memory_gb)",
                limit=("memory_gb", self._memory_gb),
            )
        return None


class LocalEngine(Engine[LocalProcess]):
    """Processes of this machine; several GPUs are shared out among them."""

    def _start(self, number: int) -> LocalProcess:
        environment = dict.fromkeys(_THREADS, str(max(1, cores() // self._workers)))
        if self._gpus:
            environment["CUDA_VISIBLE_DEVICES"] = _visible(number % self._gpus)
        return LocalProcess(number, self._recipe, self._folder, self._open_reader, environment)

    def _wait(self, processes: Sequence[LocalProcess]) -> None:
        wait([process.connection for process in processes], TICK)


def cores() -> int:
    """That this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _serve(connection: Connection, parent: int, recipe: Recipe, folder: Path, open_reader: OpenReader) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's affair
    threading.Thread(target=_die_with, args=(parent,), daemon=True).start()
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
    """The GPU of this number among those that this process may use, by the name that it goes by."""
    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    return str(number) if given is None else given.split(",")[number].strip()


def _fate(begun: Begun | None, code: int | None) -> Lost:
    if code is not None and code < 0:
        name = signal.Signals(-code).name
        if name == "SIGKILL":  # which is not the file's fault alone, if at all
            return Lost(begun, f"crashed with {name}, as where the machine has no memory left", again=True)
        return Lost(begun, f"crashed with {name}")
    return Lost(begun, f"ended its process with status {code}")
