"""What every loss of this package returns."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class LossOutput(NamedTuple):
    """A loss and its metrics; unpacks as ``loss, metrics = ...``.

    Attributes:
        loss: Scalar, float32 at least, already multiplied by the loss's weight: add it to your total.
        metrics: Detached tensors on the loss's device: scalars, or one value per sample ``[B]``. Reading a value waits
            for the device; keeping the tensor does not.
    """

    loss: Tensor
    metrics: dict[str, Tensor]

    def scalars(self) -> dict[str, float]:
        """The metrics as Python numbers, for any logger: what has one value per sample is averaged over the samples.

        NaN stays NaN. Waits for the device, once for all values: call it only in steps that are logged.

        >>> LossOutput(torch.tensor(1.0), {"weights": torch.tensor([0.5, 1.5])}).scalars()
        {'weights': 1.0}
        """
        if not self.metrics:
            return {}
        values: list[float] = torch.stack([value.mean() for value in self.metrics.values()]).tolist()
        return dict(zip(self.metrics, values, strict=True))
