"""How long an update and a run take: operations over what a GPU does in a second."""

from __future__ import annotations

from typing import NamedTuple

from avd_trainer.planning.description import Run
from avd_trainer.planning.operations import Operations, update_operations

PEAK_TFLOPS = {
    "NVIDIA A100": 312.0,
    "NVIDIA H100": 989.5,
    "NVIDIA H100 PCIe": 756.5,
    "NVIDIA H100 NVL": 835.5,
    "NVIDIA H200": 989.5,
    "NVIDIA H200 NVL": 835.5,
}
"""Dense bfloat16 TFLOP/s by NVIDIA's data sheets ("A100 Tensor Core GPU", "H100 Tensor Core GPU", "H200 Tensor Core
GPU"; the latter two state them with sparsity, which is twice as many). The longest name that the device's own begins
with counts; the plain ones are SXM."""

ASSUMED_PEAK_TFLOPS = {"bfloat16": PEAK_TFLOPS["NVIDIA H100"], "float32": 67.0}
"""What is assumed of a GPU by the precision of a run: an H100 SXM's, by the same data sheet."""
ASSUMED_UTILISATION = 0.4
"""Share of the peak that is assumed. Nothing was measured on a GPU: an assumption."""


class Speed(NamedTuple):
    """What one GPU does in a second.

    Attributes:
        forward: Operations a second in passes without a backward pass.
        training: In passes with one.
        gpu: Which GPU this is, in words.
        source: Where these come from, in words.
    """

    forward: float
    training: float
    gpu: str
    source: str


class TimePlan(NamedTuple):
    """Time of a run, computed.

    Attributes:
        operations: Of one GPU in an update.
        seconds_per_update: A mean over what is drawn.
        updates: Of the run.
        gpus: Number of GPUs.
        speed: Of one.
    """

    operations: Operations
    seconds_per_update: float
    updates: int
    gpus: int
    speed: Speed

    @property
    def hours(self) -> float:
        """Of the whole run."""
        return self.updates * self.seconds_per_update / 3600


def assumed_speed(precision: str, *, peak_tflops: float | None = None, utilisation: float | None = None) -> Speed:
    """The speed of a GPU that was not measured.

    Args:
        precision: Of the run.
        peak_tflops: Peak of the GPU, in 10^12 operations a second, dense; None: an H100 SXM's.
        utilisation: Share of it that operations reach, those included that are computed again; None: 0.4.
    """
    share = ASSUMED_UTILISATION if utilisation is None else utilisation
    if peak_tflops is None:
        peak = ASSUMED_PEAK_TFLOPS[precision]
        gpu, of = "H100", f"{peak:g} TFLOP/s, an H100's in {precision}"
    else:
        peak = peak_tflops
        gpu, of = f"GPU of {peak:g} TFLOP/s", f"{peak:g} TFLOP/s"
    speed = 1e12 * peak * share
    return Speed(speed, speed, gpu, f"computed, at an assumed utilisation of {share:g} of {of}")


def plan_time(run: Run, speed: Speed) -> TimePlan:
    """Time of a run: its passes alone, without sample clips, checkpoints and the start.

    What GPUs wait for each other and for memory is in the utilisation.
    """
    share = run.batches.share
    operations = Operations(*(share * number for number in update_operations(run)))
    seconds = operations.forward / speed.forward + operations.training / speed.training
    return TimePlan(operations, seconds, run.steps, run.gpus, speed)
