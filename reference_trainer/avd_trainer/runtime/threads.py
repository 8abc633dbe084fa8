"""How threads of the CPU wait for each other."""

from __future__ import annotations

import os


def wait_asleep() -> None:
    """Let OpenMP's threads sleep while they wait for each other. Has to be called before PyTorch is imported.

    By default they spin, and on a machine that is busy with other work each waits at full load for one that has no
    core: five steps of the tiny preset took 249 s with two spinning threads on two cores that six other processes
    wanted, 20 s with two that sleep, and 32 s with one. How threads wait changes no result, whereas their number does,
    in the last digit. So their number is PyTorch's choice, and ``OMP_NUM_THREADS``, which torchrun sets to 1, holds.

    ``OMP_WAIT_POLICY`` and ``GOMP_SPINCOUNT`` are left alone where they are set.
    """
    if "GOMP_SPINCOUNT" not in os.environ:
        os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


def describe_threads() -> str:
    """How many threads compute, how they wait, and where both are set; for a run's first lines."""
    import torch

    number = torch.get_num_threads()
    if number == 1:
        return "Computing on the CPU with one thread (OMP_NUM_THREADS says how many)."
    asleep = os.environ.get("OMP_WAIT_POLICY", "").upper() == "PASSIVE" and "GOMP_SPINCOUNT" not in os.environ
    return (
        f"Computing on the CPU with {number} threads that {'sleep' if asleep else 'spin'} while they wait "
        "(OMP_NUM_THREADS says how many, OMP_WAIT_POLICY how they wait)."
    )
