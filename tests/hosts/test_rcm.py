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
