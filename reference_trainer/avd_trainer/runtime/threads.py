"""How threads of the CPU wait for each other."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

SPINS = "10000"
"""How often a waiting thread looks before it sleeps: microseconds, where OpenMP's default is up to seconds."""


def spin_briefly() -> None:
    """Let OpenMP's threads look a few times and then sleep while they wait for each other. Call it before torch loads.

    By default they spin, and on a machine that is busy with other work each waits at full load for one that has no
    core. Sleeping at once would cost an idle machine half of its speed. Steps of the tiny preset, DMD alone, on two
    cores, in samples/s (benchmarks/results/threads-cpu.json):

    ==================  =====  =============================
    two threads         idle   beside four busy processes
    ==================  =====  =============================
    spin                8.9    not measured here
    spin 10,000 times   8.4    1.2
    sleep at once       4.8    1.4
    one thread          6.0    2.0
    ==================  =====  =============================

    How threads wait changes no result, whereas their number does, in the last digit. So their number is PyTorch's
    choice, and ``OMP_NUM_THREADS``, which torchrun sets to 1, holds. ``OMP_WAIT_POLICY`` and ``GOMP_SPINCOUNT`` are
    left alone where one is set.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", SPINS)


@contextmanager
def one_thread() -> Iterator[None]:
    """Compute in one thread, so that results are those of a process that has but one."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def describe_threads() -> str:
    """How many threads compute, how they wait, and where both are set; for a run's first lines."""
    import torch

    number = torch.get_num_threads()
    if number == 1:
        return "Computing on the CPU with one thread (OMP_NUM_THREADS says how many)."
    chosen = [f"{name}={os.environ[name]}" for name in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT") if name in os.environ]
    return (
        f"Computing on the CPU with {number} threads ({', '.join(chosen) or 'OpenMP decides how they wait'}). "
        "Where other work wants the cores, OMP_NUM_THREADS=1 is faster."
    )
