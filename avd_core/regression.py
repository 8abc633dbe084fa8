"""The adaptive regression on real clips: Eq. 5-7."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from avd_core._checks import (
    check_batched,
    check_floating,
    check_gradient,
    check_number,
    check_same_device,
    check_same_shape,
    check_timesteps,
)
from avd_core.cache import LossMeanCache
from avd_core.output import LossOutput


class AdaptiveRegressionLoss(nn.Module):
    """Regression on real data, in which samples with a larger error than usual at their timestep count less.

    See :func:`adaptive_regression_loss` for the equation. This module holds the options and asks ``cache`` for the
    means. The cache is a submodule, so ``state_dict()`` contains it.

    Pass velocities: ``noise - x_0``, and the model's prediction of it. In x_0 the same error is multiplied by
    ``sigma``, in noise by ``1 - sigma``. So in noise it is always zero at t = 1000, the first step of a few-step
    student, and that step would learn nothing. :class:`FlowMatchingSchedule` converts predictions.

    Args:
        cache: The means. Give each loss a cache of its own.
        weight: ``w_reg`` of Eq. 9, at least 0. A sample of average loss gets half of it. The paper's is 2.0.
        sharpness: ``k`` of Eq. 7, at least 0; 0 switches the adaptation off. The paper's is 3.0.

    Example:
        >>> cache = LossMeanCache(timesteps=(1000, 900, 757, 522), decay=0.95)
        >>> regression = AdaptiveRegressionLoss(cache, weight=2.0, sharpness=3.0)
        >>> prediction = torch.randn(2, 16, 3, 8, 8, requires_grad=True)
        >>> loss, metrics = regression(prediction, torch.randn(2, 16, 3, 8, 8), torch.tensor([1000, 522]))
        >>> metrics["weights"]
        tensor([1., 1.])
    """

    def __init__(self, cache: LossMeanCache, *, weight: float = 2.0, sharpness: float = 3.0) -> None:
        super().__init__()
        if not isinstance(cache, LossMeanCache):
            raise TypeError(f"cache must be a LossMeanCache, got {type(cache).__name__}.")
        _check_options(weight, sharpness)
        self.cache = cache
        self.weight = weight
        self.sharpness = sharpness

    def forward(self, prediction: Tensor, target: Tensor, timesteps: Tensor) -> LossOutput:
        """Compute the loss and, in training mode, record it in the cache.

        Args:
            prediction: ``[B, ...]``, floating, with gradient.
            target: ``[B, ...]``, same shape and device.
            timesteps: ``[B]``, in the unit of the cache's grid.

        Returns:
            LossOutput: see :func:`adaptive_regression_loss`.

        Raises:
            TypeError: For tensors that are not floating.
            ValueError: For shapes or devices that differ, an empty batch, timesteps that are not ``[B]`` or that the
                cache refuses; in training mode, if ``prediction`` has no gradient.
        """
        self.check_inputs(prediction, target, timesteps)
        sample_losses = _sample_losses(prediction, target)
        means = self.cache(timesteps, sample_losses.detach())
        return _weigh(sample_losses, means, self.weight, self.sharpness)

    def check_inputs(self, prediction: Tensor, target: Tensor, timesteps: Tensor) -> None:
        """Raise what :meth:`forward` would, without computing or recording anything."""
        check_same_shape("prediction", prediction, "target", target)
        check_batched("prediction", prediction)
        check_timesteps(timesteps, prediction)
        check_same_device("the cache", self.cache.means, "prediction", prediction)
        check_gradient("prediction", prediction, self.training)

    def extra_repr(self) -> str:
        return f"weight={self.weight}, sharpness={self.sharpness}"


def adaptive_regression_loss(
    prediction: Tensor, target: Tensor, means: Tensor, *, weight: float = 2.0, sharpness: float = 3.0
) -> LossOutput:
    r"""Weighted mean squared error (You et al. 2026, Eq. 5 and 7).

    .. math::
        L_b = \mathrm{mean}\,(p_b - y_b)^2, \quad
        w_b = w_\mathrm{reg}\,(1 - \sigma(k\,(L_b - \bar L_b))), \quad
        \mathcal{L} = \frac{1}{B} \sum_b w_b L_b

    No gradient passes through :math:`w_b`.

    Args:
        prediction: ``[B, ...]``, floating.
        target: ``[B, ...]``, same shape and device.
        means: ``[B]``, the mean loss :math:`\bar L_b` that each sample is compared with (:class:`LossMeanCache`).
        weight: :math:`w_\mathrm{reg}`, at least 0.
        sharpness: :math:`k`, at least 0.

    Returns:
        LossOutput: ``loss`` scalar; metrics ``weights`` [B] in (0, weight), ``sample_losses`` [B] unweighted, ``means``
        [B].

    Raises:
        TypeError: For tensors that are not floating.
        ValueError: For shapes or devices that differ, an empty batch, or options below 0.
    """
    _check_options(weight, sharpness)
    check_same_shape("prediction", prediction, "target", target)
    check_batched("prediction", prediction)
    check_floating("means", means)
    if means.shape != prediction.shape[:1]:
        raise ValueError(f"means must have shape [{prediction.shape[0]}], one per sample, got {list(means.shape)}.")
    check_same_device("means", means, "prediction", prediction)
    return _weigh(_sample_losses(prediction, target), means, weight, sharpness)


def _sample_losses(prediction: Tensor, target: Tensor) -> Tensor:
    """``[B]`` mean squared error per sample, float32 at least."""
    dtype = torch.promote_types(torch.promote_types(prediction.dtype, target.dtype), torch.float32)
    errors = F.mse_loss(prediction.to(dtype), target.to(dtype), reduction="none").flatten(1)
    # Not mean(): its backward would write a full tensor of 1/n before the product, sum()'s broadcasts a scalar.
    return errors.sum(dim=1) / errors.shape[1]


def _weigh(sample_losses: Tensor, means: Tensor, weight: float, sharpness: float) -> LossOutput:
    losses, means = sample_losses.detach(), means.detach()
    weights = weight * torch.sigmoid(sharpness * (means - losses))  # Eq. 7: 1 - sigmoid(x) = sigmoid(-x)
    loss = (weights * sample_losses).mean()
    return LossOutput(loss, {"weights": weights, "sample_losses": losses, "means": means})


def _check_options(weight: float, sharpness: float) -> None:
    check_number("weight", weight, at_least=0)
    check_number("sharpness", sharpness, at_least=0)
