"""The adaptive regression on real clips: Eq. 5-7."""

from __future__ import annotations

from typing import Literal, get_args

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

Deviation = Literal["absolute", "standardized"]
Judged = Literal["loss", "relative", "excess"]

PAPER_SPREAD = 0.3
"""The spread of losses for which the paper chose its sharpness of 3: deviations in [-0.3, 0.3] (Sec. 9.2).

We read the end of the range as one standard deviation; if it were two, the unit would be 0.15.

Standardised deviations are in this unit: where the spread of the losses is 0.3, they are the paper's. A loss one spread
above its mean then has ``sharpness * PAPER_SPREAD`` in Eq. 7's sigmoid: 0.9 for the paper's sharpness, by our reading.
"""

# A spread of differences of losses this small beside the losses is float32's rounding.
_RESOLUTION = 1e-6

# Energy of a clip below which its relative loss is divided by this instead: a thousandth of the noise's energy, 1.
_SMALLEST_ENERGY = 1e-3


class AdaptiveRegressionLoss(nn.Module):
    r"""Regression on real data, in which samples with a larger error than usual at their timestep count less.

    See :func:`adaptive_regression_loss` for the equation. This module holds the options, computes what is judged, and
    asks ``cache`` for its means and spreads. The cache is a submodule, so ``state_dict()`` contains it.

    Pass velocities: ``noise - x_0``, and the model's prediction of it. In x_0 the same error is multiplied by
    ``sigma``, in noise by ``1 - sigma``. So in noise it is always zero at t = 1000, the first step of a few-step
    student, and that step would learn nothing. :class:`FlowMatchingSchedule` converts predictions.

    What is regressed is always the loss :math:`L_b`. The weight can judge by another number :math:`J_b`, whose means
    and spreads the cache then keeps (all but the first are ours):

    - ``judged="loss"``: :math:`J_b = L_b`, as in the paper. Near pure noise a model can say little of a single clip,
      so :math:`L_b` is nearly the clip's own energy, and the weight turns off clips of high contrast, however well the
      model fits them.
    - ``judged="relative"``: :math:`J_b = L_b / \mathrm{mean}(c_b^2)` with the clean clip :math:`c_b`: the share of
      the clip that is missed. An energy below 0.001, that is a thousandth of the noise's, counts as 0.001.
    - ``judged="excess"``: :math:`J_b = L_b - \mathrm{mean}(q_b - y_b)^2` with the teacher's prediction :math:`q_b` for
      the same noised clip: what the student misses and the teacher does not. It is 0 on average for a student that is
      as good as its teacher, and costs one forward of the teacher, without gradient and without guidance.

    Args:
        cache: Means and spreads. Give each loss a cache of its own.
        weight: ``w_reg`` of Eq. 9, at least 0. A sample of average loss gets half of it. The paper's is 2.0.
        sharpness: ``k`` of Eq. 7, at least 0; 0 switches the adaptation off. The paper's is 3.0.
        deviation: ``"absolute"`` is the paper's deviation from the mean. ``"standardized"`` divides it by the spread at
            its timestep, in units of :data:`PAPER_SPREAD`, so that one sharpness fits all scales of losses.
        judged: What is compared with its mean: ``"loss"``, ``"relative"`` or ``"excess"``, see above.

    Example:
        >>> cache = LossMeanCache(timesteps=(1000, 900, 757, 522), decay=0.95)
        >>> regression = AdaptiveRegressionLoss(cache, weight=2.0, sharpness=3.0)
        >>> prediction = torch.randn(2, 16, 3, 8, 8, requires_grad=True)
        >>> loss, metrics = regression(prediction, torch.randn(2, 16, 3, 8, 8), torch.tensor([1000, 522]))
        >>> metrics["weights"]
        tensor([1., 1.])
    """

    def __init__(
        self,
        cache: LossMeanCache,
        *,
        weight: float = 2.0,
        sharpness: float = 3.0,
        deviation: Deviation = "absolute",
        judged: Judged = "loss",
    ) -> None:
        super().__init__()
        if not isinstance(cache, LossMeanCache):
            raise TypeError(f"cache must be a LossMeanCache, got {type(cache).__name__}.")
        _check_options(weight, sharpness)
        for name, choice, choices in (("deviation", deviation, Deviation), ("judged", judged, Judged)):
            if choice not in get_args(choices):
                raise ValueError(f"{name} must be one of {', '.join(get_args(choices))}, got {choice!r}.")
        self.cache = cache
        self.weight = weight
        self.sharpness = sharpness
        self.deviation = deviation
        self.judged = judged

    def forward(
        self,
        prediction: Tensor,
        target: Tensor,
        timesteps: Tensor,
        *,
        clips: Tensor | None = None,
        teacher_prediction: Tensor | None = None,
    ) -> LossOutput:
        """Compute the loss and, in training mode, record what is judged in the cache.

        Args:
            prediction: ``[B, ...]``, floating, with gradient.
            target: ``[B, ...]``, same shape and device.
            timesteps: ``[B]``, in the unit of the cache's grid.
            clips: ``[B, ...]``, floating, same device, with ``judged="relative"`` only: the clean clips. Only their
                energy counts, so their shape may be another. No gradient passes through.
            teacher_prediction: ``[B, ...]``, shape and device of ``prediction``, with ``judged="excess"`` only: the
                teacher's, for the same noised clips. No gradient passes through.

        Returns:
            LossOutput: see :func:`adaptive_regression_loss`.

        Raises:
            TypeError: For tensors that are not floating.
            ValueError: For shapes or devices that differ, an empty batch, timesteps that are not ``[B]`` or that the
                cache refuses; if what ``judged`` needs is missing, or what it does not look at is given; in training
                mode, if ``prediction`` has no gradient.
        """
        self.check_inputs(prediction, target, timesteps, clips=clips, teacher_prediction=teacher_prediction)
        sample_losses = _sample_losses(prediction, target)
        judged = sample_losses.detach()
        if clips is not None:
            judged = judged / _energies(clips.detach()).clamp_min(_SMALLEST_ENERGY)
        if teacher_prediction is not None:
            judged = judged - _sample_losses(teacher_prediction.detach(), target.detach())
        means, spreads = self.cache(timesteps, judged)
        if teacher_prediction is not None:
            # The mean of a difference can be far smaller than what was rounded, so the cache cannot know.
            spreads = torch.where(spreads > _RESOLUTION * sample_losses.detach(), spreads, 0.0)
        return _weigh(
            sample_losses,
            means,
            self.weight,
            self.sharpness,
            spreads if self.deviation == "standardized" else None,
            None if self.judged == "loss" else judged,
        )

    def check_inputs(
        self,
        prediction: Tensor,
        target: Tensor,
        timesteps: Tensor,
        *,
        clips: Tensor | None = None,
        teacher_prediction: Tensor | None = None,
    ) -> None:
        """Raise what :meth:`forward` would, without computing or recording anything."""
        check_same_shape("prediction", prediction, "target", target)
        check_batched("prediction", prediction)
        check_timesteps(timesteps, prediction)
        check_same_device("the cache", self.cache.means, "prediction", prediction)
        self._check_needed("clips", clips, "relative", "the clean clips behind the noised ones")
        self._check_needed(
            "teacher_prediction", teacher_prediction, "excess", "the teacher's prediction for the same noised clips"
        )
        if clips is not None:
            check_floating("clips", clips)
            check_batched("clips", clips)
            if len(clips) != len(prediction):
                raise ValueError(f"clips must be [{len(prediction)}, ...], one per sample, got {list(clips.shape)}.")
            check_same_device("clips", clips, "prediction", prediction)
        if teacher_prediction is not None:
            check_same_shape("teacher_prediction", teacher_prediction, "prediction", prediction)
        check_gradient("prediction", prediction, self.training)

    def extra_repr(self) -> str:
        return f"weight={self.weight}, sharpness={self.sharpness}, deviation={self.deviation!r}, judged={self.judged!r}"

    def _check_needed(self, name: str, tensor: Tensor | None, by: Judged, what: str) -> None:
        if self.judged == by and tensor is None:
            raise ValueError(f"judged={by!r} needs {name}: {what}. Pass them as {name}=..., or set judged='loss'.")
        if self.judged != by and tensor is not None:
            raise ValueError(f"judged={self.judged!r} does not look at {name}. Leave {name} out, or set judged={by!r}.")


def adaptive_regression_loss(
    prediction: Tensor,
    target: Tensor,
    means: Tensor,
    *,
    weight: float = 2.0,
    sharpness: float = 3.0,
    spreads: Tensor | None = None,
    judged: Tensor | None = None,
) -> LossOutput:
    r"""Weighted mean squared error (You et al. 2026, Eq. 5 and 7).

    .. math::
        L_b = \mathrm{mean}\,(p_b - y_b)^2, \quad
        w_b = w_\mathrm{reg}\,(1 - \sigma(k\,d_b)), \quad
        \mathcal{L} = \frac{1}{B} \sum_b w_b L_b

    The deviation is the paper's :math:`d_b = J_b - \bar J_b` with :math:`J_b = L_b`. If ``spreads`` are given, it is
    :math:`d_b = 0.3\,(J_b - \bar J_b) / s_b` (:data:`PAPER_SPREAD`), and 0 where the spread is 0. No gradient passes
    through :math:`w_b`.

    Args:
        prediction: ``[B, ...]``, floating.
        target: ``[B, ...]``, same shape and device.
        means: ``[B]``, :math:`\bar J_b`: the usual :math:`J` at each sample's timestep (:class:`LossMeanCache`).
        weight: :math:`w_\mathrm{reg}`, at least 0.
        sharpness: :math:`k`, at least 0.
        spreads: ``[B]``, :math:`s_b`, at least 0: the standard deviation of :math:`J` there. None is the paper's form.
        judged: ``[B]``, :math:`J_b`, such as :class:`AdaptiveRegressionLoss` computes. None is :math:`L_b`.

    Returns:
        LossOutput: ``loss`` scalar; metrics ``weights`` [B] in (0, weight), ``sample_losses`` [B] unweighted, ``means``
        [B]; also ``judged`` [B] if it was given, and ``deviations`` [B], :math:`d_b`, if ``spreads`` were given.

    Raises:
        TypeError: For tensors that are not floating.
        ValueError: For shapes or devices that differ, an empty batch, or options below 0.
    """
    _check_options(weight, sharpness)
    check_same_shape("prediction", prediction, "target", target)
    check_batched("prediction", prediction)
    _check_per_sample("means", means, prediction)
    if spreads is not None:
        _check_per_sample("spreads", spreads, prediction)
    if judged is not None:
        _check_per_sample("judged", judged, prediction)
    return _weigh(_sample_losses(prediction, target), means, weight, sharpness, spreads, judged)


def _sample_losses(prediction: Tensor, target: Tensor) -> Tensor:
    """``[B]`` mean squared error per sample, float32 at least."""
    dtype = torch.promote_types(torch.promote_types(prediction.dtype, target.dtype), torch.float32)
    errors = F.mse_loss(prediction.to(dtype), target.to(dtype), reduction="none").flatten(1)
    # Not mean(): its backward would write a full tensor of 1/n before the product, sum()'s broadcasts a scalar.
    return errors.sum(dim=1) / errors.shape[1]


def _energies(clips: Tensor) -> Tensor:
    """``[B]`` mean square of each clip, float32 at least."""
    return clips.to(torch.promote_types(clips.dtype, torch.float32)).flatten(1).square().mean(dim=1)


def _weigh(
    sample_losses: Tensor,
    means: Tensor,
    weight: float,
    sharpness: float,
    spreads: Tensor | None,
    judged: Tensor | None,
) -> LossOutput:
    losses, means = sample_losses.detach(), means.detach()
    metrics = {"sample_losses": losses, "means": means}
    if judged is not None:
        metrics["judged"] = judged.detach()
    deviations = metrics.get("judged", losses) - means
    if spreads is not None:
        known = spreads > 0
        units = PAPER_SPREAD / torch.where(known, spreads.detach(), 1.0)
        deviations = metrics["deviations"] = torch.where(known, units * deviations, 0.0)
    weights = weight * torch.sigmoid(-sharpness * deviations)  # Eq. 7: 1 - sigmoid(x) = sigmoid(-x)
    return LossOutput((weights * sample_losses).mean(), {"weights": weights, **metrics})


def _check_per_sample(name: str, values: Tensor, prediction: Tensor) -> None:
    check_floating(name, values)
    batch = prediction.shape[0]
    if values.shape != (batch,):
        raise ValueError(f"{name} must have shape [{batch}], one per sample, got {list(values.shape)}.")
    check_same_device(name, values, "prediction", prediction)


def _check_options(weight: float, sharpness: float) -> None:
    check_number("weight", weight, at_least=0)
    check_number("sharpness", sharpness, at_least=0)
