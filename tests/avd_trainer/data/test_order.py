from collections.abc import Sequence

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from avd_trainer.data.order import ShuffledOrder


@given(
    length=st.integers(1, 40),
    seed=st.integers(0, 2**40),
    steps=st.lists(st.tuples(st.integers(1, 4), st.integers(1, 9)), min_size=1, max_size=12),
)
def test_within_an_epoch_each_index_comes_once(length: int, seed: int, steps: list[tuple[int, int]]) -> None:
    """Whatever the number of ranks and the batch size, also when they change in mid-epoch."""
    seen: list[int] = []
    for ranks, batch in steps:
        position = len(seen)
        for rank in range(ranks):
            seen += ShuffledOrder(length, seed).batch(position + rank * batch, batch)
    for start in range(0, len(seen) - length + 1, length):
        assert sorted(seen[start : start + length]) == list(range(length))
    rest = seen[len(seen) // length * length :]
    assert len(set(rest)) == len(rest)


def read_as(order: ShuffledOrder, positions: Sequence[int]) -> list[int]:
    return [order[position] for position in positions]


def test_an_order_has_no_memory() -> None:
    order = ShuffledOrder(7, 3)
    forwards = read_as(order, range(35))
    assert read_as(order, range(34, -1, -1)) == forwards[::-1]
    assert read_as(ShuffledOrder(7, 3), [20]) == [forwards[20]]
    assert order.batch(5, 20) == forwards[5:25]


def test_epochs_and_seeds_differ() -> None:
    epochs = [tuple(ShuffledOrder(50, seed).batch(50 * epoch, 50)) for seed in range(5) for epoch in range(5)]
    assert len(set(epochs)) == 25


def test_an_epoch_is_drawn_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """A permutation of a large data set takes time: positions that go forth, and back by an epoch, share it."""
    drawn: list[int] = []
    randperm = torch.randperm

    def count(length: int, generator: torch.Generator) -> torch.Tensor:
        drawn.append(length)
        return randperm(length, generator=generator)

    monkeypatch.setattr(torch, "randperm", count)
    order = ShuffledOrder(10, 0)
    for position in (0, 5, 9, 12, 8, 19, 9, 10):
        order[position]
    assert len(drawn) == 2
    order.batch(20, 10)
    assert len(order._permutations) == 2


def test_positions_and_lengths_are_checked() -> None:
    with pytest.raises(ValueError, match="length >= 1"):
        ShuffledOrder(0, 0)
