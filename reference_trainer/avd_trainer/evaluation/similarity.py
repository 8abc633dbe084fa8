"""How alike neighbouring frames are while a model samples, and what half the frame rate would cost: Fig. 15."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from pydantic import BaseModel, ConfigDict
from rich.table import Table
from torch import Tensor

from avd_core import interpolate_linearly, kept_frames, raise_frame_rate
from avd_trainer.config.sections import ArchitectureConfig
from avd_trainer.data.encode import WAN_NEGATIVE_PROMPT, read_prompts
from avd_trainer.data.moving_shapes import MovingShapes
from avd_trainer.data.shards import ShardDataset
from avd_trainer.data.sources import HELD_OUT
from avd_trainer.inference.generation import (
    WAN_SIZE,
    About,
    choose_device,
    choose_dtype,
    embed_prompts,
    read_about,
    read_timesteps,
)
from avd_trainer.models.samplers import few_step_rollout, sample_teacher
from avd_trainer.models.transformer import VelocityModel, load_transformer
from avd_trainer.models.weights import open_weights
from avd_trainer.planning.memory import wan_latent_shape
from avd_trainer.runtime.draws import Draws
from avd_trainer.runtime.errors import UserError
from avd_trainer.runtime.files import claim_folder, write_json
from avd_trainer.runtime.progress import ProgressBar
from avd_trainer.studies.figures import COLORS
from avd_trainer.training.pipeline_export import LatentSpace

PAPER_TIMESTEPS = (1000.0, 900.0, 757.0, 522.0)
TINY_SIZE = "64x64x33"
# Latent values that go through the model at once: one clip of Wan2.1's, dozens of the tiny preset's.
BATCH_VALUES = 2**19

QUANTILES = {"5%": 0.05, "25%": 0.25, "75%": 0.75, "95%": 0.95}

NUMBERS_FILE = "similarity.json"
PLOT_FILE = "similarity.png"

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


class Prediction(NamedTuple):
    """The clean prediction of one step.

    Attributes:
        timestep: Where the step started.
        x_0: ``[B, C, F, H, W]``.
    """

    timestep: float
    x_0: Tensor


class Sampling(BaseModel):
    """How :func:`analyze_similarity` samples."""

    model_config = ConfigDict(frozen=True, use_attribute_docstrings=True)

    timesteps: tuple[float, ...] | None = None
    """The few steps of a distilled model, falling; None where ``steps`` is set."""
    steps: int | None = None
    """Euler steps of a model that was not distilled."""
    guidance_scale: float = 1.0
    """Classifier-free guidance of such a model, standard form."""

    def __str__(self) -> str:
        if self.timesteps is not None:
            return f"few steps {', '.join(f'{timestep:g}' for timestep in self.timesteps)}"
        return f"{self.steps} Euler steps, guidance {self.guidance_scale:g}"


def analyze_similarity(
    source: str,
    output: Path,
    *,
    sampling: Sampling,
    prompts_file: Path | None = None,
    data: Path | None = None,
    size: str | None = None,
    count: int = 48,
    seed: int = 0,
    device: torch.device | None = None,
    dtype: torch.dtype | None = None,
) -> SimilarityReport:
    """Sample a model and measure the clean prediction of each of its steps.

    Leaves ``similarity.json`` and ``similarity.png`` in ``output``.

    Args:
        source: Whatever :func:`open_weights` understands. Of a folder that ``avd export`` wrote, ``export.json`` says
            whose latents the model makes and what its clips were like.
        output: Folder, made where it is missing.
        sampling: How to sample; :func:`find_sampling` finds a pipeline's.
        prompts_file: A prompt a line; repeated, with other noise, where there are fewer than ``count``. For a model
            that makes the tiny preset's latents, None takes captions of moving shapes.
        data: In place of it, a data set of ``avd data``, for its text embeddings.
        size: ``WIDTHxHEIGHTxFRAMES`` in pixels; None: that of the clips in ``data``, where it has any, or of those that
            an exported student was trained on, or 64x64x33 for a tiny model and 832x480x81 for another.
        count: Clips to sample.
        seed: Of the noise, which belongs to a clip and does not depend on the others.
        device: Where to compute; None for :func:`avd_trainer.inference.generation.choose_device`'s default.
        dtype: What text encoder and transformer compute in; None for
            :func:`avd_trainer.inference.generation.choose_dtype`'s default.

    Raises:
        UserError: If a part is missing or does not fit the others, before the weights are read; or if predictions are
            not finite.
    """
    claim_folder(output)
    with open_weights(source) as weights:
        architecture = weights.config
    about = read_about(Path(source))
    latent_space = about.latent_space or _guess_latent_space(source, architecture)
    shards = None if data is None else ShardDataset(data)
    shape = _find_latent_shape(size, shards, about, latent_space, architecture["in_channels"])
    device = device or choose_device(None)
    dtype = dtype or choose_dtype(None, device)
    width = architecture["text_dim"]
    if shards is not None:
        text, unconditional = _read_text(shards, width, count, guided=sampling.guidance_scale != 1)
    else:
        prompts, negative = _find_prompts(source, latent_space, prompts_file, count)
        rows = embed_prompts(source, latent_space, width, [*prompts, negative], device=device, dtype=dtype)
        text, unconditional = torch.stack(rows[:-1]), rows[-1]
    model = VelocityModel(load_transformer(source, device, dtype), dtype=dtype)
    similarities = measure(
        _sample(model, text, unconditional.to(device), shape, sampling=sampling, count=count, seed=seed, device=device)
    )
    report = similarities.report
    asked = {"source": source, "sampling": sampling.model_dump(), "latent_shape": shape, "seed": seed}
    write_json(output / NUMBERS_FILE, {**asked, "criterion": CRITERION, **report.model_dump()})
    save_violins(output / PLOT_FILE, similarities, f"{source}, {sampling}")
    return report


def find_sampling(
    source: str, timesteps: Sequence[float] | None, steps: int | None, guidance_scale: float | None
) -> Sampling:
    """How to sample, from what was asked for and what the model's folder says.

    Args:
        source: As in :func:`analyze_similarity`. Of a pipeline folder, ``scheduler/scheduler_config.json`` is read.
        timesteps: The few steps; None for the pipeline's, or the paper's where there is no scheduler.
        steps: For a model that was not distilled.
        guidance_scale: For such a model; None is 5.

    Raises:
        UserError: If options exclude each other, timesteps do not fall, or the pipeline has no few steps.
    """
    if steps is not None:
        if timesteps is not None:
            raise UserError("--steps and --timesteps exclude each other: one is for models that were not distilled.")
        return Sampling(steps=steps, guidance_scale=5.0 if guidance_scale is None else guidance_scale)
    if guidance_scale is not None:
        raise UserError(
            "--guidance-scale is for models that were not distilled. Pass --steps as well, or leave it out."
        )
    grid = _find_grid(source) if timesteps is None else tuple(timesteps)
    if not grid or not 0 < grid[-1] <= grid[0] <= 1000 or any(a <= b for a, b in pairwise(grid)):
        raise UserError(f"timesteps must fall strictly from at most 1000 to above 0, got {grid}.")
    return Sampling(timesteps=grid)


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


def render(report: SimilarityReport) -> Table:
    """The numbers for a terminal, and how each step was decided."""
    table = Table(title="Similarity of adjacent frames", caption=CRITERION, caption_justify="left")
    for name in ("t", "median", *QUANTILES):
        table.add_column(name, justify="right")
    table.add_column("half rate: error, later change")
    for step in report.steps:
        sign, verdict = ("<=", "yes") if step.supports_half_rate else (">", "no")
        table.add_row(
            f"{step.timestep:.0f}",
            *(f"{figure:.3f}" for figure in (step.median, *step.quantiles.values())),
            f"{verdict}: {step.reinsertion_error:.3g} {sign} {step.remaining_change:.3g}",
        )
    return table


def save_violins(path: Path, similarities: Similarities, title: str) -> None:
    """Draw Fig. 15 of the paper, and below it what decides on half rate."""
    steps = similarities.report.steps
    places = list(range(len(steps)))
    width = max(6.0, 1.5 + 0.5 * len(steps))
    figure, (violins, costs) = plt.subplots(2, 1, figsize=(width, 7), sharex=True, layout="constrained")
    bodies: Any = violins.violinplot([row.numpy() for row in similarities.values], places, widths=0.8, showmedians=True)
    for body in bodies["bodies"]:
        body.set_facecolor(COLORS["avd"])
    # A title is as wide as the axes, where some 11 letters go on an inch; a path has no spaces to break at.
    title = textwrap.fill(title, int(11 * (width - 1)))
    violins.set_title(f"Adjacent frames of the clean prediction\n{title}", fontsize=10)
    violins.set_ylabel("cosine similarity", fontsize=9)
    for name, label, color in (
        ("reinsertion_error", "error of linear re-insertion", COLORS["dmd"]),
        ("remaining_change", "what later steps change", COLORS["avd"]),
    ):
        roots = [math.sqrt(getattr(step, name)) for step in steps]
        costs.plot(places, roots, color=color, marker="o", markersize=4, label=label)
    supported = similarities.report.half_rate_steps
    costs.axvspan(-0.5, supported - 0.5, color=COLORS["teacher"], alpha=0.2, linewidth=0)
    costs.set_title(
        f"The frames that half rate leaves out\n(shaded: it is supported at the first {supported} steps)", fontsize=10
    )
    costs.set_ylabel("root mean square", fontsize=9)
    costs.set_xlabel("timestep", fontsize=9)
    costs.set_xticks(places, [f"{step.timestep:.0f}" for step in steps])
    costs.legend(fontsize=8, frameon=False)
    for axis in (violins, costs):
        axis.tick_params(labelsize=8)
        axis.spines[["top", "right"]].set_visible(False)
    part = path.with_name(path.name + ".part")
    figure.savefig(part, dpi=100, format="png")
    plt.close(figure)
    part.replace(path)


def _sample(
    model: VelocityModel,
    text: Tensor,
    unconditional: Tensor,
    shape: Sequence[int],
    *,
    sampling: Sampling,
    count: int,
    seed: int,
    device: torch.device,
) -> Iterator[list[Prediction]]:
    """The clean predictions of ``count`` clips, batch by batch, on the CPU."""
    size = max(1, BATCH_VALUES // math.prod(shape))
    batches = [range(start, min(start + size, count)) for start in range(0, count, size)]
    steps = sampling.steps or len(sampling.timesteps or ())
    with ProgressBar("steps", steps * len(batches)) as bar:
        for rows in batches:
            trajectory: list[Prediction] = []

            def keep(timestep: float, x_0: Tensor, trajectory: list[Prediction] = trajectory) -> None:
                trajectory.append(Prediction(timestep, x_0.cpu()))
                bar.advance()

            own = text[[row % len(text) for row in rows]].to(device)
            draws = Draws((seed, "similarity"), rows, device)
            if sampling.timesteps is not None:
                few_step_rollout(model, own, shape, sampling.timesteps, draws.named("trajectory"), on_prediction=keep)
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
                    on_prediction=keep,
                )
            yield trajectory


def _find_grid(source: str) -> tuple[float, ...]:
    file = Path(source) / "scheduler" / "scheduler_config.json"
    if not file.is_file():
        return PAPER_TIMESTEPS
    try:
        grid = read_timesteps(file)
    except UserError as error:
        raise UserError(f"{error} Or pass --timesteps.") from error
    if grid is not None:
        return grid
    raise UserError(
        f"{file} names no few steps. For a model that was not distilled pass --steps, for example --steps 50; for a "
        "few-step one --timesteps 1000,900,757,522."
    )


def _guess_latent_space(source: str, architecture: Mapping[str, Any]) -> LatentSpace:
    """Where no export says it: a model that reads the bundled teacher's text embedding makes its latents."""
    tiny = architecture["text_dim"] == ArchitectureConfig().text_dim
    return "block-dct" if tiny and not (Path(source) / "text_encoder").exists() else "wan"


def _find_latent_shape(
    size: str | None, data: ShardDataset | None, about: About, latent_space: LatentSpace, channels: int
) -> tuple[int, ...]:
    if size is None and data is not None and data.latent_shape is not None:
        shape, whose = data.latent_shape, "data"
    elif size is None and about.clip is not None:
        shape, whose = about.clip, "export.json"
    else:
        default = TINY_SIZE if latent_space == "block-dct" else WAN_SIZE
        shape, whose = wan_latent_shape(size or default), "--size"
    if shape[0] != channels:
        raise UserError(f"{whose}: clips have {shape[0]} latent channels, the model {channels}.")
    if shape[1] < 3:
        raise UserError(
            f"{whose}: clips have {shape[1]} latent frame(s), of which half rate leaves none out. Pass a --size of 9 "
            "frames or more."
        )
    return shape


def _read_text(data: ShardDataset, dim: int, count: int, *, guided: bool) -> tuple[Tensor, Tensor]:
    """Text embeddings ``[N, L, D]`` of a data set, and the unconditional one, ``[L, D]``."""
    if data.text_dim != dim:
        raise UserError(
            f"{data.folder} has text embeddings of width {data.text_dim}, the model expects {dim}. Pass data that was "
            "encoded with the model's own text encoder."
        )
    text = torch.stack([data[row].text for row in range(min(count, len(data)))])
    return text, data.unconditional() if guided else torch.zeros_like(text[0])


def _find_prompts(source: str, latent_space: LatentSpace, file: Path | None, count: int) -> tuple[list[str], str]:
    """At most ``count`` prompts, and the negative one for guidance: the tiny teacher was trained with an empty one."""
    tiny = latent_space == "block-dct"
    negative = "" if tiny else WAN_NEGATIVE_PROMPT
    if file is not None:
        return [prompt for _, prompt in read_prompts(file)][:count], negative
    if not tiny:
        raise UserError(f"{source} needs prompts. Pass --prompts-file, a prompt a line, or --data, a data set.")
    shapes = MovingShapes(count, HELD_OUT)
    return [shapes[index].caption for index in range(count)], negative


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
