"""How a host counts time and what its model predicts, and the way from there to velocities and back."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from avd_core import FlowMatchingSchedule

Coefficients = Callable[[Tensor], tuple[Tensor, Tensor]]
"""Times ``[B]`` in the host's unit to ``(alpha, sigma)``, each ``[B]``, of ``x_t = alpha x_0 + sigma noise``.

Times are float64, on the clips' device, and once on the CPU, when :class:`HostTerms` looks at its few steps.
"""

Prediction = Literal["velocity", "x_0", "noise", "v"]


@dataclass(frozen=True)
class Parametrisation:
    """A host's noising path ``x_t = alpha(t) x_0 + sigma(t) noise``, and what its model predicts there.

    Everything else in this package is in terms of ``x_0`` and of the velocity ``noise - x_0`` of rectified flow, in
    which :class:`avd_core.AdaptiveRegressionLoss` regresses. Whatever the path, the two follow from a prediction::

        prediction   is                            x_0                                   noise
        "velocity"   noise - x_0                   (x_t - sigma p) / (alpha + sigma)     x_0 + p
        "x_0"        x_0                           p                                     (x_t - alpha p) / sigma
        "noise"      noise                         (x_t - sigma p) / alpha               p
        "v"          alpha noise - sigma x_0       (alpha x_t - sigma p) / n             (sigma x_t + alpha p) / n

    with ``n = alpha^2 + sigma^2``. "v" is v-prediction of Salimans and Ho (2022), and TrigFlow's F (rCM, sCM) without
    its scale of the data. Where a divisor is 0 the prediction says nothing about the other one, and the result is
    infinite or NaN: x_0 from noise at ``alpha = 0``, noise from x_0 at ``sigma = 0``.

    Tensors are ``[B, ...]`` floating point, times ``[B]`` in the host's unit. Coefficients are computed in float64 and
    results have the dtype of ``x_t``.

    Args:
        coefficients: ``(alpha, sigma)`` of times.
        prediction: What the model predicts.
    """

    coefficients: Coefficients
    prediction: Prediction = "velocity"

    def __post_init__(self) -> None:
        if not callable(self.coefficients):
            raise TypeError(
                f"coefficients must be a function from times to (alpha, sigma), got {type(self.coefficients).__name__}."
            )
        if self.prediction not in ("velocity", "x_0", "noise", "v"):
            raise ValueError(
                'prediction must be "velocity" (flow), "x_0" (sample), "noise" (epsilon) or "v" (v_prediction), got '
                f"{self.prediction!r}."
            )

    def add_noise(self, x_0: Tensor, noise: Tensor, times: Tensor) -> Tensor:
        """``alpha x_0 + sigma noise``."""
        alpha, sigma = self._at(times, x_0)
        return (alpha * x_0 + sigma * noise).to(x_0.dtype)

    def x_0(self, prediction: Tensor, x_t: Tensor, times: Tensor) -> Tensor:
        """The ``x_0`` in what a model predicts."""
        return self._split(prediction, x_t, times)[0].to(x_t.dtype)

    def noise(self, prediction: Tensor, x_t: Tensor, times: Tensor) -> Tensor:
        """The noise in what a model predicts."""
        return self._split(prediction, x_t, times)[1].to(x_t.dtype)

    def velocity(self, prediction: Tensor, x_t: Tensor, times: Tensor) -> Tensor:
        """The velocity ``noise - x_0`` in what a model predicts."""
        if self.prediction == "velocity":
            return prediction.to(x_t.dtype)
        x_0, noise = self._split(prediction, x_t, times)
        return (noise - x_0).to(x_t.dtype)

    def exact_prediction(self, x_0: Tensor, noise: Tensor, times: Tensor) -> Tensor:
        """What a model that knows ``x_0`` and ``noise`` predicts."""
        alpha, sigma = self._at(times, x_0)
        values = {
            "velocity": lambda: noise - x_0,
            "x_0": lambda: x_0,
            "noise": lambda: noise,
            "v": lambda: alpha * noise - sigma * x_0,
        }
        return values[self.prediction]().to(x_0.dtype)

    def flow_sigma(self, times: Tensor) -> Tensor:
        """``[B]`` float64: the noise level ``sigma / (alpha + sigma)`` that rectified flow would give these times."""
        alpha, sigma = self.coefficients(times.double())
        return sigma / (alpha + sigma)

    def _split(self, prediction: Tensor, x_t: Tensor, times: Tensor) -> tuple[Tensor, Tensor]:
        """``x_0`` and noise."""
        alpha, sigma = self._at(times, x_t)
        if self.prediction == "velocity":
            x_0 = (x_t - sigma * prediction) / (alpha + sigma)
            return x_0, x_0 + prediction
        if self.prediction == "x_0":
            return prediction, (x_t - alpha * prediction) / sigma
        if self.prediction == "noise":
            return (x_t - sigma * prediction) / alpha, prediction
        scale = alpha**2 + sigma**2
        return (alpha * x_t - sigma * prediction) / scale, (sigma * x_t + alpha * prediction) / scale

    def _at(self, times: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        shape = (-1, *[1] * (like.ndim - 1))
        dtype = torch.promote_types(like.dtype, torch.float32)
        alpha, sigma = self.coefficients(times.double())
        return alpha.to(like.device, dtype).view(shape), sigma.to(like.device, dtype).view(shape)


def rectified_flow(num_train_timesteps: float = 1000, prediction: Prediction = "velocity") -> Parametrisation:
    """Wan2.1, FastVideo, CausVid, Self-Forcing (times in [0, 1000]), FastGen (in [0, 1]): ``alpha = 1 - sigma``."""
    top = FlowMatchingSchedule(num_train_timesteps).num_train_timesteps

    def coefficients(times: Tensor) -> tuple[Tensor, Tensor]:
        sigma = times / top
        return 1 - sigma, sigma

    return Parametrisation(coefficients, prediction)


def trigflow(prediction: Prediction = "v") -> Parametrisation:
    """rCM and sCM: ``x_t = cos(t) x_0 + sin(t) noise`` with t in [0, pi/2]."""
    return Parametrisation(lambda times: (times.cos(), times.sin()), prediction)


def variance_preserving(alphas_cumprod: Tensor, prediction: Prediction = "noise") -> Parametrisation:
    """DDPM's path (Stable Diffusion, DMD2, LCM): ``alpha^2 = alphas_cumprod[t]``, ``sigma^2 = 1 - alpha^2``.

    Args:
        alphas_cumprod: ``[T]`` of the host's noise scheduler; times are its indices.
        prediction: "noise" (epsilon), "v" or "x_0".

    Raises:
        TypeError: If ``alphas_cumprod`` is something else, such as the scheduler.
    """
    if not isinstance(alphas_cumprod, Tensor):
        raise TypeError(f"alphas_cumprod must be the scheduler's tensor of it, got {type(alphas_cumprod).__name__}.")
    table = alphas_cumprod.detach().double()
    # A copy for each device, as a copy in every call would make the host wait for a GPU.
    tables = {table.device: table}

    def coefficients(times: Tensor) -> tuple[Tensor, Tensor]:
        if times.device not in tables:
            tables[times.device] = table.to(times.device)
        index = times.long()
        # Looked at on the CPU only, where it costs nothing.
        look = times.device.type == "cpu" and not torch.compiler.is_compiling()
        if look and not bool(((index == times) & (index >= 0) & (index < len(table))).all()):
            raise IndexError(f"times must be whole numbers from 0 to {len(table) - 1}, got {times.tolist()[:4]}")
        alpha_squared = tables[times.device][index]
        return alpha_squared.sqrt(), (1 - alpha_squared).sqrt()

    return Parametrisation(coefficients, prediction)


def phase_end_to_velocity(x_end: Tensor, x_t: Tensor, sigma: Tensor, sigma_end: Tensor) -> Tensor:
    """PCM's and DCM's prediction, the point where the trajectory leaves the phase, to the velocity that leads there.

    ``x_end = x_t + (sigma_end - sigma) velocity`` on rectified flow's path; so ``x_0 = x_t - sigma velocity``.

    Args:
        x_end: ``[B, ...]`` the model's prediction at the end of the phase.
        x_t: ``[B, ...]`` where it started.
        sigma: ``[B]`` noise level of ``x_t``, in [0, 1].
        sigma_end: ``[B]`` that of the phase's end, below ``sigma``.
    """
    shape = (-1, *[1] * (x_t.ndim - 1))
    step = (sigma_end.double() - sigma.double()).to(x_t.device, torch.promote_types(x_t.dtype, torch.float32))
    return ((x_end - x_t) / step.view(shape)).to(x_t.dtype)
