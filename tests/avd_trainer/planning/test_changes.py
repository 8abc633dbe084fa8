"""What to change: said to fit, it does."""

from pathlib import Path
from typing import Any

import pytest

from avd_trainer.config.loading import load_config, save_config
from avd_trainer.planning.changes import Change, find_changes
from avd_trainer.planning.description import describe
from avd_trainer.planning.memory import GB, plan_memory, worst
from avd_trainer.training.config import TrainConfig
from planned_runs import ADAPTERS, ARCHITECTURE, NOT_CHECKPOINTED, ONLINE_ADAPTER, config, described, peak

LADDER: dict[str, dict[str, Any]] = {
    "one example": {"micro_batch_size": 1},
    "activation checkpointing": {"parallel": {"activation_checkpointing": True}},
    "LoRA for the online model": ONLINE_ADAPTER,
    "LoRA for the student": ADAPTERS,
    "2 latent frames in place of 3": {"shape": (16, 2, 32, 32)},
}


@pytest.mark.parametrize("enough", LADDER)
def test_changes_that_are_said_to_fit_do(enough: str, tmp_path: Path) -> None:
    applied: dict[str, Any] = {}
    for name in list(LADDER)[: list(LADDER).index(enough) + 1]:
        applied |= LADDER[name]
    gpu_memory = peak(**NOT_CHECKPOINTED | applied).needed / GB
    changes = list(find_changes(described(**NOT_CHECKPOINTED), gpu_memory))
    here = [change for change in changes if change.run.gpus == 1]
    assert enough in here[-1].words[-1]
    assert [change.fits(gpu_memory) for change in here] == [False] * (len(here) - 1) + [True]
    save_config(config(**NOT_CHECKPOINTED), tmp_path / "run.yaml", "train")
    for change in changes:
        assert needed_again(change, tmp_path / "run.yaml") == change.needed


def needed_again(change: Change, file: Path) -> int:
    """Bytes, by the settings that are named."""
    changed = load_config(TrainConfig, str(file), list(change.settings))
    run = describe(changed, ARCHITECTURE, change.run.latent_shape, gpus=change.run.gpus)
    return worst(plan_memory(run)).needed


@pytest.mark.parametrize(("batch_size", "gpus", "settings"), [(16, 4, ()), (1, 3, ("batch_size=3",))])
def test_the_least_number_of_gpus_that_is_enough_is_found(
    batch_size: int, gpus: int, settings: tuple[str, ...]
) -> None:
    one: dict[str, Any] = {"micro_batch_size": 1}
    gpu_memory = peak(gpus=gpus, batch_size=max(batch_size, gpus), **one).needed / GB
    changes = find_changes(described(batch_size=batch_size, **one), gpu_memory)
    (more,) = (change for change in changes if change.run.gpus > 1)
    assert (more.run.gpus, more.settings, more.fits(gpu_memory)) == (gpus, settings, True)


@pytest.mark.parametrize(
    ("changes", "setting"),
    [
        ({"student_weights": "student.pt"}, "student.lora"),
        ({"method": {"regression": {"order": "update_first"}}}, "micro_batch_size"),
    ],
)
def test_a_change_that_contradicts_the_run_is_not_named(changes: dict[str, Any], setting: str) -> None:
    found = list(find_changes(described(**changes), 0.5))
    assert found
    assert not any(setting in named for change in found for named in change.settings)
