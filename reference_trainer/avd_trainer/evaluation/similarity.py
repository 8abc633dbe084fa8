"""How alike neighbouring frames are while a model samples, and what half the frame rate would cost: Fig. 15."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from pydantic import BaseModel, ConfigDict
from torch import Tensor

from avd_core import interpolate_linearly, kept_frames, raise_frame_rate
from avd_trainer.evaluation.sampling import Prediction
from avd_trainer.runtime.errors import UserError

QUANTILES = {"5%": 0.05, "25%": 0.25, "75%": 0.75, "95%": 0.95}
CRITERION = (
    "Half rate is supported at a step if re-inserting every second frame of its clean prediction linearly errs no more "
    "than the steps after it change in those frames (mean squares; counted from the first step, without a gap)."
)


class StepSimilarity(BaseModel):
    """One denoising step; see :func:`measure`."""

    model_config = ConfigDict(frozen=True, use_attribute_docstrings=True)

    timestep: float
    """Where the step starts, 0 to 1000."""
    count: int
    """Pairs of adjacent frames, over all clips."""
    mean: float
    """Mean cosine similarity of the pairs, in [-1, 1]."""
    median: float
    """Their median."""
    quantiles: dict[str, float]
    """Their quantiles: ``5%``, ``25%``, ``75%`` and ``95%``."""
    reinsertion_error: float
    """Mean squared error of the frames that half rate leaves out, put in again by linear interpolation."""
    remaining_change: float
    """Mean squared difference of the same frames to the last step's clean prediction: what later steps change."""
    supports_half_rate: bool
    """Whether the former is at most the latter."""


class SimilarityReport(BaseModel):
    """What :func:`measure` found."""

    model_config = ConfigDict(frozen=True, use_attribute_docstrings=True)

    clips: int
    """Number of clips."""
    steps: tuple[StepSimilarity, ...]
    """In the order of sampling."""
    half_rate_steps: int
    """Leading steps that support half rate."""


class Similarities(NamedTuple):
    """A report, and what its violins are drawn of.

    Attributes:
        report: The numbers.
        values: For each step the similarity of every pair, ``[count]`` float64.
    """

    report: SimilarityReport
    values: list[Tensor]


def adjacent_similarity(x_0: Tensor) -> Tensor:
    """Cosine similarity of each frame of ``[B, C, F, H, W]`` and the next: ``[B, F - 1]`` float64.

    A frame is one vector of all its channels and pixels. 1 for a clip that stands still, -1 for one whose sign
    alternates; a frame of zeros has 0 with any other.
    """
    frames = x_0.double().transpose(1, 2).flatten(2)
    return F.cosine_similarity(frames[:, :-1], frames[:, 1:], dim=2)


def left_out_frames(frames: int) -> list[int]:
    """The frames that half rate leaves out; those that it keeps are :func:`avd_core.kept_frames`."""
    return sorted(set(range(frames)) - set(kept_frames(frames, 2)))


def reinsert_linearly(x_0: Tensor) -> Tensor:
    """``[B, C, F, H, W]`` with the frames that half rate leaves out replaced by the mean of their neighbours."""
    frames = x_0.shape[2]
    return raise_frame_rate(x_0[:, :, kept_frames(frames, 2)], interpolate_linearly, frames, 2, 1)


def measure(trajectories: Iterable[Sequence[Prediction]]) -> Similarities:
    """Measure the clean predictions of whole trajectories.

    At each step: the cosine similarity of adjacent frames (Fig. 15 of the paper), and whether half rate is supported
    there. The similarity alone does not say that: it depends on the latent space and on how much a clip moves. What
    counts is whether the error of a frame that was left out and put in again lies within what the steps after it change
    anyway. Both are in the same unit, so there is no threshold to choose.

    Args:
        trajectories: Batches of clips; each has the clean predictions of all steps in the order of sampling, the same
            steps in all batches.

    Raises:
        UserError: If there are no clips, fewer than three frames, or values that are not finite.
    """
    clips = 0
    timesteps: tuple[float, ...] = ()
    values: list[Tensor] = []
    sums = torch.zeros(0)
    for trajectory in trajectories:
        final = trajectory[-1].x_0
        _check(final)
        similarities = [adjacent_similarity(step.x_0).flatten().cpu() for step in trajectory]
        own = torch.tensor([_squares(step.x_0, final) for step in trajectory], dtype=torch.float64)
        values = [torch.cat(both) for both in zip(values, similarities, strict=True)] if clips else similarities
        sums = sums + len(final) * own if clips else len(final) * own
        clips += len(final)
        timesteps = tuple(step.timestep for step in trajectory)
    if not clips:
        raise UserError("There are no clips to measure. Sample at least one.")
    if not sums.isfinite().all():
        raise UserError("The model's predictions hold values that are not finite. Check the weights and the precision.")
    steps = tuple(
        _describe(timestep, pairs, error, change)
        for timestep, pairs, (error, change) in zip(timesteps, values, (sums / clips).tolist(), strict=True)
    )
    leading = next((index for index, step in enumerate(steps) if not step.supports_half_rate), len(steps))
    return Similarities(SimilarityReport(clips=clips, steps=steps, half_rate_steps=leading), values)


def _squares(x_0: Tensor, final: Tensor) -> tuple[float, float]:
    """Mean squares, in the frames that half rate leaves out: re-insertion's error, and the distance to the end."""
    frames = left_out_frames(x_0.shape[2])
    own = x_0.double()
    wrong = (reinsert_linearly(own) - own)[:, :, frames]
    change = (final.double() - own)[:, :, frames]
    return float(wrong.square().mean()), float(change.square().mean())


def _describe(timestep: float, pairs: Tensor, error: float, change: float) -> StepSimilarity:
    levels = torch.tensor(list(QUANTILES.values()), dtype=pairs.dtype)
    return StepSimilarity(
        timestep=timestep,
        count=len(pairs),
        mean=float(pairs.mean()),
        median=float(pairs.quantile(0.5)),
        quantiles=dict(zip(QUANTILES, pairs.quantile(levels).tolist(), strict=True)),
        reinsertion_error=error,
        remaining_change=change,
        supports_half_rate=error <= change,
    )


def _check(x_0: Tensor) -> None:
    if x_0.ndim != 5 or x_0.shape[2] < 3:
        raise UserError(
            f"clean predictions must be latents [B, C, F, H, W] of at least 3 frames, got {list(x_0.shape)}: of fewer, "
            "half rate leaves none out."
        )
