"""What tests of whole runs start from."""

from pathlib import Path
from typing import Any

import pytest

from avd_trainer.data.sources import TrainingData
from avd_trainer.runtime.ranks import Ranks
from avd_trainer.training.config import TrainConfig
from avd_trainer.training.run import train
from runs import MakeConfig


@pytest.fixture
def configure(make_config: MakeConfig) -> MakeConfig:
    """Runs of four steps that save every second one; the arguments are those of ``make_config``."""

    def make(method: dict[str, Any] | None = None, **changes: Any) -> TrainConfig:
        values = {
            "max_steps": 4,
            "checkpoint": {"every": 2},
            "logging": {"tensorboard": False},
            "parallel": {"activation_checkpointing": False},
        }
        section = {"online_updates": 1, "motion": {"sync_ranks": True}} | (method or {})
        return make_config(method=section, **values | changes)

    return make


@pytest.fixture
def config(make_config: MakeConfig) -> TrainConfig:
    """Of two steps, both of which are saved."""
    return make_config(
        method={"online_updates": 1},
        max_steps=2,
        checkpoint={"every": 1, "keep_latest": 3},
        logging={"tensorboard": False},
    )


@pytest.fixture
def run(config: TrainConfig, data: TrainingData, tmp_path: Path, ranks: Ranks) -> Path:
    """The folder of that run on ``data``."""
    train(config, tmp_path / "run", ranks, data=data)
    return tmp_path / "run"
