"""Tensors and states of the tests: drawing, copying, comparing, cutting up."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


def randn(seed: int, *shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """Normal numbers that depend on the arguments alone."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def state_of(module: nn.Module) -> dict[str, Tensor]:
    """A copy of the state that later calls do not change."""
    return {name: value.clone() for name, value in module.state_dict().items()}


def assert_same_state(actual: Any, expected: Any) -> None:
    """Bit for bit, through mappings and sequences."""
    assert type(actual) is type(expected), f"{actual!r} and {expected!r}"
    if isinstance(expected, dict):
        assert list(actual) == list(expected)
        for name in expected:
            assert_same_state(actual[name], expected[name])
    elif isinstance(expected, list | tuple):
        assert len(actual) == len(expected)
        for a, e in zip(actual, expected, strict=True):
            assert_same_state(a, e)
    elif isinstance(expected, Tensor):
        torch.testing.assert_close(actual, expected, rtol=0, atol=0, equal_nan=True)
    else:
        assert actual == expected


def cut(items: list[Any], cuts: list[bool]) -> list[list[Any]]:
    """Consecutive parts of ``items``; ``cuts[i]`` says whether one ends behind item ``i``. Every split can be drawn."""
    parts: list[list[Any]] = [[]]
    for item, end in zip(items, [*cuts, False], strict=True):
        parts[-1].append(item)
        if end:
            parts.append([])
    return parts
