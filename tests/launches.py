"""Ranks in processes of their own, which a test may signal and kill.

A server imports the trainer once and forks each process: a start takes milliseconds instead of the imports' seconds.
"""

from __future__ import annotations

import gc
import itertools
import multiprocessing
import os
import pickle
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any, Self

import torch
import torch.distributed as dist
from torch.distributed import TCPStore

SECONDS_TO_END = 1.0
"""How long ranks may go on when one of them has failed."""

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["avd_trainer.training.run", "pytest"])


class Launch:
    """Calls ``function(*args)`` in ``size`` processes with the environment that torchrun gives; a context manager.

    Leaving the context kills what still runs. There is no fallback to fewer processes.

    Args:
        size: Number of ranks.
        function: From the top of a module; returns something that pickles.
        args: Its arguments, which pickle too.
    """

    def __init__(self, size: int, function: Callable[..., Any], *args: Any) -> None:
        # Pickled here, since multiprocessing would send tensors through memory that both processes hold.
        call = pickle.dumps((function, args))
        self._folder = tempfile.TemporaryDirectory()
        # Held here as by torchrun's agent, so that no port has to be guessed, and no rank's death takes it along.
        self._store = _new_store() if size > 1 else None
        self._asked = 0
        port = 0 if self._store is None else self._store.port
        self._processes = [
            _context.Process(target=_run, args=(rank, size, port, self._folder.name, call), daemon=True)
            for rank in range(size)
        ]

    def __enter__(self) -> Self:
        for process in self._processes:
            process.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.signal(signal.SIGKILL)
        for process in self._processes:
            process.join()
        self._folder.cleanup()

    def signal(self, number: signal.Signals, rank: int | None = None) -> None:
        """Send a signal to a rank, or to all that still run."""
        for process in self._processes if rank is None else [self._processes[rank]]:
            if process.is_alive() and process.pid is not None:
                os.kill(process.pid, number)

    def wait(self, timeout: float = 120.0) -> list[int | None]:
        """Exit codes by rank; minus the signal's number for a killed one, None where a process did not end in time."""
        deadline = time.monotonic() + timeout
        for process in self._processes:
            process.join(max(deadline - time.monotonic(), 0))
        return [process.exitcode for process in self._processes]

    def results(self, timeout: float = 120.0) -> list[Any]:
        """What the function returned, by rank.

        Raises:
            RuntimeError: If a process raises, dies or takes longer than ``timeout`` seconds, with what was printed. It
                never falls back to fewer processes: a test of several ranks that ran on one would prove nothing.
        """
        ranks = range(len(self._processes))
        deadline = time.monotonic() + timeout
        while any(process.exitcode is None for process in self._processes) and time.monotonic() < deadline:
            if any(process.exitcode for process in self._processes):
                # The others may wait for this one in a collective: no use in waiting for them. But the one that failed
                # first may be the last to end, and is to print why before it is stopped.
                deadline = min(deadline, time.monotonic() + SECONDS_TO_END)
            time.sleep(0.02)
        if any(process.exitcode != 0 for process in self._processes):
            raise RuntimeError("\n".join(map(self._problem, ranks)))
        return [pickle.loads(_file(self._folder.name, rank, "result").read_bytes()) for rank in ranks]

    def ask(self, function: Callable[..., Any], *args: Any, timeout: float = 120.0) -> list[Any]:
        """Have ranks that run :func:`answer` call a function; returns the results by rank, or raises as ``results``."""
        assert self._store is not None, "a rank that is alone has nobody to ask it"
        group = _new_store()  # a group that met in the store of the last one would find the addresses of that
        self._asked += 1
        self._store.set(f"call {self._asked}", pickle.dumps((group.port, function, args)))
        answers = [f"answer {self._asked} {rank}" for rank in range(len(self._processes))]
        deadline = time.monotonic() + timeout
        while not self._store.check(answers):
            ended = [process.exitcode is not None for process in self._processes]
            if any(ended):
                deadline = min(deadline, time.monotonic() + SECONDS_TO_END)
            if all(ended) or time.monotonic() > deadline:
                raise RuntimeError("\n".join(map(self._problem, range(len(self._processes)))))
            time.sleep(0.005)
        return [pickle.loads(self._store.get(name)) for name in answers]

    def _problem(self, rank: int) -> str:
        code = self._processes[rank].exitcode
        ended = "had not finished when the run was stopped" if code is None else f"ended with exit code {code}"
        return f"rank {rank} {ended} and printed:\n{self.printed(rank)}"

    def printed(self, rank: int = 0) -> str:
        """Standard output and error of a rank; nothing of one that has not begun."""
        file = _file(self._folder.name, rank, "printed")
        return file.read_text() if file.exists() else ""


def on_ranks(size: int, function: Callable[..., Any], *args: Any) -> list[Any]:
    """Call a function on every rank; returns the results by rank."""
    with Launch(size, function, *args) as launch:
        return launch.results()


class StandingRanks:
    """Ranks that take one call after another, so that what PyTorch sets up at first use is paid for once.

    For functions that leave their process as it was. Where one raises, the next call is that of new processes. A
    context manager; leaving it ends the processes.

    Args:
        size: Number of ranks, two or more.
    """

    def __init__(self, size: int) -> None:
        self._size = size
        self._launch: Launch | None = None

    def __call__(self, function: Callable[..., Any], *args: Any) -> list[Any]:
        """Call a function on every rank; returns the results by rank."""
        if self._launch is None:
            self._launch = Launch(self._size, answer).__enter__()
        try:
            return self._launch.ask(function, *args)
        except BaseException:
            self._end()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._end()

    def _end(self) -> None:
        if self._launch is not None:
            self._launch.__exit__()
            self._launch = None


def answer() -> None:
    """Do what :meth:`Launch.ask` asks, until that launch is left."""
    rank = os.environ["RANK"]
    # The next test that asks may be far.
    asking = TCPStore("127.0.0.1", int(os.environ["MASTER_PORT"]), is_master=False, timeout=timedelta(days=1))
    for number in itertools.count(1):
        port, function, args = pickle.loads(asking.get(f"call {number}"))
        os.environ["MASTER_PORT"] = str(port)
        asking.set(f"answer {number} {rank}", pickle.dumps(function(*args)))


def in_group(size: int, function: Callable[..., Any], *args: Any, timeout: float = 120.0) -> list[Any]:
    """Call ``function(rank, *args)`` on every rank of one gloo group; returns the results by rank."""
    with Launch(size, _join_group, function, timeout, args) as launch:
        return launch.results(timeout)


def _join_group(function: Callable[..., Any], timeout: float, args: tuple[Any, ...]) -> Any:
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    place = {"store": dist.HashStore(), "rank": 0, "world_size": 1} if size == 1 else {}
    dist.init_process_group("gloo", timeout=timedelta(seconds=timeout), **place)
    assert dist.get_world_size() == size
    try:
        return function(rank, *args)
    finally:
        # A reducer that ends after its process group can wait for ever, for a thread that waits for Python's lock.
        gc.collect()
        dist.destroy_process_group()


def _new_store() -> TCPStore:
    return TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)


def _run(rank: int, size: int, port: int, folder: str, call: bytes) -> None:
    descriptor = os.open(_file(folder, rank, "printed"), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(size), "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(size)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "TORCHELASTIC_USE_AGENT_STORE": "True"}
    try:
        function, args = pickle.loads(call)
        _file(folder, rank, "result").write_bytes(pickle.dumps(function(*args)))
    except Exception:
        traceback.print_exc()
        sys.exit(1)


def _file(folder: str, rank: int, name: str) -> Path:
    return Path(folder) / f"{rank}.{name}"
