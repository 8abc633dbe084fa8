"""Consistency distillation: LCM (diffusers' example scripts), PCM and DCM.

These trainers noise real clips and run the student on them for their own loss. The terms here read that prediction, so
they cost no further forward. The trainers have no hooks: each page under ``docs/hosts`` has the lines to insert, and
which names of the script they read. The module imports no host; it looks at the objects that it is given.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from avd_core import AVDConfig, LossOutput, MotionConfig, RegressionConfig
from avd_integrations._host import Host
from avd_integrations.parametrisation import (
    Prediction,
    phase_end_to_velocity,
    rectified_flow,
    variance_preserving,
)
from avd_integrations.terms import HostTerms, Layout

LCM = Host("LCM", "huggingface/diffusers 58eb52c")
PCM = Host("PCM", "G-U-N/Phased-Consistency-Model b127277")
DCM = Host("DCM", "Vchitect/DCM c7039e8")

PROVEN_ON = ", ".join(host.proven_on for host in (LCM, PCM, DCM))
"""The commits that the tests ran in."""

_PREDICTIONS: dict[str, Prediction] = {"epsilon": "noise", "v_prediction": "v", "sample": "x_0"}
"""diffusers' names of what a model predicts."""
_PAPER_REGRESSION = RegressionConfig()
_PAPER_MOTION = MotionConfig()


class PhasedConsistencyTerms(nn.Module):
    """:class:`HostTerms` where the prediction is ``x`` at the end of a phase, on rectified flow's path.

    The only state is the cache: register the module with the host's checkpointing, or save ``state_dict()``.

    Args:
        solver: The host's ``EulerSolver``, of which ``sigmas`` and ``sigmas_prev`` are read, both ``[N]`` in [0, 1].
        regression: Options of the adaptive regression; None leaves it out.
        motion: Options of the motion term; None leaves it out.
        layout: Order of the host's dimensions.
        first_index: The lowest index of the solver that the script draws.
        first_index_steps: Whether the script goes one Euler step, rather than to the phase's end, with the whole batch
            where its first sample has ``first_index``. DCM's semantic experts do.
        host: For errors: ``PCM`` or ``DCM`` of this module.

    Raises:
        RuntimeError: If the solver does not have what is read.
        ValueError: If both terms are left out, for a ``first_index`` that the solver does not have, or as
            :class:`HostTerms`.
    """

    sigmas: Tensor
    ends: Tensor

    def __init__(
        self,
        solver: Any,
        regression: RegressionConfig | None,
        motion: MotionConfig | None,
        layout: Layout,
        *,
        first_index: int = 0,
        first_index_steps: bool = False,
        host: Host = PCM,
    ) -> None:
        super().__init__()
        sigmas, ends = (_tensor_of(solver, name, host) for name in ("sigmas", "sigmas_prev"))
        if not 0 <= first_index < len(sigmas):
            raise ValueError(f"first_index must be an index of the solver's {len(sigmas)} points, got {first_index}.")
        # Velocities: the phase's end is left behind before HostTerms sees anything.
        self.terms = HostTerms(_config(sigmas[first_index:], regression, motion), rectified_flow(1), layout=layout)
        self.first_index, self.first_index_steps = first_index, first_index_steps
        # Not saved: they are the solver's, and the cache has its own grid to compare.
        self.register_buffer("sigmas", sigmas.detach().clone(), persistent=False)
        self.register_buffer("ends", ends.detach().clone(), persistent=False)

    def from_prediction(
        self, *, prediction: Tensor, x_t: Tensor, clips: Tensor, noise: Tensor, index: Tensor, end_index: Tensor
    ) -> LossOutput:
        """The loss to add to the host's, and its metrics.

        Args:
            prediction: ``[B, ...]`` the student's ``x`` at the end of the phase, with gradient.
            x_t: ``[B, ...]`` the noised clips that it saw.
            clips: ``[B, ...]`` the clean latents in them.
            noise: ``[B, ...]`` the noise in them.
            index: ``[B]`` where ``x_t`` is among the solver's points.
            end_index: ``[B]`` the point whose previous one is the end of the phase, as the solver returned it.

        Returns:
            LossOutput: As :meth:`HostTerms.from_prediction`.

        Raises:
            TypeError, ValueError: As there, and where ``prediction`` has another shape than ``x_t``.
        """
        if not isinstance(prediction, Tensor) or prediction.shape != x_t.shape:
            found = list(prediction.shape) if isinstance(prediction, Tensor) else type(prediction).__name__
            raise ValueError(
                f"prediction must have the shape of x_t, {list(x_t.shape)}, got {found}: nothing is broadcast here."
            )
        if self.first_index_steps:
            end_index = torch.where(index[0] == self.first_index, index, end_index)
        sigma, sigma_end = self.sigmas[index], self.ends[end_index]
        # In half precision the difference of two near points would be mostly rounding.
        x_t = x_t.to(torch.promote_types(x_t.dtype, torch.float32))
        velocity = phase_end_to_velocity(prediction, x_t, sigma, sigma_end)
        return self.terms.from_prediction(prediction=velocity, x_t=x_t, clips=clips, noise=noise, times=sigma)

    def update(self) -> None:
        """As :meth:`HostTerms.update`."""
        self.terms.update()


def lcm_terms(
    noise_scheduler: Any,
    ddim_timesteps: Tensor,
    regression: RegressionConfig | None = _PAPER_REGRESSION,
    motion: MotionConfig | None = None,
    layout: Layout = "BCHW",
) -> HostTerms:
    """For LCM, whose page has the call of :meth:`HostTerms.from_prediction`.

    The prediction, the script's ``model_pred``, is the consistency function, an ``x_0``, at DDPM's integer timesteps.
    The sample of the motion term is that prediction; the script generates no other.

    Args:
        noise_scheduler: The script's DDPM scheduler, of which ``alphas_cumprod`` ``[T]`` is read.
        ddim_timesteps: ``[N]`` of the script's solver, between which it draws ``start_timesteps``.
        regression: Options of the adaptive regression, the paper's by default; None leaves it out.
        motion: Options of the motion term. Images have none; for a script changed to clips give ``layout`` too.
        layout: Order of the latents' dimensions.

    Raises:
        RuntimeError: If the scheduler does not have what is read.
        TypeError: If ``ddim_timesteps`` is something else, such as the solver.
        ValueError: If both terms are left out, or as :class:`HostTerms`.
    """
    if not isinstance(ddim_timesteps, Tensor):
        raise TypeError(
            f"ddim_timesteps must be the tensor of the script's solver, got {type(ddim_timesteps).__name__}. Pass "
            "solver.ddim_timesteps."
        )
    parametrisation = variance_preserving(_tensor_of(noise_scheduler, "alphas_cumprod", LCM), "x_0")
    return HostTerms(_config(ddim_timesteps, regression, motion), parametrisation, layout=layout)


def pcm_terms(
    noise_scheduler: Any,
    solver: Any,
    regression: RegressionConfig | None = _PAPER_REGRESSION,
    motion: MotionConfig | None = None,
    layout: Layout = "BCHW",
) -> HostTerms | PhasedConsistencyTerms:
    """For PCM's three backbones; which of them is told by the solver.

    - Stable Diffusion 3, ``EulerSolver``: :meth:`PhasedConsistencyTerms.from_prediction` of ``model_pred``, which is x
      at the phase's end by then.
    - Stable Diffusion 1.5 and XL, ``DDIMSolver``: :meth:`HostTerms.from_prediction` of ``noise_pred``: the model's own
      prediction is still there beside the phase's end, so it is read.

    Args:
        noise_scheduler: The script's scheduler. For a ``DDIMSolver`` its ``alphas_cumprod`` and
            ``config.prediction_type`` are read; for an ``EulerSolver`` nothing.
        solver: The script's solver.
        regression: Options of the adaptive regression, the paper's by default; None leaves it out.
        motion: Options of the motion term. Images have none; for a script changed to clips give ``layout`` too.
        layout: Order of the latents' dimensions.

    Raises:
        RuntimeError: If the solver is neither, or an object does not have what is read.
        ValueError: If both terms are left out, or as :class:`HostTerms`.
    """
    if hasattr(solver, "sigmas"):
        return PhasedConsistencyTerms(solver, regression, motion, layout, host=PCM)
    timesteps = _tensor_of(solver, "ddim_timesteps", PCM)
    table = _tensor_of(noise_scheduler, "alphas_cumprod", PCM)
    name = getattr(getattr(noise_scheduler, "config", None), "prediction_type", None)
    if name not in _PREDICTIONS:
        raise PCM.moved(
            f"The noise scheduler's config.prediction_type is {name!r}, known are {', '.join(_PREDICTIONS)}"
        )
    parametrisation = variance_preserving(table, _PREDICTIONS[name])
    return HostTerms(_config(timesteps, regression, motion), parametrisation, layout=layout)


def dcm_terms(
    solver: Any,
    regression: RegressionConfig | None = _PAPER_REGRESSION,
    motion: MotionConfig | None = _PAPER_MOTION,
    *,
    sp_size: int,
    first_index: int = 35,
) -> PhasedConsistencyTerms:
    """For DCM's experts, whose page has the call of :meth:`PhasedConsistencyTerms.from_prediction`.

    Args:
        solver: The script's ``EulerSolver``.
        regression: Options of the adaptive regression, the paper's by default; None leaves it out.
        motion: Options of the motion term, the paper's for Wan's latents by default; None leaves it out.
        sp_size: The script's ``args.sp_size``: over how many ranks it splits the frames of a clip.
        first_index: The lowest index that the script draws: 35 in Wan's semantic expert, 38 in HunyuanVideo's, and 0
            in the detail experts, which have no special case there.

    Raises:
        RuntimeError: If the solver does not have what is read.
        ValueError: If both terms are left out, for a ``first_index`` that the solver does not have, or if ``sp_size``
            is below 1, or above 1 with the motion term.
    """
    if sp_size < 1:
        raise ValueError(f"sp_size must be the number of ranks that share a clip, at least 1, got {sp_size}.")
    if sp_size > 1 and motion is not None:
        raise ValueError(
            f"With sp_size={sp_size} a rank has 1/{sp_size} of a clip's frames, and the motion term would take the "
            "variance along these alone. Use motion=None, or train with --sp_size 1."
        )
    return PhasedConsistencyTerms(
        solver,
        regression,
        motion,
        "BCFHW",
        first_index=first_index,
        first_index_steps=first_index > 0,
        host=DCM,
    )


def _config(timesteps: Tensor, regression: RegressionConfig | None, motion: MotionConfig | None) -> AVDConfig:
    """The points at which the host noises clips are the grid of the cache."""
    return AVDConfig(timesteps=tuple(timesteps.tolist()), regression=regression, motion=motion)


def _tensor_of(owner: Any, name: str, host: Host) -> Tensor:
    value = getattr(owner, name, None)
    if not isinstance(value, Tensor):
        raise host.moved(f"{type(owner).__name__} has no tensor {name}")
    return value
