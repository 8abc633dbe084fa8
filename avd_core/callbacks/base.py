"""The protocol that connects a training loop, any training loop, with a callback."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

Metrics = Mapping[str, Tensor]


class Callback:
    """The calls by which a training loop talks to a callback.

    A loop uses it like this::

        loss.backward()
        metrics = {"loss": loss.detach(), "gradient_norm": clip_grad_norm_(parameters, 10.0), "x_0": x_0.detach()}
        if callback.before_step(step, metrics):   # every rank gets the same answer
            optimizer.step()
            callback.after_step(step, metrics)
        optimizer.zero_grad()

    and puts ``callback.state_dict()`` into its checkpoints. ``metrics`` maps names to detached tensors; a callback's
    docstring lists the names that it reads, and it ignores all others. All methods have a default, so a callback
    overrides only what it needs.
    """

    def before_step(self, step: int, metrics: Metrics) -> bool:
        """Gradients are ready. Returns whether the optimizer should step."""
        return True

    def after_step(self, step: int, metrics: Metrics) -> None:
        """The optimizer has stepped."""

    def state_dict(self) -> dict[str, Any]:
        """What has to survive a restart: tensors, numbers, strings and containers of them."""
        return {}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Restore what :meth:`state_dict` gave."""


class NamedCallbacks(Callback):
    """Several callbacks as one, asked in order.

    Args:
        callbacks: Names and callbacks. The names become the keys of ``state_dict()``.
    """

    def __init__(self, callbacks: Mapping[str, Callback]) -> None:
        for name, callback in callbacks.items():
            if not isinstance(callback, Callback):
                raise TypeError(f"callback {name!r} must be a Callback, got {type(callback).__name__}.")
        self.callbacks = dict(callbacks)

    def before_step(self, step: int, metrics: Metrics) -> bool:
        """True if every callback agrees; all of them are asked, since an answer can be a collective."""
        answers = [callback.before_step(step, metrics) for callback in self.callbacks.values()]
        return all(answers)

    def after_step(self, step: int, metrics: Metrics) -> None:
        for callback in self.callbacks.values():
            callback.after_step(step, metrics)

    def state_dict(self) -> dict[str, Any]:
        return {name: callback.state_dict() for name, callback in self.callbacks.items()}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        if set(state_dict) != set(self.callbacks):
            raise ValueError(
                f"The saved state is of the callbacks {sorted(state_dict)}, these are {sorted(self.callbacks)}. "
                "Construct the same callbacks as the run that saved it."
            )
        for name, callback in self.callbacks.items():
            callback.load_state_dict(state_dict[name])
