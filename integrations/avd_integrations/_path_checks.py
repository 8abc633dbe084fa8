"""Whether times, and what a host noised at them, lie on its path: looked at when terms are made and in first calls."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import torch
from torch import Tensor

from avd_integrations.parametrisation import Parametrisation

_SLACK = 1e-6
"""Of alpha: the cosine of pi/2 in float32 is below 0."""
_TOLERANCE = 0.05
"""Of the relative error of ``x_t``: rounding to bfloat16 makes 0.003, another path, unit or tensor 0.5 and more."""
_AMPLIFIED = 100
"""By so much is an error of the prediction worth a warning."""


def check_times(
    parametrisation: Parametrisation, timesteps: Sequence[float], time_range: tuple[float, float] | None = None
) -> None:
    """Require that the times to be drawn lie on a path, in its unit, with something to learn at each of them.

    Warns once, with ``UserWarning``, where a prediction of the noise is amplified a hundredfold and more.

    Args:
        parametrisation: The path, and what the model predicts on it.
        timesteps: The few steps; of a range, the middle of each bin.
        time_range: The range, whose ends are looked at too. At the clean one there may be no noise.

    Raises:
        TypeError: If ``coefficients`` does not return two tensors of the times' shape.
        ValueError: If the path cannot be looked up at the times, is not one of noise there (``alpha < 0``,
            ``sigma <= 0``, not finite), or its noise neither rises nor falls along them; if all of them are nearly
            clean; if the model predicts noise at pure noise, which says nothing of the clip, or x_0 where there is no
            noise; or if it predicts "v" on the path of flow models, which mean "velocity" by it.
    """
    given = list(timesteps) if time_range is None else sorted({*timesteps, *time_range})
    alpha, sigma = _look_up(parametrisation, torch.tensor(given, dtype=torch.float64, device="cpu"), "timesteps")
    reason = _not_on_path(parametrisation, alpha, sigma)
    reason = reason or _not_learned(parametrisation, alpha, sigma, clean_end=time_range is not None)
    if reason:
        raise _refusal("timesteps", given, alpha, sigma, reason)
    if reason := _amplified(parametrisation, given, alpha, sigma):
        warnings.warn(reason, stacklevel=3)


def check_noising(
    parametrisation: Parametrisation, *, x_t: Tensor, clips: Tensor, noise: Tensor, times: Tensor
) -> bool:
    """Require that ``x_t`` is ``alpha clips + sigma noise`` at ``times``. Reads values, so it waits for the device.

    Warns as :func:`check_times` does: without the regression, the times of a call are the first that are known.

    Args:
        parametrisation: The host's.
        x_t: ``[B, ...]``
        clips: ``[B, ...]``
        noise: ``[B, ...]``
        times: ``[B]`` in the host's unit.

    Returns:
        Whether some ``x_t`` can tell: at pure noise any clip would do, with as much of one as of the other the two
        could be swapped, and values that are not finite are left to who guards against them.

    Raises:
        ValueError: If it is something else; if the times are not on the path, or the model cannot predict there what
            it is said to, as in :func:`check_times`.
    """
    seen = times.detach().double().cpu()
    alpha, sigma = _look_up(parametrisation, seen, "times")
    if reason := _not_on_path(parametrisation, alpha, sigma):
        raise _refusal("times", seen.tolist(), alpha, sigma, reason)
    if reason := _amplified(parametrisation, seen.tolist(), alpha, sigma):
        warnings.warn(reason, stacklevel=4)
    dtype = torch.promote_types(x_t.dtype, torch.float32)
    x_t, clips, noise = (tensor.detach().to(dtype) for tensor in (x_t, clips, noise))
    of_noise = parametrisation.add_noise(torch.zeros_like(clips), noise, times)
    expected = parametrisation.add_noise(clips, noise, times)
    swapped = parametrisation.add_noise(noise, clips, times)
    size = _norms(expected).clamp_min(torch.finfo(dtype).tiny)
    error = _norms(x_t - expected) / size
    mistakes = torch.stack([_norms(of_noise), _norms(expected - of_noise), _norms(expected - swapped)])
    telling = error.isfinite() & (mistakes.amin(dim=0) / size > 2 * _TOLERANCE)
    largest = torch.where(error.isfinite(), error, 0).max()
    found, tells = torch.stack([largest, telling.any().to(dtype)]).tolist()
    if found > _TOLERANCE:
        raise ValueError(
            f"x_t is not made of clips and noise at times: it is {found:.2g} of its size away from alpha clips + sigma "
            f"noise, where rounding explains 0.003; times {_short(seen)} have alpha {_short(alpha)} and sigma "
            f"{_short(sigma)} on the given path. Usual causes: x_t comes from the student's own samples (backward "
            "simulation), where there are no clips for the regression; arguments are swapped; times are in another "
            "unit; the host noises on another path, or shifts its times. Pass what the student saw, the clean clips "
            "and the noise in it, and the Parametrisation that made it."
        )
    return bool(tells)


def _look_up(parametrisation: Parametrisation, times: Tensor, name: str) -> tuple[Tensor, Tensor]:
    try:
        found = parametrisation.coefficients(times)
    except (IndexError, RuntimeError) as error:
        raise ValueError(
            f"The host's path cannot be looked up at {name} {_short(times)}, given as {times.dtype} on the CPU: "
            f"{error}. They must be in the unit that coefficients takes, and its tables be brought to times.device."
        ) from error
    if not (isinstance(found, tuple) and len(found) == 2 and all(_is_like(part, times) for part in found)):
        raise TypeError("coefficients must return (alpha, sigma), a tensor [B] each for times [B].")
    alpha, sigma = (part.detach().double().cpu() for part in found)
    return alpha, sigma


def _not_on_path(parametrisation: Parametrisation, alpha: Tensor, sigma: Tensor) -> str:
    """Why these cannot be what a model predicts from; empty if they can."""
    on_path = alpha.isfinite() & sigma.isfinite() & (alpha >= -_SLACK) & (sigma >= 0) & (alpha + sigma > 0)
    if not bool(on_path.all()):
        return "alpha and sigma must be at least 0, one of them above"
    if parametrisation.prediction == "noise" and bool((alpha <= _SLACK).any()):
        return (
            "at pure noise (alpha 0) a prediction of the noise says nothing of the clip: leave that time out, or "
            "predict something else"
        )
    if parametrisation.prediction == "x_0" and bool((sigma == 0).any()):
        return (
            "at clean clips (sigma 0; a sampler's last time, 0, is no step) a prediction of x_0 says nothing of the "
            "noise: leave that time out, or predict something else"
        )
    # Pure noise and clean clips do not tell: alpha + sigma is 1 there on nearly every path.
    straight = ((alpha + sigma - 1).abs() < 1e-3).all() and (torch.minimum(alpha, sigma) > 0.01).any()
    if parametrisation.prediction == "v" and bool(straight):
        return (
            'alpha + sigma is 1 there: the path of flow models, whose hosts call their velocity "v". Say '
            'prediction="velocity", which is noise - x_0; "v" is v-prediction, alpha noise - sigma x_0'
        )
    return ""


def _not_learned(parametrisation: Parametrisation, alpha: Tensor, sigma: Tensor, *, clean_end: bool) -> str:
    """Why a student does not learn at these times, which follow each other; empty if it does."""
    if not clean_end and bool((sigma == 0).any()):
        return "sigma must be above 0: a sampler's last time, 0, is no step of the student"
    flow_sigma = sigma / (alpha + sigma)
    change = flow_sigma.diff()
    if not (bool((change > 0).all()) or bool((change < 0).all())):
        return "noise must rise or fall along the timesteps"
    if flow_sigma.max() < 0.01:
        return "all of them are clean clips, nearly"
    return ""


def _amplified(parametrisation: Parametrisation, times: Sequence[float], alpha: Tensor, sigma: Tensor) -> str:
    """Why predictions of the noise are worth a warning at these times; empty if they are not."""
    factors = (alpha + sigma) / alpha  # of an error of the noise, when it becomes one of the velocity
    if parametrisation.prediction != "noise" or not bool((factors >= _AMPLIFIED).any()):
        return ""
    return (
        f"The model predicts noise, and at timestep {times[int(alpha.argmin())]:g} alpha is {alpha.min():.2g}: its "
        f"errors are {factors.max():.0f} times as large in the velocity, which the regression compares, and nearly so "
        "in x_0, whose motion is measured. Leave that time out, or watch regression/sample_losses and motion/variance."
    )


def _refusal(name: str, times: Sequence[float], alpha: Tensor, sigma: Tensor, reason: str) -> ValueError:
    return ValueError(
        f"{name} {times} have alpha {_short(alpha)} and sigma {_short(sigma)} on the host's path, and {reason}. Give "
        "them in the unit that coefficients takes."
    )


def _norms(values: Tensor) -> Tensor:
    """``[B, ...]`` to ``[B]``."""
    return values.flatten(1).square().sum(dim=1).sqrt()


def _is_like(value: object, times: Tensor) -> bool:
    return isinstance(value, Tensor) and value.shape == times.shape


def _short(values: Tensor) -> list[float]:
    return [float(f"{value:.4g}") for value in values.tolist()]
