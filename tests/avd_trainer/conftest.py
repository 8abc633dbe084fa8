"""A trainer small enough for a second: one layer, latents of 3 frames of 4 x 4."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from avd_trainer.config.sections import ArchitectureConfig
from avd_trainer.data.in_memory import CaptionedLatents, InMemoryData
from avd_trainer.data.sources import TrainingData
from avd_trainer.models.roles import load_models
from avd_trainer.models.text_encoders.hashed import HashTextEmbedding
from avd_trainer.models.transformer import build_transformer
from avd_trainer.runtime.ranks import Ranks, join_ranks
from avd_trainer.training.config import TrainConfig
from avd_trainer.training.trainer import Trainer

ARCHITECTURE = ArchitectureConfig(
    num_attention_heads=1, attention_head_dim=12, ffn_dim=16, num_layers=1, freq_dim=8, text_dim=6
)
EMBED = HashTextEmbedding(4, 6)


@pytest.fixture
def ranks() -> Iterator[Ranks]:
    with join_ranks() as ranks:
        yield ranks


@pytest.fixture(scope="session")
def teacher_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("teacher")
    torch.manual_seed(0)
    build_transformer(ARCHITECTURE).save_pretrained(folder)
    return folder


@pytest.fixture
def clips() -> CaptionedLatents:
    draws = torch.Generator().manual_seed(1)
    latents = torch.randn(10, 16, 3, 4, 4, generator=draws)
    return CaptionedLatents(latents, [f"clip {number}" for number in range(10)])


@pytest.fixture
def make_config(teacher_folder: Path) -> Callable[..., TrainConfig]:
    def make(**changes: Any) -> TrainConfig:
        values = {
            "teacher": str(teacher_folder),
            "data": {"kind": "shapes"},
            "max_steps": 3,
            "batch_size": 2,
            "student_optimizer": {"lr": 1e-3},
            "online_optimizer": {"lr": 1e-3},
        }
        return TrainConfig.model_validate(values | changes)

    return make


@pytest.fixture
def make_trainer(
    clips: CaptionedLatents, make_config: Callable[..., TrainConfig], ranks: Ranks
) -> Callable[..., Trainer]:
    def make(**changes: Any) -> Trainer:
        config = make_config(**changes)
        data = InMemoryData(clips, EMBED)
        return Trainer(config, load_models(config, ranks), TrainingData(data, data), ranks)

    return make
