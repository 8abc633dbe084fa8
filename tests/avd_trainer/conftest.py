"""A trainer small enough for a second: one layer, latents of 3 frames of 4 x 4."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from avd_trainer.config import ArchitectureConfig, TrainConfig
from avd_trainer.data.latents import CaptionedLatents
from avd_trainer.data.text import HashTextEmbedding
from avd_trainer.models import build_transformer
from avd_trainer.trainer import Trainer

ARCHITECTURE = ArchitectureConfig(
    num_attention_heads=1, attention_head_dim=12, ffn_dim=16, num_layers=1, freq_dim=8, text_dim=6
)
EMBED = HashTextEmbedding(4, 6)


@pytest.fixture
def clips() -> CaptionedLatents:
    draws = torch.Generator().manual_seed(1)
    latents = torch.randn(10, 16, 3, 4, 4, generator=draws)
    return CaptionedLatents(latents, [f"clip {number}" for number in range(10)])


@pytest.fixture
def make_trainer(clips: CaptionedLatents) -> Callable[..., Trainer]:
    def make(**changes: Any) -> Trainer:
        torch.manual_seed(0)
        values = {
            "teacher": "unused",
            "data": {"kind": "shapes"},
            "max_steps": 3,
            "batch_size": 2,
            "student_optimizer": {"lr": 1e-3},
            "online_optimizer": {"lr": 1e-3},
        }
        config = TrainConfig.model_validate(values | changes)
        return Trainer(config, build_transformer(ARCHITECTURE), clips, EMBED)

    return make
