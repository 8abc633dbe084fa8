"""FastGen's students sampled with their high-noise steps at half the frame rate."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from avd_core import FlowMatchingSchedule, HalfRateInterpolationSampler, interpolate_linearly
from avd_integrations.fastgen.host import HOST, check_host, is_rectified_flow, nearest


def half_rate(
    method: Any, interpolator: Callable[[Tensor], Tensor] = interpolate_linearly, half_rate_steps: int = 2
) -> Any:
    """A FastGen method whose students are sampled by :class:`avd_core.HalfRateInterpolationSampler`.

    Training is untouched; validation, the samples that are logged and FastGen's inference scripts change, as they all
    sample through the method's class::

        config.model_class = L(half_rate(DMD2Model, interpolator))(config=None)

    Args:
        method: A subclass of ``FastGenModel`` that samples as it does, such as ``DMD2Model``.
        interpolator: As there; a network in eval mode and on the samples' device.
        half_rate_steps: How many of the few steps run on every second frame.

    Returns:
        A subclass of ``method``.

    Raises:
        ImportError, RuntimeError: As :func:`avd_callback`.
        ValueError: If the method samples in a way of its own, as causal ones do. When sampling: if there are fewer
            steps, or the student is not on rectified flow's path, is given frames, or does not sample with
            ``student_sample_type="sde"``.
    """
    check_host()
    base = HOST.load("fastgen.methods.model").FastGenModel
    own = getattr(method, "_student_sample_loop", None)
    if getattr(own, "__func__", None) is not base._student_sample_loop.__func__:
        raise ValueError(f"{method.__name__} samples in a way of its own, which has no half frame rate.")

    def _student_sample_loop(
        cls: Any,
        /,
        net: Any,
        x: Tensor,
        t_list: Tensor,
        condition: Any = None,
        student_sample_type: str = "sde",
        **_: Any,
    ) -> Tensor:
        _check_sampling(net, student_sample_type)
        grid = t_list[:-1]

        def denoise(x_t: Tensor, timesteps: Tensor) -> Tensor:
            t = grid.to(x_t.device)[nearest(timesteps, grid)]
            x_0: Tensor = net(x_t, t, condition=condition, fwd_pred_type="x0")
            return x_0

        sampler = HalfRateInterpolationSampler(
            denoise, interpolator, tuple(grid.tolist()), half_rate_steps, schedule=FlowMatchingSchedule(1)
        )
        return sampler(x)

    return type(
        f"HalfRate{method.__name__}",
        (method,),
        {"_student_sample_loop": classmethod(_student_sample_loop), "__doc__": method.__doc__},
    )


def _check_sampling(net: Any, student_sample_type: str) -> None:
    if student_sample_type != "sde":
        raise ValueError(
            f'Half-rate sampling noises each prediction anew: it needs model.student_sample_type="sde", got '
            f"{student_sample_type!r}."
        )
    if not is_rectified_flow(net):
        raise ValueError(f"Half-rate sampling is for rectified flow, not {type(net.noise_scheduler).__name__}.")
    conditioned = [name for name in ("is_i2v", "is_vid2vid", "is_video2world") if getattr(net, name, False)]
    if conditioned or hasattr(net, "preserve_conditioning"):
        raise ValueError(
            f"Half-rate sampling is for text-to-video: {type(net).__name__} is given frames, at the full rate."
        )
