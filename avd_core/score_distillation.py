"""Conditional score distillation: samples stay where the teacher, given the condition, would denoise them to."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from avd_core._checks import check_batched, check_gradient, check_number, check_same_shape
from avd_core.output import LossOutput


class ConditionalScoreDistillationLoss(nn.Module):
    """Pulls generated samples to the clean prediction of a frozen teacher that knows the condition.

    See :func:`conditional_score_distillation_loss` for the equation and the arguments, which are the same.

    Example:
        >>> distillation = ConditionalScoreDistillationLoss(weight=10.0)
        >>> x_0 = torch.randn(1, 16, 3, 8, 8, requires_grad=True)
        >>> loss, metrics = distillation(x_0, real_x_0=torch.randn_like(x_0))
        >>> loss.backward()
    """

    def __init__(self, *, weight: float = 10.0) -> None:
        super().__init__()
        check_number("weight", weight, at_least=0)
        self.weight = weight

    def forward(self, x_0: Tensor, real_x_0: Tensor) -> LossOutput:
        """Compute the loss; see :func:`conditional_score_distillation_loss`.

        Raises:
            TypeError, ValueError: As there; also in training mode, if ``x_0`` has no gradient.
        """
        _check_tensors(x_0, real_x_0)
        check_gradient("x_0", x_0, self.training)
        return conditional_score_distillation_loss(x_0, real_x_0, weight=self.weight)

    def extra_repr(self) -> str:
        return f"weight={self.weight}"


def conditional_score_distillation_loss(x_0: Tensor, real_x_0: Tensor, *, weight: float = 10.0) -> LossOutput:
    r"""Mean squared distance of samples to the teacher's prediction of them (V-PAE, C-SDS).

    .. math::
        \mathcal{L} = w\,\mathrm{mean}\,(\hat x - \mathrm{sg} f_\mathrm{real}(\mathrm{sg}\,\hat x_t, t, c))^2

    Unlike :func:`distribution_matching_loss` it has no online model to subtract, so by itself it seeks a mode of the
    teacher's distribution: it belongs beside an adversarial term. In V-PAE (arXiv 2508.21019) it keeps the samples of
    an image-to-video student at their condition image; with text alone as the condition it works too. Not stated there
    are the mean over elements, which is our reading, and how :math:`t` is drawn and whether the teacher is guided,
    which are left to the caller.

    Args:
        x_0: ``[B, ...]`` generated samples :math:`\hat x`, floating, with gradient.
        real_x_0: The frozen teacher's x_0 prediction from the noised samples, with their condition; same shape and
            device. No gradient passes through it.
        weight: :math:`w`, at least 0. V-PAE: 10.

    Returns:
        LossOutput: ``loss`` scalar; metrics ``distance`` scalar, the root mean square of the difference, in the unit of
        ``x_0``.

    Raises:
        TypeError: For tensors that are not floating.
        ValueError: For shapes or devices that differ, an empty batch, or a weight out of range.
    """
    check_number("weight", weight, at_least=0)
    _check_tensors(x_0, real_x_0)
    dtype = torch.promote_types(x_0.dtype, torch.float32)
    error = F.mse_loss(x_0.to(dtype), real_x_0.detach().to(dtype))
    return LossOutput(weight * error, {"distance": error.detach().sqrt()})


def _check_tensors(x_0: Tensor, real_x_0: Tensor) -> None:
    check_same_shape("x_0", x_0, "real_x_0", real_x_0)
    check_batched("x_0", x_0)
