"""Random numbers that belong to a sample, not to a process.

Every number is a function of the seed, what it is for, the step, and the sample's place in the global batch. So a run
gives the same curve on one rank or many, and a resumed run draws what an uninterrupted one would have drawn, with
nothing to save.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor

Key = tuple[int | str, ...]


class SampleDraws:
    """Random numbers of the samples of a batch, each from its own stream.

    Args:
        key: What the numbers are for: seed, purpose, step, and so on.
        samples: Places of the samples in the global batch.
        device: Where numbers are drawn. Streams of different kinds of device differ.
    """

    def __init__(self, key: Key, samples: Sequence[int], device: torch.device) -> None:
        self.device = device
        self._streams = [torch.Generator(device).manual_seed(_seed((*key, sample))) for sample in samples]

    def normal(self, shape: Sequence[int]) -> Tensor:
        """Standard normal ``[B, *shape]``, float32."""
        return torch.stack([torch.randn(*shape, generator=stream, device=self.device) for stream in self._streams])

    def uniform(self) -> Tensor:
        """Uniform in [0, 1), ``[B]``, float32."""
        return torch.cat([torch.rand(1, generator=stream, device=self.device) for stream in self._streams])


def shared_integer(key: Key, below: int) -> int:
    """A uniform integer in [0, below) that is the same on every rank."""
    return int(torch.randint(below, (), generator=torch.Generator().manual_seed(_seed(key))))


def _seed(key: Key) -> int:
    # Python's own hash() differs between processes.
    return int.from_bytes(hashlib.blake2b(repr(key).encode(), digest_size=7).digest(), "big")
