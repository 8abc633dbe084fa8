"""What every loss of this package returns."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class LossOutput(NamedTuple):
    """A loss and what is worth logging about it; unpacks as ``loss, metrics = ...``.

    Attributes:
        loss: Scalar, float32 at least, already multiplied by the loss's weight: add it to your total.
        metrics: Detached tensors on the loss's device. Reading one (``.item()``) waits for the device; storing it does
            not.
    """

    loss: Tensor
    metrics: dict[str, Tensor]
