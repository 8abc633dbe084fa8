"""Sampling a model, and showing its blocks real clips and its own: ``avd analyze spectrum``."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor

from avd_core.sampling import SamplerKind
from avd_trainer.config.loading import read_values
from avd_trainer.data.examples import CaptionedExamples, condition_of
from avd_trainer.data.in_memory import InMemoryData, encode_shapes
from avd_trainer.data.moving_shapes import MovingShapes
from avd_trainer.data.shard_reading import ShardDataset
from avd_trainer.data.sources import HELD_OUT
from avd_trainer.evaluation.sampling import (
    Sampling,
    batches_of,
    find_sampling,
    guess_latent_space,
    sample_predictions,
    shape_captions,
)
from avd_trainer.evaluation.spectrum import CRITERION, LEVELS, ClipPair, SpectrumReport, measure
from avd_trainer.evaluation.spectrum_report import save_violins
from avd_trainer.inference.choices import choose_device, choose_dtype
from avd_trainer.inference.students import read_about
from avd_trainer.methods.registry import load_method
from avd_trainer.models.architecture import image_input, latent_channels
from avd_trainer.models.codecs.block_dct import BlockDCTCodec
from avd_trainer.models.condition import Condition
from avd_trainer.models.text_encoders.hashed import TEXT_LENGTH, HashTextEmbedding
from avd_trainer.models.transformer import VelocityModel, load_transformer
from avd_trainer.models.weights import open_weights
from avd_trainer.runtime.draws import Draws
from avd_trainer.runtime.errors import UserError
from avd_trainer.runtime.files import claim_folder, write_json
from avd_trainer.training.folder import CONFIG, method_of_run

NUMBERS_FILE = "spectrum.json"
PLOT_FILE = "spectrum.png"


class Source(NamedTuple):
    """A model, and its few steps where they are known.

    Attributes:
        weights: Whatever :func:`open_weights` understands.
        few_steps: Of the run that it is from.
        sampler: How its student goes from one of them to the next.
    """

    weights: str
    few_steps: tuple[float, ...] | None = None
    sampler: SamplerKind = "re-noise"

    def sampling(
        self,
        timesteps: Sequence[float] | None,
        steps: int | None,
        guidance_scale: float | None,
        shift: float | None,
    ) -> Sampling:
        """How to sample, as :func:`find_sampling`; a run's few steps where nothing else was asked for."""
        if self.few_steps is None or timesteps is not None or steps is not None:
            return find_sampling(self.weights, timesteps, steps, guidance_scale, shift)
        own = find_sampling(self.weights, self.few_steps, None, guidance_scale, shift)
        return own.model_copy(update={"sampler": self.sampler})


def open_source(source: str) -> Source:
    """A run's student, or whatever else :func:`open_weights` understands.

    Raises:
        UserError: If a run has not exported a student, which it does when it is done.
    """
    method = method_of_run(Path(source))
    if method is None:
        return Source(source)
    student = Path(source) / "student"
    if not (student / "config.json").is_file():
        raise UserError(
            f"{source} is a run of method {method} without a whole student in it. Let it finish, or pass what `avd "
            "export` writes, or the teacher that the run made."
        )
    few_steps = read_values(Path(source) / CONFIG)["method"].get("few_steps")
    if few_steps is None:
        return Source(str(student))
    return Source(str(student), tuple(few_steps), load_method(method).Config.sampled_by)


def analyze_spectrum(
    source: str,
    output: Path,
    *,
    sampling: Sampling,
    data: Path | None = None,
    levels: Sequence[float] = LEVELS,
    count: int = 48,
    seed: int = 0,
    device: torch.device | None = None,
    dtype: torch.dtype | None = None,
) -> SpectrumReport:
    """Sample a model with the captions of real clips, and compare what its blocks put out for both.

    Leaves ``spectrum.json`` and ``spectrum.png`` in ``output``.

    Args:
        source: Whatever :func:`open_weights` understands; :func:`open_source` finds a run's student.
        output: Folder, made where it is missing.
        sampling: How to sample; see :meth:`Source.sampling`.
        data: Real clips, a data set of ``avd data``; None for a model of the tiny preset's latents, which gets moving
            shapes that nothing was trained on.
        levels: Timesteps to which clips are noised before the blocks see them, in (0, 1000).
        count: Clips of each kind, at most those that there are.
        seed: Of all noise, which belongs to a clip and does not depend on the others.
        device: Where to compute; None for :func:`choose_device`'s default.
        dtype: What the transformer computes in; None for :func:`choose_dtype`'s default.

    Raises:
        UserError: If a part is missing or does not fit the others, before the weights are read; or if the model puts
            out values that are not finite.
    """
    if not levels or len({*levels}) < len(levels) or not all(0 < level < 1000 for level in levels):
        raise UserError(f"noise levels must be timesteps above 0 and below 1000, each once, got {[*levels]}.")
    claim_folder(output)
    with open_weights(source) as weights:
        architecture = weights.config
    latent_space = read_about(Path(source)).latent_space or guess_latent_space(source, architecture)
    if data is not None:
        real = _read(data, count, architecture, sampling)
    elif latent_space == "block-dct-4":
        shapes = MovingShapes(count, HELD_OUT, held_out=True, captions=shape_captions(source))
        clips = encode_shapes(shapes, BlockDCTCodec())
        embed = HashTextEmbedding(TEXT_LENGTH, architecture["text_dim"])
        real = _RealClips.of(InMemoryData(clips, embed, image=image_input(architecture) is not None), count)
    else:
        raise UserError(f"{source} needs real clips to compare with. Pass --data, a data set of `avd data encode`.")
    device = device or choose_device(None)
    dtype = dtype or choose_dtype(None, device)
    model = VelocityModel(load_transformer(source, device, dtype), dtype=dtype)
    spectra = measure(model, _pairs(model, real, sampling, levels, seed, device), levels)
    asked = {
        "source": source,
        "sampling": sampling.model_dump(),
        "latent_shape": [*real.latents.shape[1:]],
        "seed": seed,
    }
    write_json(output / NUMBERS_FILE, {**asked, "criterion": CRITERION, **spectra.report.model_dump()})
    save_violins(output / PLOT_FILE, spectra, f"{source}, {sampling}")
    return spectra.report


class _RealClips(NamedTuple):
    """Real clips ``[N, C, F, H, W]``, what they are conditioned on, and the unconditional text embedding ``[L, D]``."""

    latents: Tensor
    condition: Condition
    unconditional: Tensor

    @classmethod
    def of(cls, data: CaptionedExamples, count: int, *, guided: bool = True) -> Self:
        """The first of a data set with clips."""
        examples = [data[row] for row in range(min(count, len(data)))]
        latents = torch.stack([example.latent for example in examples if example.latent is not None])
        condition = condition_of(examples)
        return cls(latents, condition, data.unconditional() if guided else torch.zeros_like(condition.text[0]))


def _read(data: Path, count: int, architecture: Mapping[str, Any], sampling: Sampling) -> _RealClips:
    shards = ShardDataset(data, image=image_input(architecture))
    if not shards.has_latents:
        raise UserError(f"--data {data} holds prompts alone. Pass a data set with clips.")
    real = _RealClips.of(shards, count, guided=sampling.guidance_scale != 1)
    for what, found, expected in (
        ("latent channels", real.latents.shape[1], latent_channels(architecture)),
        ("text embeddings of width", real.condition.text.shape[-1], architecture["text_dim"]),
    ):
        if found != expected:
            raise UserError(f"--data has {what} {found}, the model expects {expected}. Encode it for this model.")
    return real


def _pairs(
    model: VelocityModel,
    real: _RealClips,
    sampling: Sampling,
    levels: Sequence[float],
    seed: int,
    device: torch.device,
) -> Iterator[ClipPair]:
    """Real clips and the model's own of the same captions, batch by batch."""
    count, shape = len(real.latents), real.latents.shape[1:]
    unconditional = real.unconditional.to(device)
    samples = sample_predictions(
        model, real.condition, unconditional, shape, sampling, (seed, "spectrum"), count=count, device=device
    )
    for rows, predictions in zip(batches_of(count, shape), samples, strict=True):
        draws = Draws((seed, "spectrum"), rows, device)
        yield ClipPair(
            real=real.latents[rows.start : rows.stop].to(device),
            generated=predictions[-1].x_0.to(device),
            condition=real.condition[rows.start : rows.stop].to(device),
            noise={level: draws.normal(f"noise_{level:g}", shape) for level in levels},
        )
