"""What a run needs before it starts: memory, time and disk, from its configuration alone."""

from __future__ import annotations

from typing import NamedTuple

import torch

from avd_trainer.data.sources import assumed_encoding
from avd_trainer.models.codecs.latent_space import latent_shape_of
from avd_trainer.planning.changes import Change, find_changes
from avd_trainer.planning.description import (
    Run,
    architecture_of,
    describe,
    find_latent_shape,
    find_text_length,
)
from avd_trainer.planning.disk import DiskPlan, plan_disk
from avd_trainer.planning.duration import TimePlan, assumed_speed, plan_time
from avd_trainer.planning.measure import measure_speed
from avd_trainer.planning.memory import GB, Phase, plan_memory, worst
from avd_trainer.training.config import TrainConfig

CLIPS = 10_000
"""Assumed where the data is not there yet."""


class Plan(NamedTuple):
    """What a run needs.

    Attributes:
        run: What was planned.
        gpu_memory: Memory of a GPU, in GB of 2^30 bytes.
        memory: The phases of a step that can be the worst one, on each GPU.
        changes: What to change where it does not fit.
        time: Of its updates.
        disk: Of data and checkpoints.
        notes: What else is to be said.
    """

    run: Run
    gpu_memory: float
    memory: tuple[Phase, ...]
    changes: tuple[Change, ...]
    time: TimePlan
    disk: DiskPlan
    notes: tuple[str, ...]

    @property
    def worst(self) -> Phase:
        """The phase that needs most memory."""
        return worst(self.memory)

    @property
    def fits(self) -> bool:
        """Whether a GPU has what the worst phase needs."""
        return self.worst.needed <= self.gpu_memory * GB


def make_plan(
    config: TrainConfig,
    *,
    gpus: int = 1,
    gpu_memory: float = 80.0,
    size: str | None = None,
    clips: int = CLIPS,
    peak_tflops: float | None = None,
    utilisation: float | None = None,
    measure: bool = False,
) -> Plan:
    """Say what a run needs. Loads no weights.

    Args:
        config: The run.
        gpus: Number of GPUs, one rank on each.
        gpu_memory: Memory of one GPU, in GB of 2^30 bytes.
        size: Of a clip, as ``WIDTHxHEIGHTxFRAMES``; None: that of the run's data, or 832x480x81.
        clips: Number of clips, where the data is not there yet.
        peak_tflops: As for :func:`assumed_speed`.
        utilisation: As for :func:`assumed_speed`.
        measure: Time a few blocks on this machine's GPU, where it has one.

    Raises:
        UserError: If the architecture is not known, or the run cannot be started so.
    """
    space = assumed_encoding(config.data, config.teacher).latent_space
    run = describe(
        config,
        architecture_of(config),
        find_latent_shape(config) if size is None else latent_shape_of(size, space),
        gpus=gpus,
        text_length=find_text_length(config),
    )
    memory = plan_memory(run)
    fits = worst(memory).needed <= gpu_memory * GB
    speed = assumed_speed(run.precision, peak_tflops=peak_tflops, utilisation=utilisation)
    notes = [f"warning: {warning}" for warning in config.method.warnings(config.max_steps, config.student_weights)]
    if measure and torch.cuda.is_available():
        speed = measure_speed(run, torch.device("cuda"))
    elif measure:
        notes.append("There is no GPU here to measure: times are computed.")
    return Plan(
        run=run,
        gpu_memory=gpu_memory,
        memory=memory,
        changes=() if fits else tuple(find_changes(run, gpu_memory)),
        time=plan_time(run, speed),
        disk=plan_disk(run, clips),
        notes=tuple(notes),
    )
