"""Skipping steps whose loss or gradient is not finite."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from avd_core._distributed import sum_over_ranks, world_size
from avd_core.callbacks.base import Callback, Metrics

logger = logging.getLogger(__name__)


class NonFiniteError(RuntimeError):
    """Too many steps in a row were not finite. Raised on all ranks at the same step."""


class NonFiniteGuard(Callback):
    """Asks the loop to skip a step when the loss or the gradient of any rank is NaN or infinite.

    All ranks decide together, so no rank waits for another that has skipped.

    Reads these metrics; at least one must be there:

    ==================  ====================================================
    ``loss``            scalar, the total loss
    ``gradient_norm``   scalar, the gradient norm before clipping
    ==================  ====================================================

    Waits for the device once per step, because the decision needs the value.

    Args:
        max_consecutive: Skipped steps in a row after which :class:`NonFiniteError` is raised, at least 1.
        name: What is trained, for the messages.
        sync_ranks: Whether ranks agree; a collective.
        process_group: The ranks; None is the default group.

    Attributes:
        skipped: Steps skipped so far.
        consecutive: Steps skipped since the last finite one.
    """

    _keys = ("loss", "gradient_norm")

    def __init__(
        self,
        max_consecutive: int = 10,
        *,
        name: str = "model",
        sync_ranks: bool = True,
        process_group: ProcessGroup | None = None,
    ) -> None:
        if max_consecutive < 1:
            raise ValueError(f"max_consecutive must be at least 1, got {max_consecutive}.")
        self.max_consecutive = max_consecutive
        self.name = name
        self.sync_ranks = sync_ranks
        self.process_group = process_group
        self.skipped = 0
        self.consecutive = 0

    def before_step(self, step: int, metrics: Metrics) -> bool:
        watched = {key: metrics[key] for key in self._keys if key in metrics}
        if not watched:
            raise ValueError(f"NonFiniteGuard needs one of the metrics {list(self._keys)}, got {sorted(metrics)}.")
        bad = torch.stack([(~_gather_full(value).isfinite()).any().float() for value in watched.values()])
        if self.sync_ranks and world_size(self.process_group) > 1:
            bad = sum_over_ranks(bad, self.process_group)
        ranks_by_key = {key: int(count) for key, count in zip(watched, bad.tolist(), strict=True) if count}
        if not ranks_by_key:
            self.consecutive = 0
            return True
        self.skipped += 1
        self.consecutive += 1
        what = ", ".join(f"{key} on {ranks} rank(s)" for key, ranks in ranks_by_key.items())
        if self.consecutive >= self.max_consecutive:
            raise NonFiniteError(
                f"Step {step} of the {self.name} is not finite: {what}; {self.consecutive} in a row. Lower the "
                "learning rate, check the data of these steps, and resume from a checkpoint before them."
            )
        logger.warning(
            "Step %d of the %s skipped, not finite: %s (%d in a row).", step, self.name, what, self.consecutive
        )
        return False

    def state_dict(self) -> dict[str, Any]:
        return {"skipped": self.skipped, "consecutive": self.consecutive}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        self.skipped, self.consecutive = int(state_dict["skipped"]), int(state_dict["consecutive"])


def _gather_full(value: Tensor) -> Tensor:
    """Gradient norms of FSDP2 models are sharded; every rank takes part in putting them together."""
    full: Tensor = value.full_tensor() if hasattr(value, "full_tensor") else value
    return full
