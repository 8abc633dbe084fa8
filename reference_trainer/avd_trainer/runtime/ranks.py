"""The ranks of a run: joining them, and decisions that all of them share."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from avd_trainer.runtime.errors import UserError


@dataclass(frozen=True)
class Ranks:
    """The processes of a run, seen from one of them.

    Attributes:
        rank: This process.
        size: Number of processes.
        device: Where this process computes.
        mesh: Shards run along its last dimension; with hybrid sharding its first holds copies.
        background: A group of its own for checkpoints, which are written while training goes on.
    """

    rank: int
    size: int
    device: torch.device
    mesh: DeviceMesh
    background: ProcessGroup

    @property
    def first(self) -> bool:
        """Whether this is the process that prints and writes."""
        return self.rank == 0

    def gather(self, values: Tensor) -> Tensor:
        """``[n]`` of every rank as ``[size, n]``. A collective."""
        parts = [torch.empty_like(values) for _ in range(self.size)]
        dist.all_gather(parts, values)
        return torch.stack(parts)

    def any(self, flags: list[bool]) -> list[bool]:
        """For each flag, whether it is raised on any rank. A collective."""
        raised = torch.tensor([float(flag) for flag in flags], device=self.device)
        dist.all_reduce(raised, op=dist.ReduceOp.MAX)
        return [bool(flag) for flag in raised.tolist()]

    def from_first(self, value: int) -> int:
        """What the first rank says, on every rank. A collective."""
        said = torch.tensor(value, device=self.device)
        dist.broadcast(said, src=0)
        return int(said)

    def barrier(self) -> None:
        """Wait until every rank is here."""
        self.any([False])


# gloo raises plain RuntimeErrors.
_LOST = ("gloo/transport", "Connection closed by peer", "Connection reset by peer", "Timed out waiting")


def is_lost_rank(error: BaseException) -> bool:
    """Whether a collective failed because another rank is gone or does not answer."""
    return isinstance(error, dist.DistError) or any(words in str(error) for words in _LOST)


@contextmanager
def naming_lost_ranks() -> Iterator[None]:
    """Turn the error of a collective whose other ranks are gone into a message that a person understands.

    Raises:
        UserError: In place of what a collective raises when its connection breaks or it waited too long.
    """
    try:
        yield
    except RuntimeError as error:
        if not is_lost_rank(error):
            raise
        raise UserError(
            f"Another rank of this run is gone or did not answer: {str(error).splitlines()[0]}. Look for the first "
            "error of the others; a process that was killed leaves none (out of memory?). Checkpoints are whole: run "
            "the same command again to go on."
        ) from error


@contextmanager
def join_ranks(replicate: int = 1, timeout_minutes: float = 30.0) -> Iterator[Ranks]:
    """Join the processes that ``torchrun`` started, or be the only one.

    Computes on CUDA with NCCL where there is a GPU, else on the CPU with gloo.

    Args:
        replicate: Groups of ranks that each hold a full set of shards (hybrid sharding); divides the number of ranks.
        timeout_minutes: How long a collective waits for a rank that does not answer.

    Raises:
        UserError: If ``replicate`` does not divide the number of ranks, or the ranks cannot find each other.
    """
    size, rank = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("RANK", "0"))
    if size % replicate:
        raise UserError(
            f"parallel.replicate is {replicate}, which does not divide the {size} rank(s) of this run. Choose a "
            "divisor."
        )
    device = torch.device("cpu")
    backend = "gloo"
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(device)
        backend = "cpu:gloo,cuda:nccl"
    timeout = timedelta(minutes=timeout_minutes)
    try:
        if size > 1:
            dist.init_process_group(backend, timeout=timeout)
        else:
            # Alone, a rank needs no address: a store in memory does, and no port is taken.
            store = dist.HashStore()  # type: ignore[attr-defined]
            dist.init_process_group(backend, timeout=timeout, store=store, rank=rank, world_size=size)
    except (RuntimeError, ValueError) as error:
        raise UserError(
            f"The {size} ranks of this run did not find each other: {error}. Start them by torchrun."
        ) from error
    try:
        background = dist.new_group(backend="gloo", timeout=timeout)
        shape = (size,) if replicate == 1 else (replicate, size // replicate)
        names = ("shard",) if replicate == 1 else ("replicate", "shard")
        mesh = init_device_mesh(device.type, shape, mesh_dim_names=names)
        yield Ranks(rank, size, device, mesh, background)
        # Leaving together: a rank that closes its connections early would look like one that died.
        dist.barrier()
    finally:
        dist.destroy_process_group()
