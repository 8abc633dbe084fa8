"""The order in which training reads a data set. It depends on seed and position only."""

from __future__ import annotations

import torch
from torch import Tensor


class ShuffledOrder:
    """An endless shuffled order without state: the position says which index comes next.

    Position ``p`` is in epoch ``p // length``. Each epoch is a permutation that depends on ``(seed, epoch)``, so each
    index comes exactly once in it. Ranks and steps only share out the positions. So any batch size and any number of
    ranks reads the same sequence, also if the number of ranks changes on resuming.

    Args:
        length: Number of examples.
        seed: Different seeds give unrelated orders.

    Raises:
        ValueError: If ``length`` is below 1.
    """

    def __init__(self, length: int, seed: int) -> None:
        if length < 1:
            raise ValueError(f"ShuffledOrder needs length >= 1, got {length}.")
        self.length, self.seed = length, seed
        self._permutations: dict[int, Tensor] = {}

    def __getitem__(self, position: int) -> int:
        """The index of the example at ``position``, any integer from 0."""
        if position < 0:
            raise IndexError(f"Positions start at 0, got {position}.")
        epoch, within = divmod(position, self.length)
        return int(self._permutation(epoch)[within])

    def batch(self, start: int, count: int) -> list[int]:
        """The indices at ``start, ..., start + count - 1``; a batch may span epochs."""
        return [self[position] for position in range(start, start + count)]

    def _permutation(self, epoch: int) -> Tensor:
        if epoch not in self._permutations:
            # Two epochs are enough: a batch that spans them goes from one to the next and never back.
            self._permutations = {key: value for key, value in self._permutations.items() if key == epoch - 1}
            generator = torch.Generator().manual_seed((self.seed * 1_000_003 + epoch) % 2**63)
            self._permutations[epoch] = torch.randperm(self.length, generator=generator)
        return self._permutations[epoch]
