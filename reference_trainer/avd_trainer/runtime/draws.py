"""Random numbers that belong to a sample and have a name.

Every number depends only on the seed, its name, the step, and the sample's place in the global batch. So a run gives
the same curve on one rank or many. A resumed run draws what an uninterrupted one would have drawn, with nothing to
save. And a method that draws one more number shifts no other.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

Key = tuple[int | str, ...]


class Draws:
    """Random numbers of the samples of a batch: a stream for each name and sample.

    Drawing again with the same name continues its stream.

    Args:
        key: What the numbers are for: seed, role, step, and so on.
        samples: Places of the samples in the global batch.
        device: Where numbers are drawn. CPU and GPU give different numbers.
    """

    def __init__(self, key: Key, samples: Sequence[int], device: torch.device) -> None:
        self.device = device
        self._key, self._samples = key, samples
        self._streams: dict[str, list[torch.Generator]] = {}

    def normal(self, name: str, shape: Sequence[int]) -> Tensor:
        """Standard normal ``[B, *shape]``, float32."""
        return torch.stack([torch.randn(*shape, generator=s, device=self.device) for s in self._of(name)])

    def uniform(self, name: str) -> Tensor:
        """Uniform in [0, 1), ``[B]``, float32."""
        return torch.cat([torch.rand(1, generator=s, device=self.device) for s in self._of(name)])

    def named(self, name: str) -> Callable[[Sequence[int]], Tensor]:
        """:meth:`normal` with a fixed name, for code that draws several times."""
        return partial(self.normal, name)

    def shared_integer(self, name: str, below: int) -> int:
        """A uniform integer in [0, below), the same for all samples and so on all ranks."""
        return int(torch.randint(below, (), generator=torch.Generator().manual_seed(seed_of(*self._key, name))))

    def _of(self, name: str) -> list[torch.Generator]:
        if name not in self._streams:
            self._streams[name] = [
                torch.Generator(self.device).manual_seed(seed_of(*self._key, name, place)) for place in self._samples
            ]
        return self._streams[name]


def seed_of(*key: int | str) -> int:
    """A seed in [0, 2^56) for a key. Different keys give unrelated seeds."""
    # Python's own hash() differs between processes.
    return int.from_bytes(hashlib.blake2b(repr(key).encode(), digest_size=7).digest(), "big")
