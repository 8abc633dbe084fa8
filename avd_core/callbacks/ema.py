"""An exponential moving average of the weights."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch

from avd_core._checks import check_number
from avd_core.callbacks.base import Callback, Metrics


class EMACallback(Callback):
    """Keeps an exponential moving average of parameters, by torch-ema.

    Few-step students change much from update to update. Sample from the average and export it.

    Reads no metrics. Needs the ``torch-ema`` package: ``pip install "avd-core[ema]"``.

    Args:
        parameters: The student's parameters. The average is kept in float32 on their device. In bfloat16 it would not
            change, since a hundredth of a step is smaller than the last digit.
        decay: In [0, 1). The average covers about ``1 / (1 - decay)`` steps.
        warmup: Whether the decay starts low and rises with the number of updates, so that the first averages are not
            the initial weights (torch-ema's ``use_num_updates``).
        held_in: Tensors to keep the averages in, one for each parameter, in its shape and in float32: such as the
            parameters of a frozen copy of the student, which then is the averaged student whenever it is called. They
            are overwritten with the parameters' values at the start. None keeps the averages in tensors of their own.

    Raises:
        ImportError: If torch-ema is not installed.
        ValueError: If there are no parameters, decay is outside [0, 1), or ``held_in`` does not fit the parameters.
    """

    def __init__(
        self,
        parameters: Iterable[torch.nn.Parameter],
        decay: float = 0.99,
        *,
        warmup: bool = True,
        held_in: Iterable[torch.Tensor] | None = None,
    ) -> None:
        try:
            from torch_ema import ExponentialMovingAverage
        except ImportError as error:
            raise ImportError(
                'EMACallback needs torch-ema: pip install "avd-core[ema]" or pip install torch-ema.'
            ) from error
        parameters = list(parameters)
        if not parameters:
            raise ValueError("EMACallback needs at least one parameter, got none.")
        check_number("decay", decay, at_least=0, below=1)
        self._parameters = parameters
        self._average = ExponentialMovingAverage(self._in_float32(), decay=decay, use_num_updates=warmup)
        self._held_in = None if held_in is None else [tensor.detach() for tensor in held_in]
        self._hold()

    def after_step(self, step: int, metrics: Metrics) -> None:
        self._average.update(self._in_float32())

    @contextmanager
    def average_parameters(self) -> Iterator[None]:
        """Within this context the parameters hold their average; afterwards, also on an error, their own values."""
        try:
            with self._average.average_parameters(self._parameters):
                yield
        finally:
            # torch-ema would keep the weights that it set aside, a whole model, until the next time.
            self._average.collected_params = None

    def _in_float32(self) -> list[torch.Tensor]:
        return [p.detach().to(torch.promote_types(p.dtype, torch.float32)) for p in self._parameters]

    def state_dict(self) -> dict[str, Any]:
        state: dict[str, Any] = self._average.state_dict()
        # Weights that were set aside belong to a context that does not survive a restart.
        return {key: value for key, value in state.items() if key != "collected_params"}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        self._average.load_state_dict({**state_dict, "collected_params": None})
        self._hold()

    @torch.no_grad()
    def _hold(self) -> None:
        """Move the averages to where they are to be kept."""
        if self._held_in is None:
            return
        shadows = self._average.shadow_params
        expected = [(shadow.shape, shadow.dtype) for shadow in shadows]
        found = [(tensor.shape, tensor.dtype) for tensor in self._held_in]
        if found != expected:
            wrong = next((pair for pair in zip(found, expected, strict=False) if pair[0] != pair[1]), None)
            detail = f"{len(found)} for {len(expected)}" if wrong is None else f"{wrong[0]} for {wrong[1]}"
            raise ValueError(
                f"held_in must have a tensor for each parameter, in its shape and in float32, got {detail}. Pass the "
                "parameters of a copy of the module that is averaged, in the same order."
            )
        for tensor, shadow in zip(self._held_in, shadows, strict=True):
            tensor.copy_(shadow)
        self._average.shadow_params = list(self._held_in)
