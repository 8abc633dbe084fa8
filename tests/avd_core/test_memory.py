"""How much memory a loss asks for beyond its input, counted over every tensor that is alive."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from avd_core import ClippedTemporalVarianceLoss


class PeakMemory(TorchDispatchMode):
    """Bytes of the storages that operations made, at the moment when most of them were alive."""

    def __init__(self, *existing: Tensor) -> None:
        super().__init__()
        self.existing = {tensor.untyped_storage()._cdata for tensor in existing}
        self.alive: dict[int, tuple[StorageWeakRef, int]] = {}
        self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(output):
            if isinstance(tensor, Tensor) and tensor.untyped_storage()._cdata not in self.existing:
                storage = tensor.untyped_storage()
                self.alive[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        self.alive = {key: entry for key, entry in self.alive.items() if not entry[0].expired()}
        self.peak = max(self.peak, sum(size for _, size in self.alive.values()))
        return output


def peak_share(loss: Callable[[Tensor], Tensor], x: Tensor) -> float:
    """Peak of forward and backward as a multiple of the input."""
    with PeakMemory(x) as memory:
        loss(x).backward()
    return memory.peak / x.untyped_storage().nbytes()


@pytest.mark.parametrize(("shape", "frame_dim"), [((1, 16, 21, 60, 104), 2), ((1, 21, 16, 60, 104), 1)])
def test_motion_needs_its_gradient_and_an_eighth_of_its_input(shape: tuple[int, ...], frame_dim: int) -> None:
    motion = ClippedTemporalVarianceLoss(floor=-5.0, frame_dim=frame_dim)
    x = torch.randn(shape, requires_grad=True)
    assert 1 <= peak_share(lambda x: motion(x).loss, x) <= 1 + 1 / 8


def test_the_count_sees_what_the_plain_form_needs() -> None:
    x = torch.randn(1, 16, 21, 12, 13, requires_grad=True)
    plain = peak_share(lambda x: -torch.log((x - x.mean(2, keepdim=True)).square().mean()), x)
    assert plain > 2
