"""How a model is sampled to be looked at: in its few steps, or in many."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor

from avd_core.sampling import SamplerKind
from avd_trainer.config.sections import ArchitectureConfig, ShapeCaptions
from avd_trainer.inference.students import FewSteps, read_about, read_few_steps
from avd_trainer.models.codecs.latent_space import LatentSpace
from avd_trainer.models.condition import Condition
from avd_trainer.models.samplers import few_step_rollout, sample_teacher
from avd_trainer.models.transformer import VelocityModel
from avd_trainer.runtime.draws import Draws
from avd_trainer.runtime.errors import UserError
from avd_trainer.runtime.progress import ProgressBar

PAPER_TIMESTEPS = (1000.0, 900.0, 757.0, 522.0)
# Latent values that go through the model at once: one clip of Wan2.1's, dozens of the tiny preset's.
BATCH_VALUES = 2**19


class Sampling(BaseModel):
    """How a model is sampled."""

    model_config = ConfigDict(frozen=True, use_attribute_docstrings=True)

    timesteps: tuple[float, ...] | None = None
    """The few steps of a distilled model, falling; None where ``steps`` is set."""
    sampler: SamplerKind = "re-noise"
    """How such a model goes from one to the next."""
    steps: int | None = None
    """Euler steps of a model that was not distilled."""
    guidance_scale: float = 1.0
    """Classifier-free guidance of such a model, standard form."""
    shift: float = 1.0
    """Shift of such a model's timesteps; 1 leaves them evenly spaced."""

    def __str__(self) -> str:
        if self.timesteps is not None:
            return f"few steps {', '.join(f'{timestep:g}' for timestep in self.timesteps)}"
        return f"{self.steps} Euler steps, guidance {self.guidance_scale:g}, shift {self.shift:g}"


class Prediction(NamedTuple):
    """The clean prediction of one step.

    Attributes:
        timestep: Where the step started.
        x_0: ``[B, C, F, H, W]``.
    """

    timestep: float
    x_0: Tensor


def find_sampling(
    source: str,
    timesteps: Sequence[float] | None,
    steps: int | None,
    guidance_scale: float | None,
    shift: float | None = None,
) -> Sampling:
    """How to sample, from what was asked for and what the model's folder says.

    Args:
        source: Whatever :func:`avd_trainer.models.weights.open_weights` understands. Of a pipeline folder,
            ``scheduler/scheduler_config.json`` is read.
        timesteps: The few steps; None for the pipeline's, or the paper's where there is no scheduler.
        steps: For a model that was not distilled.
        guidance_scale: For such a model; None is 5.
        shift: Of such a model's timesteps; None is 5.

    Raises:
        UserError: If options exclude each other, timesteps do not fall, or the pipeline has no few steps.
    """
    if steps is not None:
        if timesteps is not None:
            raise UserError("--steps and --timesteps exclude each other: one is for models that were not distilled.")
        return Sampling(
            steps=steps,
            guidance_scale=5.0 if guidance_scale is None else guidance_scale,
            shift=5.0 if shift is None else shift,
        )
    if guidance_scale is not None or shift is not None:
        raise UserError(
            "--guidance-scale and --shift are for models that were not distilled. Pass --steps as well, or leave them "
            "out."
        )
    grid, sampler = _find_few_steps(source) if timesteps is None else FewSteps(tuple(timesteps), "re-noise")
    if not grid or not 0 < grid[-1] <= grid[0] <= 1000 or any(a <= b for a, b in pairwise(grid)):
        raise UserError(f"timesteps must fall strictly from at most 1000 to above 0, got {grid}.")
    return Sampling(timesteps=grid, sampler=sampler)


def sample_predictions(
    model: VelocityModel,
    condition: Condition,
    unconditional: Tensor,
    shape: Sequence[int],
    sampling: Sampling,
    seed: tuple[int, str],
    *,
    count: int,
    device: torch.device,
) -> Iterator[list[Prediction]]:
    """Sample clips, and give the clean predictions of all steps, batch by batch, on the CPU.

    Args:
        model: Whose clips.
        condition: Of N clips; repeated, with other noise, where there are fewer than ``count``.
        unconditional: ``[L, D]``, for guidance.
        shape: ``(C, F, H, W)``.
        sampling: In few steps or many.
        seed: Of the noise, which belongs to a clip and does not depend on the others.
        count: Clips.
        device: Where the model is.
    """
    batches = batches_of(count, shape)
    steps = sampling.steps or len(sampling.timesteps or ())
    with ProgressBar("steps", steps * len(batches)) as bar:
        for rows in batches:
            trajectory: list[Prediction] = []

            def keep(timestep: float, x_0: Tensor, trajectory: list[Prediction] = trajectory) -> None:
                trajectory.append(Prediction(timestep, x_0.cpu()))
                bar.advance()

            own = condition[[row % len(condition) for row in rows]].to(device)
            draws = Draws(seed, rows, device)
            if sampling.timesteps is not None:
                noise = draws.named("trajectory")
                few_step_rollout(
                    model, own, shape, sampling.timesteps, noise, sampler=sampling.sampler, on_prediction=keep
                )
            else:
                assert sampling.steps is not None
                sample_teacher(
                    model,
                    own,
                    unconditional,
                    shape,
                    draws.named("trajectory"),
                    steps=sampling.steps,
                    guidance_scale=sampling.guidance_scale,
                    shift=sampling.shift,
                    on_prediction=keep,
                )
            yield trajectory


def batches_of(count: int, shape: Sequence[int]) -> list[range]:
    """Rows of ``count`` clips of a shape, as many at once as :data:`BATCH_VALUES` allows."""
    size = max(1, BATCH_VALUES // math.prod(shape))
    return [range(start, min(start + size, count)) for start in range(0, count, size)]


def guess_latent_space(source: str, architecture: Mapping[str, Any]) -> LatentSpace:
    """Where no export says it: a model that reads the bundled teacher's text embedding makes its latents."""
    tiny = architecture["text_dim"] == ArchitectureConfig().text_dim
    return "block-dct-4" if tiny and not (Path(source) / "text_encoder").exists() else "wan"


def shape_captions(source: str) -> ShapeCaptions:
    """How much the captions of moving shapes say that a model of the tiny preset's latents was trained on."""
    open_teacher = source == "bundled:tiny-open"
    return read_about(Path(source)).captions or ("subjects" if open_teacher else "full")


def _find_few_steps(source: str) -> FewSteps:
    file = Path(source) / "scheduler" / "scheduler_config.json"
    if not file.is_file():
        return FewSteps(PAPER_TIMESTEPS, "re-noise")
    try:
        found = read_few_steps(file)
    except UserError as error:
        raise UserError(f"{error} Or pass --timesteps.") from error
    if found is not None:
        return found
    raise UserError(
        f"{file} names no few steps. For a model that was not distilled pass --steps, for example --steps 50; for a "
        "few-step one --timesteps 1000,900,757,522."
    )
