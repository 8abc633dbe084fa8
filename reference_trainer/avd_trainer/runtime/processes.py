"""Work in processes of its own, each of one thread, which print to files."""

from __future__ import annotations

import os
import pickle
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from multiprocessing import get_context
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import NamedTuple

import torch

from avd_trainer.runtime.errors import UserError
from avd_trainer.runtime.signals import StopSignals
from avd_trainer.runtime.terminal import readable_errors

SECONDS_BETWEEN_LOOKS = 1.0
"""How long a process that waits for others sleeps before it looks again."""


class FailedProcessError(UserError):
    """A process has failed; what the others did is there."""


class Ended(NamedTuple):
    """How processes ended.

    Attributes:
        failed: The files of those that failed, the first one first.
        signal: The name of the signal that asked this process, and so them, to stop; None if none came.
    """

    failed: Sequence[Path]
    signal: str | None


def run_processes(
    calls: Mapping[Path, Callable[[], object]],
    *,
    preload: str,
    on_look: Callable[[], None] = lambda: None,
    until_failure: bool = False,
) -> Ended:
    """Call functions in processes of their own, and wait until all have ended.

    Each process computes in one thread. A signal that asks this one to stop is passed on: they take it as a request to
    save and stop, if they look for it by :class:`StopSignals`.

    Args:
        calls: What each calls, by the file that it prints to, in a folder that exists. They pickle.
        preload: A module that is imported once for all.
        on_look: Called every second.
        until_failure: Whether the others are asked to stop when one fails.
    """
    context = get_context("forkserver")
    context.set_forkserver_preload([preload])
    # Pickled here, since multiprocessing would send tensors through memory that both processes hold.
    processes = {log: context.Process(target=_call, args=(pickle.dumps(call), log)) for log, call in calls.items()}
    failed: list[Path] = []
    with StopSignals() as signals:
        try:
            for process in processes.values():
                process.start()
            while True:
                running = any(process.is_alive() for process in processes.values())
                failed += [log for log, process in processes.items() if process.exitcode and log not in failed]
                if signals.received is not None or (failed and until_failure):
                    _stop(processes.values())
                on_look()
                if not running:
                    break
                time.sleep(SECONDS_BETWEEN_LOOKS)
        finally:
            _stop(processes.values())
    return Ended(failed, signals.received)


def _stop(processes: Iterable[BaseProcess]) -> None:
    for process in processes:
        if process.is_alive():
            process.terminate()


def _call(call: bytes, log: Path) -> None:
    with log.open("w") as file:
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)
    torch.set_num_threads(1)
    with readable_errors():
        pickle.loads(call)()
