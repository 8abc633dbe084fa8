"""How long parts of the work take."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def timed(seconds: dict[str, float], part: str, clock: Callable[[], float] = time.monotonic) -> Iterator[None]:
    """Add the seconds that the block takes to ``seconds[part]``, in hundredths; of a block that fails, none.

    ``clock`` says which: those of the clock on the wall, or by ``time.process_time`` those of the processor.
    """
    start = clock()
    yield
    seconds[part] = round(seconds.get(part, 0.0) + clock() - start, 2)
