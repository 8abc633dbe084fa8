"""What the command line says, and how it says that a person made a mistake."""

from __future__ import annotations

import logging
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.logging import RichHandler
from rich.markup import escape

from avd_trainer.runtime.errors import UserError
from avd_trainer.runtime.progress import console


def say(message: str) -> None:
    """Print a sentence to standard output, as it is; the first rank speaks for all."""
    if _rank() == 0:
        Console().print(escape(message), soft_wrap=True, highlight=False)


@contextmanager
def readable_errors() -> Iterator[None]:
    """Log to the terminal, and print a person's mistake as a message, not as a traceback; exits with status 2."""
    handler = RichHandler(console=console, show_path=False, show_time=False)
    logging.basicConfig(level=logging.WARNING, format="%(message)s", handlers=[handler])
    # It comes with a handler of its own, so each of its messages would be printed twice.
    logging.getLogger("huggingface_hub").propagate = False
    try:
        yield
    except Exception as error:
        if not _is_told(error):
            raise
        rank = _rank()
        if rank > 0:
            # A mistake that all ranks see is told once: the launcher stops the others when the first one leaves.
            time.sleep(2)
        where = f" on rank {rank}" if rank > 0 else ""
        console.print(f"[bold red]error{where}:[/] {escape(str(error))}", soft_wrap=True, highlight=False)
        sys.exit(2)


def _is_told(error: Exception) -> bool:
    """Whether an error's message says all that a person needs."""
    if isinstance(error, UserError):
        return True
    from avd_core import NonFiniteError  # here, since it brings PyTorch

    return isinstance(error, NonFiniteError)


def _rank() -> int:
    return int(os.environ.get("RANK", "0"))
