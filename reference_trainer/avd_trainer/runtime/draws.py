"""Random numbers that belong to a sample, not to a process.

Every number is a function of the seed, what it is for, the step, and the sample's place in the global batch. So a run
gives the same curve on one rank or many, and a resumed run draws what an uninterrupted one would have drawn, with
nothing to save.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

Key = tuple[int | str, ...]


class Draws:
    """Random numbers of the samples of a batch, each from its own stream.

    Args:
        key: What the numbers are for: seed, role, step, and so on.
        samples: Places of the samples in the global batch.
        device: Where numbers are drawn. Streams of different kinds of device differ.
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
        """:meth:`normal` of one name, for what draws as often as it likes."""
        return partial(self.normal, name)

    def shared_integer(self, name: str, below: int) -> int:
        """A uniform integer in [0, below) that is the same for all samples, and so on every rank."""
        role = {"student": "generator"}.get(str(self._key[1]), self._key[1])
        return int(torch.randint(below, (), generator=_generator((self._key[0], role, *self._key[2:], "last"))))

    def _of(self, name: str) -> list[torch.Generator]:
        purpose = "regression" if name.startswith("regression") else self._key[1]
        purpose = {"student": "generator"}.get(str(purpose), purpose)
        if purpose not in self._streams:
            key = (self._key[0], purpose, *self._key[2:])
            self._streams[purpose] = [_generator((*key, place), self.device) for place in self._samples]
        return self._streams[purpose]


def _generator(key: Key, device: torch.device | str = "cpu") -> torch.Generator:
    # Python's own hash() differs between processes.
    seed = int.from_bytes(hashlib.blake2b(repr(key).encode(), digest_size=7).digest(), "big")
    return torch.Generator(device).manual_seed(seed)
