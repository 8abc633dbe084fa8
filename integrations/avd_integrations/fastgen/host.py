"""What is used of FastGen, and questions about it that several files here ask."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from avd_integrations._host import Host

PROVEN_ON = "NVlabs/FastGen 34f30e8 (2026-02-25)"
"""The commit that the tests ran in."""

HOST = Host("FastGen", PROVEN_ON, "Install it from https://github.com/NVlabs/FastGen.")

# What is used of the host, with the arguments it is used with.
_USED: dict[str, dict[str, tuple[str, ...]]] = {
    "fastgen.callbacks.callback": {
        "Callback.on_load_checkpoint_start": ("model",),
        "Callback.on_load_checkpoint_end": ("model", "iteration"),
        "Callback.on_backward_begin": (
            "model", "data_batch", "output_batch", "loss_dict", "iteration", "accum_iter",
        ),
        "Callback.on_optimizer_step_begin": ("model", "iteration"),
        "Callback.state_dict": (),
        "Callback.load_state_dict": ("state_dict",),
    },
    "fastgen.methods.model": {
        "FastGenModel._prepare_training_data": ("data",),
        "FastGenModel.get_optimizers": ("iteration",),
        "FastGenModel.autocast": (),
        "FastGenModel._student_sample_loop": ("net", "x", "t_list", "condition", "student_sample_type"),
    },
    "fastgen.networks.network": {"FastGenNetwork.forward": ("x_t", "t", "condition", "fwd_pred_type")},
    "fastgen.networks.noise_schedule": {
        "BaseNoiseSchedule.alpha": ("t",),
        "BaseNoiseSchedule.sigma": ("t",),
        "BaseNoiseSchedule.get_t_list": ("sample_steps", "device"),
        "RFNoiseSchedule": (),
    },
}  # fmt: skip


def check_host() -> None:
    """Require that everything of FastGen that is used here is there, before a run is under way."""
    for module, members in _USED.items():
        HOST.load(module, members)


def is_rectified_flow(net: Any) -> bool:
    """Whether a network's noise schedule is that."""
    return isinstance(net.noise_scheduler, HOST.load("fastgen.networks.noise_schedule").RFNoiseSchedule)


def nearest(times: Tensor, grid: Tensor) -> Tensor:
    """``[B]`` indices into the grid, which has FastGen's own times.

    FastGen checks their range in float64, and 0.999 in float32 is outside.
    """
    return (times.to(grid.dtype).unsqueeze(1) - grid.to(times.device)).abs().argmin(dim=1)
