"""What an update consists of, whatever is trained: the ranks' shares of a batch, AdamW, means over all of them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from avd_trainer.config.sections import OptimizerConfig
from avd_trainer.data.order import ShuffledOrder
from avd_trainer.runtime.errors import UserError
from avd_trainer.runtime.ranks import Ranks

Metrics = dict[str, Tensor]


def share_batch(batch_size: int, micro_batch_size: int | None, ranks: Ranks) -> list[range]:
    """Places in the global batch of this rank's examples, micro-batch by micro-batch.

    Args:
        batch_size: Examples per update, over all ranks.
        micro_batch_size: Examples per micro-batch; None takes the whole share at once.
        ranks: The processes of the run.

    Raises:
        UserError: If the batch cannot be shared out equally.
    """
    if batch_size % ranks.size:
        raise UserError(
            f"batch_size {batch_size} cannot be shared out equally among {ranks.size} ranks. Choose a multiple, or "
            "another number of ranks."
        )
    share = batch_size // ranks.size
    size = micro_batch_size or share
    if share % size:
        raise UserError(
            f"micro_batch_size {size} does not divide a rank's share of {share} examples (batch_size {batch_size} over "
            f"{ranks.size} ranks). Choose a divisor."
        )
    first = ranks.rank * share
    return [range(start, start + size) for start in range(first, first + share, size)]


def indices_by_micro_batch(
    order: ShuffledOrder, updates: range, batch_size: int, micro_batches: Sequence[range]
) -> Iterator[list[int]]:
    """Which examples this rank reads for each micro-batch of each update, shared out by :func:`share_batch`."""
    for update in updates:
        for places in micro_batches:
            yield order.batch(update * batch_size + places[0], len(places))


def adamw(parameters: Mapping[str, nn.Parameter], config: OptimizerConfig) -> torch.optim.AdamW:
    """An optimizer with its state from the start.

    So a checkpoint has somewhere to be read into, and memory that does not suffice is missed before the first step
    rather than after it.
    """
    optimizer = torch.optim.AdamW(
        parameters.values(), lr=config.lr, betas=config.betas, weight_decay=config.weight_decay, fused=True
    )
    for parameter in parameters.values():
        optimizer.state[parameter] = {
            "step": torch.zeros((), device=parameter.device),
            "exp_avg": torch.zeros_like(parameter),
            "exp_avg_sq": torch.zeros_like(parameter),
        }
    return optimizer


def set_rates(
    optimizer: torch.optim.Optimizer, config: OptimizerConfig, step: int, max_steps: int, share: float = 1.0
) -> None:
    """Set what the schedule says of a step, counted from 1: a function of it, so that there is nothing to save.

    ``share`` is that of the learning rate which the step takes.
    """
    for group in optimizer.param_groups:
        _set_rates(group, config, step, max_steps)
        group["lr"] *= share


def _set_rates(group: dict[str, Any], config: OptimizerConfig, step: int, max_steps: int) -> None:
    if config.schedule == "constant":
        group["lr"] = config.lr
    elif config.schedule == "cosine":
        group["lr"] = _along_cosine(config.lr, 0.0, (step - 1) / max_steps)
    else:
        peak, last = 0.3 * max_steps - 1, max_steps - 1
        low = config.lr / 25
        if step - 1 <= peak:
            part, (lr, beta) = (step - 1) / peak, ((low, config.lr), (0.95, 0.85))
        else:
            part, (lr, beta) = (step - 1 - peak) / (last - peak), ((config.lr, low / 1e4), (0.85, 0.95))
        group["lr"] = _along_cosine(*lr, part)
        group["betas"] = (_along_cosine(*beta, part), group["betas"][1])


def _along_cosine(start: float, end: float, part: float) -> float:
    return end + (start - end) * (1 + math.cos(math.pi * part)) / 2


def optimizer_tensors(parameters: Mapping[str, nn.Parameter], optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The optimizer's state by name, the very tensors that it changes."""
    return {
        f"{name}.{key}": value.detach()
        for name, parameter in parameters.items()
        for key, value in optimizer.state[parameter].items()
    }


def detached(parameters: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
    """Parameters by name, the very tensors, without their gradients."""
    return {name: parameter.detach() for name, parameter in parameters.items()}


def gather_full(value: Tensor) -> Tensor:
    """A tensor put together from its shards; a collective where it has any."""
    return value.full_tensor() if isinstance(value, DTensor) else value


def mean_over_micro_batches(parts: Sequence[Metrics]) -> Metrics:
    """Means of scalars, and lists put together, over the micro-batches of an accumulated step."""
    return {
        name: torch.cat([part[name] for part in parts]) if value.ndim else torch.stack([p[name] for p in parts]).mean()
        for name, value in parts[0].items()
    }


def mean_over_ranks(metrics: Metrics, ranks: Ranks) -> Metrics:
    """Means of scalars, and lists put together, over all ranks. A collective."""
    flat = torch.cat([value.detach().float().flatten() for value in metrics.values()])
    by_rank = torch.split(ranks.gather(flat), [value.numel() for value in metrics.values()], dim=1)
    return {
        name: part.mean() if value.ndim == 0 else part.flatten()
        for (name, value), part in zip(metrics.items(), by_rank, strict=True)
    }
