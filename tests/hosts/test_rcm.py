"""The adapter of rCM in its real trainer, model, configuration and checkpoints, on CPU."""

from collections.abc import Callable
from typing import Any

import pytest

pytestmark = pytest.mark.hosts


def test_rcm_trains_saves_and_goes_on(run_in_host: Callable[..., dict[str, Any]]) -> None:
    report = run_in_host("rcm", "rcm_trainer.py")
    assert report["scale"] == 2 * 16 * 21 * 60 * 104
    assert report["steps"] == [*range(8), 8, 8, 9, 9, 10, 10, 11, 11]  # the last four of two batches each
    assert len(report["means"]) >= 3


def test_what_needs_several_gpus_is_as_it_was_read(run_in_host: Callable[..., dict[str, Any]]) -> None:
    run_in_host("rcm", "rcm_contract.py")


def test_our_losses_are_those_of_the_authors(run_in_host: Callable[..., dict[str, Any]]) -> None:
    """In float32. With finite differences of 1e-4, rounding alone is 1e-3 of the derivative."""
    report = run_in_host("rcm", "rcm_losses.py")
    small = report.pop("small step")
    assert max(small.values()) < 1e-2, small
    assert len(report) == 9
    for name, found in report.items():
        assert max(found.values()) < 1e-5, (name, found)
