"""From an exported student and prompts to clips: text encoder, transformer and VAE in memory one after the other."""

from __future__ import annotations

import gc
import logging
import re
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from diffusers import WanTransformer3DModel
from torch import Tensor

from avd_core import HalfRateInterpolationSampler, SamplingStep, interpolate_linearly
from avd_trainer.data.encode import BATCH, HashTextEncoder, TextEncoder
from avd_trainer.data.videos import read_picture
from avd_trainer.inference.choices import Rates
from avd_trainer.inference.students import Shape, Student
from avd_trainer.models.adapters import merge_adapters, read_adapters
from avd_trainer.models.codecs.block_dct import BlockDCTCodec
from avd_trainer.models.codecs.first_frame import encode_first_frame
from avd_trainer.models.codecs.latent_space import SPATIAL_STRIDES, TEMPORAL_STRIDE, LatentSpace
from avd_trainer.models.codecs.wan import WanCodec
from avd_trainer.models.condition import Condition
from avd_trainer.models.image_encoder import WanImageEncoder
from avd_trainer.models.samplers import clean_predictor
from avd_trainer.models.text_encoders.hashed import TEXT_LENGTH
from avd_trainer.models.text_encoders.umt5 import WanTextEncoder
from avd_trainer.models.transformer import VelocityModel, load_transformer
from avd_trainer.runtime.errors import UserError

logger = logging.getLogger(__name__)


class Sample(NamedTuple):
    """A clip in latent space.

    Attributes:
        latents: ``[C, F, H, W]`` float32 on the CPU.
        seconds: What transformer and interpolator took.
    """

    latents: Tensor
    seconds: float


def sample_clips(
    student: Student,
    prompts: Sequence[str],
    rates: Sequence[Rates],
    shape: Shape,
    *,
    image: Path | None = None,
    seed: int = 0,
    seeds: Sequence[int] | None = None,
    device: torch.device,
    dtype: torch.dtype,
    on_step: Callable[[], None] = lambda: None,
) -> Iterator[list[Sample]]:
    """Sample each prompt at each of several rates, from the same noise; one prompt after the other.

    Args:
        student: The student.
        prompts: What to show.
        rates: One or more of :func:`choose_rates`.
        shape: ``(C, F, H, W)``, of :func:`choose_shape`.
        image: What all clips begin with, for a student of image to video; a picture, or a video's first frame. It is
            resized to cover the clips' size, and its centre is cut out.
        seed: The prompt in place ``i`` draws from a generator of its own, seeded with ``seed + i``, on the CPU: its
            noise depends neither on the other prompts nor on the kind of device.
        seeds: In place of that, the seed of each prompt.
        device: Where to compute.
        dtype: What text encoder and transformer compute in.
        on_step: Called after each step of each clip.

    Yields:
        For each prompt a sample at each rate.

    Raises:
        UserError: If weights are missing or damaged, the image cannot be read, or there is one and the student takes
            none, or the reverse.
    """
    seen = encode_image(student, image, shape, device)
    width = student.architecture["text_dim"]
    different = list(dict.fromkeys(prompts))
    texts = embed_prompts(student.pipeline, student.latent_space, width, different, device=device, dtype=dtype)
    text_of = dict(zip(different, texts, strict=True))
    conditions = [replace(seen, text=text_of[prompt].unsqueeze(0)) for prompt in prompts]
    own_seeds = range(seed, seed + len(prompts)) if seeds is None else seeds
    yield from _sample_all(student, conditions, rates, shape, own_seeds, device, dtype, on_step)


def sample_at_full_rate(
    student: Student,
    prompts: Sequence[str],
    shape: Shape,
    *,
    image: Path | None = None,
    seed: int = 0,
    device: torch.device,
    dtype: torch.dtype,
    on_step: Callable[[], None] = lambda: None,
) -> list[Tensor]:
    """The latents ``[C, F, H, W]`` of a clip for each prompt; otherwise as :func:`sample_clips`."""
    rates = [(1,) * len(student.timesteps)]
    rows = sample_clips(
        student, prompts, rates, shape, image=image, seed=seed, device=device, dtype=dtype, on_step=on_step
    )
    return [row[0].latents for row in rows]


def embed_prompts(
    source: str,
    latent_space: LatentSpace,
    width: int,
    prompts: Sequence[str],
    *,
    device: torch.device,
    dtype: torch.dtype,
) -> list[Tensor]:
    """Embed prompts as a model was trained to read them; the text encoder is out of memory again afterwards.

    Args:
        source: A pipeline with text encoder and tokenizer, folder or hub id; not looked at for the block DCT's space.
        latent_space: Whose latents the model makes: words are hashed for the block DCT's.
        width: ``D``, of the tokens that the transformer reads.
        prompts: N of them.
        device: Where to compute; the CPU takes the place of a GPU that the text encoder does not fit.
        dtype: What the text encoder computes in.

    Returns:
        N times ``[L, D]`` float32 on the CPU, zeros behind the prompt's tokens.

    Raises:
        UserError: If the text encoder is missing, damaged or of another width.
    """
    try:
        rows = _embed_on(source, latent_space, width, prompts, device, dtype)
    except torch.OutOfMemoryError:
        logger.warning(f"The text encoder does not fit {device}: prompts are encoded on the CPU, which takes longer.")
        rows = None
    _free_memory(device)
    return _embed_on(source, latent_space, width, prompts, torch.device("cpu"), dtype) if rows is None else rows


def encode_image(student: Student, image: Path | None, shape: Shape, device: torch.device) -> Condition:
    """What a student is told of the image that clips begin with: a condition of one sample, without text yet.

    VAE and image encoder are out of memory again afterwards. Arguments and errors are those of :func:`sample_clips`.
    """
    nothing = torch.empty(0)
    picture = fitting_picture(student, image, shape)
    if picture is None or student.image is None:
        return Condition(nothing)
    embedding = None
    if student.image.embedding_dim is not None:
        embedding = WanImageEncoder.from_pretrained(student.pipeline, device)(picture).unsqueeze(0)
        _free_memory(device)
    codec = _load_codec(student, device, torch.float32)  # as training data was, and as in diffusers
    frames = 1 + TEMPORAL_STRIDE * (shape[1] - 1)
    latents = encode_first_frame(codec.encode, picture.unsqueeze(0), frames).cpu()
    del codec
    _free_memory(device)
    return Condition(nothing, latents, embedding)


def fitting_picture(student: Student, image: Path | None, shape: Shape) -> Tensor | None:
    """The image that clips begin with, in their size; None for a student of text to video.

    Raises:
        UserError: If the student needs an image and there is none, or the reverse, or it cannot be read.
    """
    if student.image is None and image is not None:
        raise UserError(f"--image {image}: {student.folder} makes videos of a prompt alone. Leave --image out.")
    if student.image is None:
        return None
    if image is None:
        raise UserError(f"{student.folder} makes videos of an image and a prompt. Pass the image by --image FILE.")
    stride = SPATIAL_STRIDES[student.latent_space]
    return read_picture(image, stride * shape[2], stride * shape[3])


def load_student(student: Student, device: torch.device, dtype: torch.dtype) -> WanTransformer3DModel:
    """A student's transformer; adapters are merged into theirs.

    Raises:
        UserError: If weights are missing or damaged, or do not fit each other.
    """
    return load_merged(student.transformer, student.adapters, device, dtype)


def load_merged(source: str, adapters: Path | None, device: torch.device, dtype: torch.dtype) -> WanTransformer3DModel:
    """A transformer with the adapters of a file merged into it; None for a whole model.

    Raises:
        UserError: As :func:`load_student`.
    """
    transformer = load_transformer(source, device, dtype)
    if adapters is not None:
        merge_adapters(transformer, read_adapters(adapters))
    return transformer


def decode_clips(
    student: Student, latents: Iterable[Tensor], *, device: torch.device, dtype: torch.dtype
) -> Iterator[Tensor]:
    """Clips ``[3, F, H, W]`` float32 on the CPU, about [0, 1], one by one from ``[C, F, H, W]``.

    Raises:
        UserError: If the VAE is missing or damaged.
    """
    _free_memory(device)  # of what sampling held
    codec = _load_codec(student, device, dtype)
    for each in latents:
        yield codec.decode(each.unsqueeze(0).to(codec.mean.device))[0].cpu()


def clip_name(number: int, prompt: str) -> str:
    """A file's name, without ending: the prompt's place and its first words."""
    words = "-".join(re.findall(r"\w+", prompt.lower())[:6])[:50]
    return f"{number:03d}-{words}".rstrip("-")


def _sample_all(
    student: Student,
    conditions: Sequence[Condition],
    rates: Sequence[Rates],
    shape: Shape,
    seeds: Sequence[int],
    device: torch.device,
    dtype: torch.dtype,
    on_step: Callable[[], None],
) -> Iterator[list[Sample]]:
    model = VelocityModel(load_student(student, device, dtype), dtype=dtype)

    def count(_: SamplingStep) -> None:
        on_step()

    interpolator = interpolate_linearly if student.interpolator is None else student.interpolator.to(device)
    samplers = [
        HalfRateInterpolationSampler(
            clean_predictor(model), interpolator, student.timesteps, rates=each, sampler=student.sampler, on_step=count
        )
        for each in rates
    ]
    for condition, seed in zip(conditions, seeds, strict=True):
        yield [_sample(sampler, condition.to(device), shape, seed) for sampler in samplers]


def _load_codec(student: Student, device: torch.device, dtype: torch.dtype) -> BlockDCTCodec | WanCodec:
    """What encodes and decodes a student's clips; the tiny preset's runs on the CPU."""
    if student.latent_space == "block-dct-4":
        return BlockDCTCodec()
    return WanCodec.from_pretrained(student.pipeline, device, dtype)


def _sample(sampler: HalfRateInterpolationSampler, condition: Condition, shape: Shape, seed: int) -> Sample:
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(1, *shape, generator=generator).to(condition.text.device)
    start = time.perf_counter()
    latents = sampler(noise, generator, condition=condition)[0].cpu()  # which waits for the device
    return Sample(latents, time.perf_counter() - start)


def _embed_on(
    source: str,
    latent_space: LatentSpace,
    width: int,
    prompts: Sequence[str],
    device: torch.device,
    dtype: torch.dtype,
) -> list[Tensor]:
    encode: TextEncoder
    if latent_space == "block-dct-4":
        encode = HashTextEncoder(TEXT_LENGTH, width)
    else:
        encode = WanTextEncoder.from_pretrained(source, device, dtype)
    if encode.dim != width:
        raise UserError(
            f"The text encoder of {source} has width {encode.dim}, its transformer expects {width}. Pass a pipeline "
            "whose parts belong together."
        )
    batches = [list(prompts[start : start + BATCH]) for start in range(0, len(prompts), BATCH)]
    rows = [row for batch in batches for row in encode(batch)]
    return [F.pad(row, (0, 0, 0, encode.length - len(row))) for row in rows]


def _free_memory(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
