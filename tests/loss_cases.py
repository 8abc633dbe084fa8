"""Every loss with input that fits it, for the tests that all of them have to pass."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from avd_core import (
    AdaptiveRegressionLoss,
    AVDConfig,
    AVDObjective,
    ClippedTemporalVarianceLoss,
    ConditionalScoreDistillationLoss,
    DistributionMatchingLoss,
    HingeLoss,
    LogisticLoss,
    LossMeanCache,
    LossOutput,
    SpatioTemporalR1Loss,
)
from tensors import randn

GRID = (1000, 900, 757, 522)
_shape = (2, 2, 3, 4, 4)
_timesteps = torch.tensor([1000, 522])


class Positional(nn.Module):
    """A loss that takes its keyword arguments by position."""

    def __init__(self, loss: nn.Module, *names: str) -> None:
        super().__init__()
        self.loss = loss
        self.names = names

    def forward(self, *arguments: Tensor) -> LossOutput:
        named = len(arguments) - len(self.names)
        output: LossOutput = self.loss(*arguments[:named], **dict(zip(self.names, arguments[named:], strict=True)))
        return output


class Discriminator(HingeLoss):
    """The hinge loss of this side alone."""

    def forward(self, clip_logits: Tensor, sample_logits: Tensor) -> LossOutput:
        return self.discriminator(clip_logits, sample_logits)


class Generator(HingeLoss):
    """The hinge loss of this side alone."""

    def forward(self, sample_logits: Tensor) -> LossOutput:
        return self.generator(sample_logits)


class LogisticDiscriminator(LogisticLoss):
    """The logistic loss of this side alone."""

    def forward(self, clip_logits: Tensor, sample_logits: Tensor) -> LossOutput:
        return self.discriminator(clip_logits, sample_logits)


class LogisticGenerator(LogisticLoss):
    """The logistic loss of this side alone."""

    def forward(self, sample_logits: Tensor) -> LossOutput:
        return self.generator(sample_logits)


class SmoothDiscriminator(nn.Module):
    """STR1 of a discriminator with the weights ``[C, F, H, W]``; large perturbations, so that nothing cancels."""

    def __init__(self) -> None:
        super().__init__()
        self.r1 = SpatioTemporalR1Loss(sigma_spatial=2.0, sigma_temporal=3.0)

    def forward(self, weights: Tensor, x_t: Tensor, spatial_noise: Tensor, temporal_noise: Tensor) -> LossOutput:
        def discriminator(x_t: Tensor) -> Tensor:
            # Its own rounding is not what the tests are about.
            return (weights.double() * x_t.double()).flatten(1).sum(1).to(x_t.dtype)

        dtype = torch.promote_types(x_t.dtype, torch.float32)
        logits = discriminator(x_t.to(dtype))
        output: LossOutput = self.r1(
            discriminator, x_t, logits, spatial_noise=spatial_noise, temporal_noise=temporal_noise
        )
        return output


@dataclass(frozen=True)
class Case:
    """A loss, its arguments, and which of them have a gradient."""

    make: Callable[[], nn.Module]
    arguments: Callable[[int], list[Tensor]]
    differentiable: tuple[int, ...]

    def inputs(self, seed: int, dtype: torch.dtype, device: str = "cpu") -> list[Tensor]:
        """Fresh leaves that depend on seed and dtype alone."""
        tensors = [
            tensor.to(device, dtype if tensor.is_floating_point() else tensor.dtype) for tensor in self.arguments(seed)
        ]
        return [tensor.requires_grad_(i in self.differentiable) for i, tensor in enumerate(tensors)]


LOSSES = {
    "regression": Case(
        lambda: AdaptiveRegressionLoss(LossMeanCache(GRID)),
        lambda seed: [randn(seed, *_shape), randn(seed + 1, *_shape), _timesteps],
        (0,),
    ),
    "standardized relative regression": Case(
        lambda: Positional(
            AdaptiveRegressionLoss(LossMeanCache(GRID), deviation="standardized", judged="relative"), "clips"
        ),
        lambda seed: [randn(seed, *_shape), randn(seed + 1, *_shape), _timesteps, randn(seed + 2, *_shape)],
        (0,),
    ),
    "excess regression": Case(
        lambda: Positional(AdaptiveRegressionLoss(LossMeanCache(GRID), judged="excess"), "teacher_prediction"),
        lambda seed: [randn(seed, *_shape), randn(seed + 1, *_shape), _timesteps, randn(seed + 2, *_shape)],
        (0,),
    ),
    "motion": Case(ClippedTemporalVarianceLoss, lambda seed: [0.3 * randn(seed, *_shape)], (0,)),
    "matching": Case(DistributionMatchingLoss, lambda seed: [randn(seed + i, *_shape) for i in range(3)], (0,)),
    "hinge of the discriminator": Case(
        Discriminator, lambda seed: [2 * randn(seed, 5), 2 * randn(seed + 1, 4)], (0, 1)
    ),
    "hinge of the generator": Case(Generator, lambda seed: [randn(seed, 5)], (0,)),
    "logistic loss of the discriminator": Case(
        LogisticDiscriminator, lambda seed: [2 * randn(seed, 5), 2 * randn(seed + 1, 4)], (0, 1)
    ),
    "logistic loss of the generator": Case(LogisticGenerator, lambda seed: [randn(seed, 5)], (0,)),
    "spatio-temporal R1": Case(
        SmoothDiscriminator,
        lambda seed: [
            randn(seed, *_shape[1:]),
            randn(seed + 1, *_shape),
            randn(seed + 2, 2, 2, 1, 4, 4),
            randn(seed + 3, *_shape),
        ],
        (0,),
    ),
    "conditional score distillation": Case(
        ConditionalScoreDistillationLoss, lambda seed: [randn(seed + i, *_shape) for i in range(2)], (0,)
    ),
    "objective": Case(
        AVDObjective,
        lambda seed: [0.3 * randn(seed, *_shape), randn(seed + 1, *_shape), randn(seed + 2, *_shape), _timesteps],
        (0, 1),
    ),
    "released code": Case(
        lambda: AVDObjective(AVDConfig.released_code()),
        lambda seed: [0.3 * randn(seed, *_shape), randn(seed + 1, *_shape), randn(seed + 2, *_shape), _timesteps],
        (0, 1),
    ),
}
