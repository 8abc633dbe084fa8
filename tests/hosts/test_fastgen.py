"""The adapter inside FastGen's own trainer, on CPU, with networks of a few hundred weights."""

from collections.abc import Callable
from typing import Any

import pytest

pytestmark = pytest.mark.hosts


@pytest.mark.parametrize(
    "options", [[], ["autocast"], ["accumulate"], ["sharded"]], ids=lambda o: " ".join(o) or "plain"
)
def test_the_trainer_steps_with_the_added_loss_and_continues_from_its_checkpoint(
    run_in_host: Callable[..., dict[str, Any]], options: list[str]
) -> None:
    report = run_in_host("FastGen", "fastgen_trainer.py", *options)
    assert report["student_steps"] >= 7
    assert min(report["added"]) > 0.1


def test_two_ranks_have_one_cache_wrapped_and_sharded(run_in_host: Callable[..., dict[str, Any]]) -> None:
    report = run_in_host("FastGen", "fastgen_ranks.py")
    assert "iterations [8, 0]" in report["message"]


def test_schedules_images_configuration_errors_and_the_sampler(run_in_host: Callable[..., dict[str, Any]]) -> None:
    report = run_in_host("FastGen", "fastgen_pieces.py")
    assert report["worst_velocity_error"] < 1e-5
    assert len(report["added_on_images"]) == 2
