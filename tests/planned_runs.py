"""Runs to plan: Wan2.1-1.3B with two blocks on small clips, and what a CPU can run in a moment."""

from collections.abc import Iterable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from avd_trainer.config.sections import ArchitectureConfig
from avd_trainer.data.in_memory import CaptionedLatents, InMemoryData
from avd_trainer.data.sources import TrainingData
from avd_trainer.models.text_encoders.hashed import HashTextEmbedding
from avd_trainer.planning.description import Run, describe, find_architecture
from avd_trainer.planning.memory import Phase, plan_memory, worst
from avd_trainer.runtime.ranks import Ranks
from avd_trainer.training.config import TrainConfig
from avd_trainer.training.trainer import Trainer

ARCHITECTURE = find_architecture("Wan-AI/Wan2.1-T2V-1.3B-Diffusers") | {"num_layers": 2}
SHAPE = (16, 3, 32, 32)

SMALL = ArchitectureConfig(
    num_attention_heads=4, attention_head_dim=32, ffn_dim=640, num_layers=4, freq_dim=64, text_dim=64
)
SMALL_SHAPE = (16, 3, 16, 16)
SMALL_TEXT = (8, 64)

LORA = {"lora": {"rank": 64}}
ONLINE_ADAPTER: dict[str, Any] = {"method": {"online": LORA}}
ADAPTERS: dict[str, Any] = {"method": {"online": LORA, "student": LORA}}
NOT_CHECKPOINTED: dict[str, Any] = {"parallel": {"activation_checkpointing": False}}


def config(**changes: Any) -> TrainConfig:
    """A run of AVD with one online update; ``method`` adds to the method's section, the rest replaces."""
    method = {"kind": "avd", "online_updates": 1} | changes.pop("method", {})
    values = {"teacher": "none", "data": {"kind": "shapes"}, "max_steps": 3, "batch_size": 8}
    return TrainConfig.model_validate(values | changes | {"method": method})


def described(shape: tuple[int, ...] = SHAPE, gpus: int = 1, text_length: int = 512, **changes: Any) -> Run:
    return describe(config(**changes), ARCHITECTURE, shape, gpus=gpus, text_length=text_length)


def peak(**changes: Any) -> Phase:
    """The worst phase of a described run."""
    return worst(plan_memory(described(**changes)))


def nbytes(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def trainer_of(config: TrainConfig, ranks: Ranks, shape: tuple[int, ...], text: tuple[int, int]) -> Trainer:
    """A trainer on random clips; ``text`` is tokens and their width."""
    clips = CaptionedLatents(torch.randn(8, *shape), [f"clip {number}" for number in range(8)])
    data = InMemoryData(clips, HashTextEmbedding(*text))
    return Trainer(config, TrainingData(data, data), ranks)


class FusedRMSNorm(torch.autograd.Function):
    """Keeps what the kernel of a GPU keeps: input, weight, and the reciprocal root for each token."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        scale = (x.float().square().mean(-1, keepdim=True) + eps).rsqrt()
        ctx.save_for_backward(x, weight, scale)
        return (x * scale).type_as(x) * weight

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight, scale = ctx.saved_tensors
        normed, gradient = x * scale, gradients[0] * weight
        of_x = scale * (gradient - normed * (gradient * normed).mean(-1, keepdim=True))
        return of_x.type_as(x), (gradients[0] * normed).sum(dim=tuple(range(x.ndim - 1))).type_as(weight), None


def fuse_rms_norm(patch: pytest.MonkeyPatch) -> None:
    """Compute as a GPU does; PyTorch has that kernel for GPUs alone."""
    patch.setattr(F, "rms_norm", lambda x, shape, weight, eps: FusedRMSNorm.apply(x, weight, eps))  # type: ignore[no-untyped-call]
