"""The adapter of CausVid's family in the real trainers, on CPU."""

from collections.abc import Callable
from typing import Any

import pytest

pytestmark = pytest.mark.hosts


def test_self_forcing_trains_saves_and_goes_on(run_in_host: Callable[..., dict[str, Any]]) -> None:
    report = run_in_host("Self-Forcing", "self_forcing_trainer.py")
    assert len(report["steps"]) == len(report["means"]) == 4


def test_causvid_trains_on_its_own_clips_saves_and_goes_on(run_in_host: Callable[..., dict[str, Any]]) -> None:
    report = run_in_host("CausVid", "causvid_trainer.py", "causvid")
    assert report["steps"] == [1000, 757, 522]
    assert len(report["means"]) == 3


def test_the_released_code_of_avd_takes_the_regression(run_in_host: Callable[..., dict[str, Any]]) -> None:
    report = run_in_host("Adaptive-Video-Distillation", "causvid_trainer.py", "avd")
    assert report["steps"] == [1000, 900, 757, 522]
