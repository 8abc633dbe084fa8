"""Distribution matching against a frozen teacher: Eq. 4."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from avd_core._checks import check_batched, check_gradient, check_number, check_same_shape
from avd_core.output import LossOutput


class DistributionMatchingLoss(nn.Module):
    """Moves generated samples from where the online model sees them to where the teacher does.

    See :func:`distribution_matching_loss` for the equation and the arguments, which are the same.

    Example:
        >>> matching = DistributionMatchingLoss(weight=1.0)
        >>> x_0 = torch.randn(1, 16, 3, 8, 8, requires_grad=True)
        >>> loss, metrics = matching(x_0, real_x_0=torch.randn_like(x_0), online_x_0=torch.randn_like(x_0))
        >>> loss.backward()
    """

    def __init__(self, *, weight: float = 1.0, eps: float = 1e-5) -> None:
        super().__init__()
        _check_options(weight, eps)
        self.weight = weight
        self.eps = eps

    def forward(self, x_0: Tensor, real_x_0: Tensor, online_x_0: Tensor) -> LossOutput:
        """Compute the loss; see :func:`distribution_matching_loss`.

        Raises:
            TypeError, ValueError: As there; also in training mode, if ``x_0`` has no gradient.
        """
        _check_tensors(x_0, real_x_0, online_x_0)
        check_gradient("x_0", x_0, self.training)
        return distribution_matching_loss(x_0, real_x_0, online_x_0, weight=self.weight, eps=self.eps)

    def extra_repr(self) -> str:
        return f"weight={self.weight}, eps={self.eps}"


def distribution_matching_loss(
    x_0: Tensor, real_x_0: Tensor, online_x_0: Tensor, *, weight: float = 1.0, eps: float = 1e-5
) -> LossOutput:
    r"""Half the squared distance to a target that lies one matching gradient away (You et al. 2026, Eq. 4; DMD2).

    .. math::
        g = \frac{x^\mathrm{online} - x^\mathrm{real}}{\mathrm{mean}\,|x - x^\mathrm{real}|}, \quad
        \mathcal{L} = \frac{w}{2}\,\mathrm{mean}\,(x - \mathrm{sg}(x - g))^2

    The normaliser is the mean over one sample. Noise :math:`x` to a random timestep before asking the two models.

    Args:
        x_0: ``[B, ...]`` generated samples, floating, with gradient.
        real_x_0: The frozen teacher's x_0 prediction (with guidance) from the noised samples, same shape and device. No
            gradient passes through it.
        online_x_0: That of the online model, which follows the student, likewise.
        weight: Weight of the term, at least 0.
        eps: Lower bound of the normaliser, positive, in the unit of ``x_0``. It keeps the gradient finite where a
            sample equals the teacher's prediction.

    Returns:
        LossOutput: ``loss`` scalar; metrics ``gradient_norm`` scalar, the root mean square of :math:`g` (without
        weight).

    Raises:
        TypeError: For tensors that are not floating.
        ValueError: For shapes or devices that differ, an empty batch, or options out of range.
    """
    _check_options(weight, eps)
    _check_tensors(x_0, real_x_0, online_x_0)
    dtype = torch.promote_types(x_0.dtype, torch.float32)
    x_0 = x_0.to(dtype)
    with torch.no_grad():
        real, online = real_x_0.to(dtype), online_x_0.to(dtype)
        normalizer = (x_0 - real).abs().flatten(1).mean(dim=1).clamp_min(eps)
        gradient = (online - real) / normalizer.view(-1, *[1] * (x_0.ndim - 1))
        target = x_0 - gradient
        gradient_norm = gradient.square().mean().sqrt()
    loss = 0.5 * weight * F.mse_loss(x_0, target)
    return LossOutput(loss, {"gradient_norm": gradient_norm})


def _check_tensors(x_0: Tensor, real_x_0: Tensor, online_x_0: Tensor) -> None:
    check_same_shape("x_0", x_0, "real_x_0", real_x_0)
    check_same_shape("x_0", x_0, "online_x_0", online_x_0)
    check_batched("x_0", x_0)


def _check_options(weight: float, eps: float) -> None:
    check_number("weight", weight, at_least=0)
    check_number("eps", eps, above=0)
