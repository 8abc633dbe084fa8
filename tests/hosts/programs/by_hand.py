"""Eq. 5-7 once more, in plain Python, and a record of what an adapter was called with."""

import contextlib
import functools
import inspect
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from torch import Tensor, nn

from avd_core import LossMeanCache, LossOutput
from references import ReferenceCache, mean, reference_sample_losses, reference_weights


class RegressionByHand:
    """The regression's loss; keeps its own means."""

    def __init__(self, sharpness: float = 3.0) -> None:
        self.cache, self.sharpness = ReferenceCache(), sharpness
        self.running = []

    @property
    def means(self) -> dict[float, float]:
        return self.cache.means

    def __call__(self, prediction: Any, target: Any, times: list[float]) -> float:
        """Of arrays or tensors ``[B, ...]``, and times as the cache's grid has them; an optimizer step of its own."""
        loss = self.accumulate(prediction, target, times)
        self.end_step()
        return loss

    def accumulate(self, prediction: Any, target: Any, times: list[float]) -> float:
        """The same of one of several micro-batches."""
        losses = reference_sample_losses(prediction.tolist(), target.tolist())
        usual = [self.cache.read(time, loss) for time, loss in zip(times, losses, strict=True)]
        weights = reference_weights(losses, usual, self.sharpness, weight=2.0)
        self.running += zip(times, losses, strict=True)
        return mean([weight * loss for weight, loss in zip(weights, losses, strict=True)])

    def end_step(self) -> None:
        self.cache.iterate(self.running)
        self.running = []

    def check_cache(self, cache: LossMeanCache) -> None:
        """That an adapter's cache, in training, is at the same point."""
        assert cache.training
        for time, value, seen in zip(cache.timesteps.tolist(), cache.means.tolist(), cache.seen.tolist(), strict=True):
            assert seen == (time in self.means), (time, seen, self.means)
            assert not seen or abs(value - self.means[time]) <= 1e-4 * self.means[time], (time, value, self.means)


class Calls:
    """Arguments, loss and cache of every call of ``from_prediction`` of a class of terms, whoever makes it.

    Arguments are in the order in which the method has them.
    """

    def __init__(self, kind: type[Any]) -> None:
        self.arguments, self.losses, self.before, self.after = [], [], [], []
        method = kind.from_prediction
        names = list(inspect.signature(method).parameters)[1:]

        @functools.wraps(method)
        def recorded(terms: nn.Module, **given: Tensor) -> LossOutput:
            self.arguments.append([given[name].detach().clone() for name in names])
            self.before.append(state_of(terms))
            output = method(terms, **given)
            self.losses.append(output.loss.item())
            self.after.append(state_of(terms))
            return output

        kind.from_prediction = recorded

    def clear(self) -> None:
        for log in (self.arguments, self.losses, self.before, self.after):
            log.clear()


def noting(method: Callable[..., Any], log: list[Any]) -> Callable[..., Any]:
    """A host's method; arguments and result of each call go to the log."""

    @functools.wraps(method)
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        result = method(self, *args, **kwargs)
        log.append((args, kwargs, result))
        return result

    return call


def state_of(module: nn.Module) -> dict[str, Any]:
    return {name: value.tolist() for name, value in module.state_dict().items()}


def close(a: float, b: float, tolerance: float = 1e-4, slack: float = 0.0) -> None:
    assert abs(a - b) <= tolerance * max(abs(a), abs(b)) + slack, f"{a} is not {b}"


def columns(*arrays: Any) -> list[np.ndarray]:
    """``[B]`` arrays as ``[B, 1, 1, ...]``, float64, to go with the last one."""
    *vectors, like = (np.asarray(a, np.float64) for a in arrays)
    return [v.reshape(-1, *[1] * (like.ndim - 1)) for v in vectors]


def shifted(sigma: Any, shift: float) -> Any:
    """Noise levels in [0, 1] of rectified flow, moved towards 1 as its schedulers do."""
    return shift * sigma / (1 + (shift - 1) * sigma)


@contextlib.contextmanager
def backward_losses() -> Iterator[list[float]]:
    """A list that gets each loss from which an ``accelerate.Accelerator`` goes back."""
    from accelerate import Accelerator

    losses, backward = [], Accelerator.backward

    def recorded(self: Any, loss: Tensor, **options: Any) -> None:
        losses.append(loss.item())
        backward(self, loss, **options)

    Accelerator.backward = recorded
    try:
        yield losses
    finally:
        Accelerator.backward = backward


def check_losses(calls: Calls, loss_by_hand: Callable[[list[Tensor]], float], tolerance: float = 1e-4) -> None:
    """That each recorded loss is the equation's, which is computed from the arguments of the call."""
    for arguments, loss in zip(calls.arguments, calls.losses, strict=True):
        close(loss_by_hand(arguments), loss, tolerance)


def check_two_steps(
    run_plain: Callable[[], list[float]],
    run_edited: Callable[[], list[float]],
    calls: Calls,
    loss_by_hand: Callable[[list[Tensor]], float],
) -> None:
    """Each two steps of a host's script, which return its losses: what a page's lines add is the equation's."""
    alone, both = run_plain(), run_edited()
    assert len(calls.losses) == len(alone) == len(both) == 2
    close(both[0] - alone[0], calls.losses[0])
    check_losses(calls, loss_by_hand)


def check_resume(resume: Callable[[], object], calls: Calls, loss_by_hand: Callable[[list[Tensor]], float]) -> None:
    """``resume()``, two more steps of a host's script: the cache goes on where it was."""
    saved = calls.after[-1]
    calls.clear()
    resume()
    assert calls.before[0] == saved
    assert len(calls.losses) == 2
    check_losses(calls, loss_by_hand)
