"""``avd torchrun``: PyTorch's launcher, which lets runs save when it is stopped and tells of it in one line."""

from __future__ import annotations

import signal
import sys

import typer

from avd_trainer.runtime.terminal import readable_errors, say

SETTINGS = {"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []}
"""All options are torchrun's."""

# Signals that runs understand are passed on to them, with time for a large checkpoint.
_OPTIONS = ("--shutdown-timeout", "600", "--signals-to-handle", "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1")


def torchrun(context: typer.Context) -> None:
    """Start a process per GPU by torchrun, and let them save when it is stopped.

    Takes torchrun's options: avd torchrun --nproc-per-node 8 -m avd_trainer train ... A signal, such as Ctrl-C, gives
    the processes 600 seconds to save (--shutdown-timeout).
    """
    with readable_errors():
        from torch.distributed.elastic.multiprocessing.api import SignalException
        from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
        from torch.distributed.run import main

        try:
            main([*_OPTIONS, *context.args])
        except SignalException as error:
            name = signal.Signals(error.sigval).name
            say(f"{name} came, and all processes have ended. What they saved is told above.")
            sys.exit(128 + error.sigval)
        except ChildFailedError as error:
            rank, failure = error.get_first_failure()
            say(f"Rank {rank} failed first, with status {failure.exitcode}. What it said is above.")
            sys.exit(1)
