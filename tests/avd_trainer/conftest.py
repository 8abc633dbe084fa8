"""What most tests of the trainer start from: runs of :mod:`runs`, their data and their processes."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import tiny_pipeline
from avd_trainer.data.in_memory import CaptionedLatents
from avd_trainer.data.sources import TrainingData
from avd_trainer.models.transformer import build_transformer
from avd_trainer.runtime.ranks import Ranks, join_ranks
from avd_trainer.training.config import TrainConfig
from avd_trainer.training.trainer import Trainer
from launches import StandingRanks
from runs import ARCHITECTURE, MakeConfig, MakeTrainer, both, in_memory, ten_clips, tiny_config


@pytest.fixture
def ranks() -> Iterator[Ranks]:
    with join_ranks() as ranks:
        yield ranks


@pytest.fixture(scope="module")
def on_two_ranks() -> Iterator[StandingRanks]:
    """Calls a function that leaves its process as it was."""
    with StandingRanks(2) as ranks:
        yield ranks


@pytest.fixture(scope="session")
def teacher_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("teacher")
    torch.manual_seed(0)
    build_transformer(ARCHITECTURE).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def wan_student(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Wan pipeline that diffusers saved with two few steps; no run or export of the trainer is in it. Not to be
    changed: copy it."""
    return tiny_pipeline.build(tmp_path_factory.mktemp("wan") / "student", few_steps=(1000, 500))


@pytest.fixture
def clips() -> CaptionedLatents:
    return ten_clips()


@pytest.fixture
def data(clips: CaptionedLatents) -> TrainingData:
    return both(in_memory(clips))


@pytest.fixture
def make_config(teacher_folder: Path) -> MakeConfig:
    """:func:`runs.tiny_config`, with a teacher unless one is named."""

    def make(*kind: str, teacher: str | Path = teacher_folder, **changes: Any) -> TrainConfig:
        return tiny_config(teacher, *kind, **changes)

    return make


@pytest.fixture
def make_trainer(data: TrainingData, make_config: MakeConfig, ranks: Ranks) -> MakeTrainer:
    """A trainer on ``data``; the arguments are those of ``make_config``."""

    def make(*kind: str, **changes: Any) -> Trainer:
        return Trainer(make_config(*kind, **changes), data, ranks)

    return make
