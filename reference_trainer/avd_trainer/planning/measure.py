"""How fast this machine's GPU is at a run's passes, measured on a few blocks."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch

from avd_trainer.planning.description import Run
from avd_trainer.planning.duration import Speed
from avd_trainer.planning.meta_models import empty_inputs, meta_models
from avd_trainer.planning.operations import forward_operations, training_operations

_BLOCKS = 4
"""Blocks that are run: enough to be most of the time, few enough for any GPU's memory."""
_REPEATS = 3


def measure_speed(run: Run, device: torch.device) -> Speed:
    """Time a forward and a training pass of a few blocks of the run's model at its size, with random weights.

    Communication, the optimizer and data are not in it, so a run on several GPUs is slower.

    Args:
        run: The run.
        device: Where to measure.
    """
    role = next(role.name for role in run.trained)
    model = meta_models(run)[role]
    model = model.with_layers(min(model.layers, _BLOCKS))
    size = (run.latent_shape, run.text_length)
    inputs = empty_inputs(model, run.batches.micro, *size, device)
    velocity_model = model.build_gathered(role, device)
    for parameter in velocity_model.module.parameters():
        torch.nn.init.normal_(parameter, std=0.02)

    def ask() -> None:
        with torch.no_grad():
            velocity_model(*inputs)

    def train() -> None:
        velocity_model(*inputs).sum().backward()  # type: ignore[no-untyped-call]
        for parameter in velocity_model.parameters():
            parameter.grad = None

    examples = run.batches.micro
    return Speed(
        examples * forward_operations(model, role, *size) / _seconds(ask, device),
        examples * training_operations(model, role, *size) / _seconds(train, device),
        _name(device),
        f"measured: {model.layers} blocks, without communication, optimizer and data",
    )


def _seconds(work: Callable[[], None], device: torch.device) -> float:
    """The median of a few, after one to warm up."""
    seconds = []
    for _ in range(_REPEATS + 1):
        started = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds[1:])


def _name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
