"""Sampling a model and measuring how alike neighbouring frames are: ``avd analyze similarity``."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor

from avd_trainer.config.sections import ArchitectureConfig
from avd_trainer.data.encode import WAN_NEGATIVE_PROMPT, read_prompts
from avd_trainer.data.examples import condition_of
from avd_trainer.data.moving_shapes import MovingShapes
from avd_trainer.data.shard_reading import ShardDataset
from avd_trainer.data.sources import HELD_OUT
from avd_trainer.evaluation.similarity import CRITERION, Prediction, SimilarityReport, measure
from avd_trainer.evaluation.similarity_report import save_violins
from avd_trainer.inference.choices import choose_device, choose_dtype
from avd_trainer.inference.generation import embed_prompts
from avd_trainer.inference.students import About, read_about, read_timesteps
from avd_trainer.models.architecture import image_input, latent_channels
from avd_trainer.models.codecs.latent_space import SIZES, LatentSpace, latent_shape_of
from avd_trainer.models.condition import Condition
from avd_trainer.models.samplers import few_step_rollout, sample_teacher
from avd_trainer.models.transformer import VelocityModel, load_transformer
from avd_trainer.models.weights import open_weights
from avd_trainer.runtime.draws import Draws
from avd_trainer.runtime.errors import UserError
from avd_trainer.runtime.files import claim_folder, write_json
from avd_trainer.runtime.progress import ProgressBar

PAPER_TIMESTEPS = (1000.0, 900.0, 757.0, 522.0)
# Latent values that go through the model at once: one clip of Wan2.1's, dozens of the tiny preset's.
BATCH_VALUES = 2**19
NUMBERS_FILE = "similarity.json"
PLOT_FILE = "similarity.png"


class Sampling(BaseModel):
    """How :func:`analyze_similarity` samples."""

    model_config = ConfigDict(frozen=True, use_attribute_docstrings=True)

    timesteps: tuple[float, ...] | None = None
    """The few steps of a distilled model, falling; None where ``steps`` is set."""
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
            an exported student was trained on, or 32x32x17 for a tiny model and 832x480x81 for another.
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
    image = image_input(architecture)
    if image is not None and data is None:
        raise UserError(
            f"{source} is an image-to-video model, which needs first frames. Pass --data with clips that were encoded "
            "by `avd data encode --image-condition`."
        )
    shards = None if data is None else ShardDataset(data, image=image)
    shape = _find_latent_shape(size, shards, about, latent_space, latent_channels(architecture))
    device = device or choose_device(None)
    dtype = dtype or choose_dtype(None, device)
    width = architecture["text_dim"]
    if shards is not None:
        condition, unconditional = _read_conditions(shards, width, count, guided=sampling.guidance_scale != 1)
    else:
        prompts, negative = _find_prompts(source, latent_space, prompts_file, count)
        rows = embed_prompts(source, latent_space, width, [*prompts, negative], device=device, dtype=dtype)
        condition, unconditional = Condition(torch.stack(rows[:-1])), rows[-1]
    model = VelocityModel(load_transformer(source, device, dtype), dtype=dtype)
    similarities = measure(
        _sample(
            model,
            condition,
            unconditional.to(device),
            shape,
            sampling=sampling,
            count=count,
            seed=seed,
            device=device,
        )
    )
    report = similarities.report
    asked = {"source": source, "sampling": sampling.model_dump(), "latent_shape": shape, "seed": seed}
    write_json(output / NUMBERS_FILE, {**asked, "criterion": CRITERION, **report.model_dump()})
    save_violins(output / PLOT_FILE, similarities, f"{source}, {sampling}")
    return report


def find_sampling(
    source: str,
    timesteps: Sequence[float] | None,
    steps: int | None,
    guidance_scale: float | None,
    shift: float | None = None,
) -> Sampling:
    """How to sample, from what was asked for and what the model's folder says.

    Args:
        source: As in :func:`analyze_similarity`. Of a pipeline folder, ``scheduler/scheduler_config.json`` is read.
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
    grid = _find_grid(source) if timesteps is None else tuple(timesteps)
    if not grid or not 0 < grid[-1] <= grid[0] <= 1000 or any(a <= b for a, b in pairwise(grid)):
        raise UserError(f"timesteps must fall strictly from at most 1000 to above 0, got {grid}.")
    return Sampling(timesteps=grid)


def _sample(
    model: VelocityModel,
    condition: Condition,
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

            own = condition[[row % len(condition) for row in rows]].to(device)
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
                    shift=sampling.shift,
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
    return "block-dct-4" if tiny and not (Path(source) / "text_encoder").exists() else "wan"


def _find_latent_shape(
    size: str | None, data: ShardDataset | None, about: About, latent_space: LatentSpace, channels: int
) -> tuple[int, ...]:
    if size is None and data is not None and data.latent_shape is not None:
        shape, whose = data.latent_shape, "data"
    elif size is None and about.clip is not None:
        shape, whose = about.clip, "export.json"
    else:
        shape, whose = latent_shape_of(size or SIZES[latent_space], latent_space), "--size"
    if shape[0] != channels:
        raise UserError(f"{whose}: clips have {shape[0]} latent channels, the model {channels}.")
    if shape[1] < 3:
        raise UserError(
            f"{whose}: clips have {shape[1]} latent frame(s), of which half rate leaves none out. Pass a --size of 9 "
            "frames or more."
        )
    return shape


def _read_conditions(data: ShardDataset, dim: int, count: int, *, guided: bool) -> tuple[Condition, Tensor]:
    """What the examples of a data set show, and the unconditional text embedding, ``[L, D]``."""
    if data.text_dim != dim:
        raise UserError(
            f"--data has text embeddings of width {data.text_dim}, the model expects {dim}. Pass data that was "
            "encoded with the model's own text encoder."
        )
    condition = condition_of([data[row] for row in range(min(count, len(data)))])
    return condition, data.unconditional() if guided else torch.zeros_like(condition.text[0])


def _find_prompts(source: str, latent_space: LatentSpace, file: Path | None, count: int) -> tuple[list[str], str]:
    """At most ``count`` prompts, and the negative one for guidance: the tiny teacher was trained with an empty one."""
    tiny = latent_space == "block-dct-4"
    negative = "" if tiny else WAN_NEGATIVE_PROMPT
    if file is not None:
        return [prompt for _, prompt in read_prompts(file)][:count], negative
    if not tiny:
        raise UserError(f"{source} needs prompts. Pass --prompts-file, a prompt a line, or --data, a data set.")
    shapes = MovingShapes(count, HELD_OUT, held_out=True)
    return [shapes[index].caption for index in range(count)], negative
