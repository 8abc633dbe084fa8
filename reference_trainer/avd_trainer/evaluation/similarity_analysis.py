"""Sampling a model and measuring how alike neighbouring frames are: ``avd analyze similarity``."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from avd_trainer.data.encode import WAN_NEGATIVE_PROMPT, read_prompts
from avd_trainer.data.examples import condition_of
from avd_trainer.data.moving_shapes import MovingShapes
from avd_trainer.data.shard_reading import ShardDataset
from avd_trainer.data.sources import HELD_OUT
from avd_trainer.evaluation.sampling import Sampling, guess_latent_space, sample_predictions, shape_captions
from avd_trainer.evaluation.similarity import CRITERION, SimilarityReport, measure
from avd_trainer.evaluation.similarity_report import save_violins
from avd_trainer.inference.choices import choose_device, choose_dtype
from avd_trainer.inference.generation import embed_prompts
from avd_trainer.inference.students import About, read_about
from avd_trainer.models.architecture import image_input, latent_channels
from avd_trainer.models.codecs.latent_space import SIZES, LatentSpace, latent_shape_of
from avd_trainer.models.condition import Condition
from avd_trainer.models.transformer import VelocityModel, load_transformer
from avd_trainer.models.weights import open_weights
from avd_trainer.runtime.errors import UserError
from avd_trainer.runtime.files import claim_folder, write_json

NUMBERS_FILE = "similarity.json"
PLOT_FILE = "similarity.png"


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
    latent_space = about.latent_space or guess_latent_space(source, architecture)
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
        sample_predictions(
            model,
            condition,
            unconditional.to(device),
            shape,
            sampling,
            (seed, "similarity"),
            count=count,
            device=device,
        )
    )
    report = similarities.report
    asked = {"source": source, "sampling": sampling.model_dump(), "latent_shape": shape, "seed": seed}
    write_json(output / NUMBERS_FILE, {**asked, "criterion": CRITERION, **report.model_dump()})
    save_violins(output / PLOT_FILE, similarities, f"{source}, {sampling}")
    return report


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
    shapes = MovingShapes(count, HELD_OUT, held_out=True, captions=shape_captions(source))
    return [shapes[index].caption for index in range(count)], negative
