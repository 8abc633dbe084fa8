"""The few questions this package asks of torch.distributed."""

from __future__ import annotations

import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup


def world_size(group: ProcessGroup | None) -> int:
    """Ranks in ``group`` (None: the default group); 1 where torch.distributed is absent or was never initialised."""
    if not (dist.is_available() and dist.is_initialized()):
        return 1
    return dist.get_world_size(group)


def sum_over_ranks(values: Tensor, group: ProcessGroup | None) -> Tensor:
    """The element-wise sum of ``values`` over the ranks of ``group``. A collective: every rank of it must call."""
    total = values.clone()
    dist.all_reduce(total, op=dist.ReduceOp.SUM, group=group)
    return total
