"""Rectified-flow conversions: noise, velocity, x_0, timestep shift, classifier-free guidance."""

from __future__ import annotations

import torch
from torch import Tensor

from avd_core._checks import RangeCheck, check_floating, check_number, check_same_shape, check_timesteps


class FlowMatchingSchedule:
    """The linear path of rectified flow, as Wan2.1 and most video models of its generation use it.

    With ``sigma = t / num_train_timesteps``::

        x_t      = (1 - sigma) x_0 + sigma noise
        velocity = noise - x_0                        (what the model predicts)
        x_0      = x_t - sigma velocity

    Tensors may have any shape ``[B, ...]``; ``timesteps`` is ``[B]``, integer or floating. Results have the dtype of
    the tensors that come in; ``sigma`` itself is computed in float32 at least.

    Timesteps outside ``[0, num_train_timesteps]``, for example in another unit, raise ValueError. On a CPU every call
    checks them. On other devices only the first call does, since it has to wait for the device. So make one schedule
    and keep it.

    Args:
        num_train_timesteps: The timestep of pure noise. 1000 for Wan2.1; 1 for code that counts time in [0, 1].
    """

    def __init__(self, num_train_timesteps: float = 1000) -> None:
        check_number("num_train_timesteps", num_train_timesteps, above=0)
        self.num_train_timesteps = num_train_timesteps
        self._range_check = RangeCheck()

    def sigma(self, timesteps: Tensor, like: Tensor) -> Tensor:
        """Noise level of each sample, shaped ``[B, 1, ...]`` to broadcast against ``like``, float32 at least."""
        check_timesteps(timesteps, like)
        top = self.num_train_timesteps
        # What rounding in half precision can add to a time is no other unit.
        if outside := self._range_check.outside(timesteps, -0.01 * top, 1.01 * top):
            raise ValueError(
                f"timesteps {outside} lie outside [0, {top:g}]. Pass them in that unit, or say which timestep is pure "
                "noise in yours with FlowMatchingSchedule(num_train_timesteps=...)."
            )
        dtype = torch.promote_types(like.dtype, torch.float32)
        return (timesteps.to(dtype) / top).view(-1, *[1] * (like.ndim - 1))

    def add_noise(self, x_0: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """``x_t = (1 - sigma) x_0 + sigma noise``."""
        check_same_shape("x_0", x_0, "noise", noise)
        sigma = self.sigma(timesteps, x_0)
        return ((1 - sigma) * x_0 + sigma * noise).to(x_0.dtype)

    def velocity(self, x_0: Tensor, noise: Tensor) -> Tensor:
        """``noise - x_0``: the target of a flow model, and of :class:`AdaptiveRegressionLoss`."""
        check_same_shape("x_0", x_0, "noise", noise)
        return noise - x_0

    def velocity_to_x_0(self, velocity: Tensor, x_t: Tensor, timesteps: Tensor) -> Tensor:
        """``x_t - sigma velocity``."""
        check_same_shape("velocity", velocity, "x_t", x_t)
        return (x_t - self.sigma(timesteps, x_t) * velocity).to(x_t.dtype)

    def x_0_to_velocity(self, x_0: Tensor, x_t: Tensor, timesteps: Tensor) -> Tensor:
        """``(x_t - x_0) / sigma``; infinite or NaN at ``t = 0``, where x_0 says nothing about the velocity."""
        check_same_shape("x_0", x_0, "x_t", x_t)
        return ((x_t - x_0) / self.sigma(timesteps, x_t)).to(x_t.dtype)

    def euler_step(self, x_t: Tensor, velocity: Tensor, timesteps: Tensor, following: Tensor) -> Tensor:
        """``x_t + (sigma' - sigma) velocity``: from ``timesteps`` straight along the velocity to ``following``.

        It is a step of the probability-flow ODE. To ``following = 0`` it gives ``x_0``.
        """
        check_same_shape("velocity", velocity, "x_t", x_t)
        step = self.sigma(following, x_t) - self.sigma(timesteps, x_t)
        return (x_t + step * velocity).to(x_t.dtype)


def shift_timesteps(timesteps: Tensor, shift: float, num_train_timesteps: float = 1000) -> Tensor:
    """Move timesteps towards noise: ``sigma' = shift sigma / (1 + (shift - 1) sigma)``.

    Args:
        timesteps: Floating tensor of any shape, in ``[0, num_train_timesteps]``.
        shift: 1 changes nothing. Wan2.1 samples with 3 (480p) or 5 (720p); AVD draws its score timesteps with 5.
        num_train_timesteps: The timestep of pure noise.

    Returns:
        A tensor of the same shape and dtype; 0 and ``num_train_timesteps`` stay where they are.
    """
    check_floating("timesteps", timesteps)
    check_number("shift", shift, above=0)
    sigma = timesteps / num_train_timesteps
    return num_train_timesteps * shift * sigma / (1 + (shift - 1) * sigma)


def classifier_free_guidance(conditional: Tensor, unconditional: Tensor, scale: float) -> Tensor:
    """``unconditional + scale (conditional - unconditional)``: scale 1 is the conditional prediction.

    Some code, also the released AVD code, computes ``conditional + g (conditional - unconditional)``, which is the same
    for ``g = scale - 1``. Convert a published ``g`` with :func:`standard_guidance_scale`.
    """
    check_same_shape("conditional", conditional, "unconditional", unconditional)
    return unconditional + scale * (conditional - unconditional)


def standard_guidance_scale(additive_scale: float) -> float:
    """The ``scale`` of :func:`classifier_free_guidance` that equals ``conditional + g (conditional - unconditional)``.

    It is ``g + 1``: a "guidance of 5" in the additive form is 6 in the standard one.
    """
    return additive_scale + 1.0
