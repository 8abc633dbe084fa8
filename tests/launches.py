"""Ranks in processes of their own, which a test may signal and kill.

A server imports the trainer once and forks each process: a start takes milliseconds instead of the imports' seconds.
"""

from __future__ import annotations

import multiprocessing
import os
import pickle
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, Self

import torch
from torch.distributed import TCPStore

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
        self._folder = tempfile.TemporaryDirectory()
        # Held here as by torchrun's agent, so that no port has to be guessed, and no rank's death takes it along.
        self._store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False) if size > 1 else None
        port = 0 if self._store is None else self._store.port
        # Pickled here, since multiprocessing would send tensors through memory that both processes hold.
        call = pickle.dumps((function, args))
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
        """What the function returned, by rank; fails with what was printed if a process did not end well."""
        ranks = range(len(self._processes))
        if any(code != 0 for code in self.wait(timeout)):
            raise RuntimeError("\n".join(f"rank {rank} printed:\n{self.printed(rank)}" for rank in ranks))
        return [pickle.loads(_file(self._folder.name, rank, "result").read_bytes()) for rank in ranks]

    def printed(self, rank: int = 0) -> str:
        """Standard output and error of a rank."""
        return _file(self._folder.name, rank, "printed").read_text()


def on_ranks(size: int, function: Callable[..., Any], *args: Any) -> list[Any]:
    """Call a function on every rank; returns the results by rank."""
    with Launch(size, function, *args) as launch:
        return launch.results()


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
