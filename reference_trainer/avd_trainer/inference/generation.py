"""From an exported student and prompts to clips: text encoder, transformer and VAE in memory one after the other."""

from __future__ import annotations

import gc
import json
import logging
import math
import re
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from avd_core import (
    FlowMatchingSchedule,
    HalfRateInterpolationSampler,
    LatentFrameInterpolator,
    SamplingStep,
    interpolate_linearly,
    step_rates,
)
from avd_trainer.data.encode import BATCH, WAN_FPS, HashTextEncoder, TextEncoder
from avd_trainer.models.codecs.block_dct import BlockDCTCodec
from avd_trainer.models.codecs.wan import WanCodec
from avd_trainer.models.schedulers import few_steps
from avd_trainer.models.text_encoders.hashed import TEXT_LENGTH
from avd_trainer.models.text_encoders.umt5 import WanTextEncoder
from avd_trainer.models.transformer import DTYPES, VelocityModel, load_transformer
from avd_trainer.models.weights import open_weights
from avd_trainer.planning.memory import wan_latent_shape
from avd_trainer.runtime.errors import UserError
from avd_trainer.training.export import ABOUT
from avd_trainer.training.folder import method_of_run
from avd_trainer.training.pipeline_export import INTERPOLATOR, PARTS, LatentSpace, load_interpolator

logger = logging.getLogger(__name__)

WAN_SIZE = "832x480x81"

Shape = tuple[int, int, int, int]
Rates = tuple[int, ...]


class Student(NamedTuple):
    """A few-step pipeline on disk; of its weights only the interpolator's are loaded.

    Attributes:
        folder: The pipeline's.
        timesteps: Its few steps, falling.
        latent_space: Whose latents it makes.
        clip: ``(C, F, H, W)`` of the latents that it was trained on, where that is known.
        fps: Frames per second of its clips.
        architecture: Keyword arguments of its ``WanTransformer3DModel``.
        interpolator: For steps at half rate, where there is one.
    """

    folder: Path
    timesteps: tuple[float, ...]
    latent_space: LatentSpace
    clip: Shape | None
    fps: float
    architecture: dict[str, Any]
    interpolator: LatentFrameInterpolator | None


class About(NamedTuple):
    """What an export says of the clips that its student was trained on.

    Attributes:
        latent_space: Whose latents they were, where that is said.
        clip: ``(C, F, H, W)`` of one's latents, where that is said.
        fps: Their frames per second; Wan2.1's where that is not said.
    """

    latent_space: LatentSpace | None = None
    clip: Shape | None = None
    fps: float = WAN_FPS


class Sample(NamedTuple):
    """A clip in latent space.

    Attributes:
        latents: ``[C, F, H, W]`` float32 on the CPU.
        seconds: What transformer and interpolator took.
    """

    latents: Tensor
    seconds: float


def open_student(folder: Path) -> Student:
    """Look at what ``avd export`` wrote, or at a Wan pipeline of diffusers with a few-step scheduler.

    Raises:
        UserError: If it is neither, or something is missing or damaged.
    """
    scheduler = folder / "scheduler" / "scheduler_config.json"
    if not scheduler.is_file():
        raise _no_pipeline(folder)
    timesteps = read_timesteps(scheduler)
    if timesteps is None:
        raise UserError(
            f"{scheduler} names no few steps, as `avd export` writes them. Pass the folder of an exported student; a "
            "pipeline of many steps is sampled by diffusers."
        )
    about = read_about(folder)
    latent_space = about.latent_space or "wan"
    missing = [name for name in PARTS if latent_space == "wan" and not (folder / name).is_dir()]
    if missing:
        raise UserError(
            f"{folder} has no {' and no '.join(missing)}, which clips need. Export the run again with --pipeline "
            "SOURCE, a Wan pipeline in diffusers' layout such as Wan-AI/Wan2.1-T2V-1.3B-Diffusers."
        )
    with open_weights(str(folder)) as weights:
        architecture = weights.config
    interpolator = None
    if (folder / INTERPOLATOR).is_dir():
        interpolator = load_interpolator(folder / INTERPOLATOR, architecture["in_channels"])
    return Student(
        folder=folder,
        timesteps=timesteps,
        latent_space=latent_space,
        clip=about.clip,
        fps=about.fps,
        architecture=architecture,
        interpolator=interpolator,
    )


def read_about(folder: Path) -> About:
    """What ``export.json`` says of a student's clips, where a folder has one.

    Raises:
        UserError: If it is damaged.
    """
    path = folder / ABOUT
    if not path.is_file():
        return About()
    content = _read_json(path)
    latent_space, clip, fps = content.get("latent_space"), content.get("clip"), content.get("fps", WAN_FPS)
    for name, value, fits, expected in (
        ("latent_space", latent_space, latent_space in (None, *get_args(LatentSpace)), "one of wan and block-dct"),
        ("clip", clip, clip is None or _is_shape(clip), "four positive integers, [C, F, H, W]"),
        ("fps", fps, type(fps) in (int, float) and 0 < fps < math.inf, "a positive number"),
    ):
        if not fits:
            raise UserError(f"{path}: {name} must be {expected}, got {value!r}. Export the run again.")
    return About(latent_space, None if clip is None else (clip[0], clip[1], clip[2], clip[3]), float(fps))


def read_timesteps(scheduler: Path) -> tuple[float, ...] | None:
    """The few steps in a ``scheduler_config.json``, falling; None if it names none.

    Raises:
        UserError: If it cannot be read, or what it names cannot be sampled with.
    """
    found = few_steps(_read_json(scheduler))
    if found is None:
        return None
    try:
        timesteps = tuple(float(timestep) for timestep in found)
        HalfRateInterpolationSampler(_never, _never, timesteps, half_rate_steps=0)
    except (TypeError, ValueError) as error:
        raise UserError(f"{scheduler} has no timesteps to sample with: {error}. Export the run again.") from error
    return timesteps


def choose_rates(
    student: Student,
    *,
    half_rate: bool | None = None,
    half_rate_steps: int | None = None,
    rates: Sequence[int] | None = None,
) -> Rates:
    """The rate of each step: half of the steps at half rate where there is an interpolator, unless told otherwise.

    Args:
        student: The student.
        half_rate: Whether to use half rate at all; None leaves it to the others, and to there being an interpolator.
        half_rate_steps: How many steps run at half rate.
        rates: In place of it, the rate of each step, such as ``(4, 2, 1, 1)``.

    Raises:
        UserError: If these exclude or contradict each other or do not fit the student's steps, or there is no
            interpolator.
    """
    if rates is not None and half_rate_steps is not None:
        raise UserError("--rates and --half-rate-steps exclude each other: pass one of them.")
    asked = rates is not None or half_rate_steps is not None
    if half_rate is False and asked:
        raise UserError("--full-rate excludes --half-rate-steps and --rates: leave it out, or them.")
    steps = len(student.timesteps)
    if not asked:
        wanted = student.interpolator is not None if half_rate is None else half_rate
        half_rate_steps = max(1, steps // 2) if wanted else 0
    try:
        chosen = step_rates(steps, half_rate_steps or 0, rates)
    except ValueError as error:
        raise UserError(f"{'--half-rate-steps' if rates is None else '--rates'}: {error}") from error
    if half_rate and max(chosen) == 1:
        option = f"--half-rate-steps {half_rate_steps}" if rates is None else f"--rates {','.join(map(str, rates))}"
        raise UserError(
            f"{option}: no step is at half rate, which --half-rate and --side-by-side ask for. Leave one of them out."
        )
    if max(chosen) > 1 and student.interpolator is None:
        raise UserError(
            f"{student.folder} has no interpolator, which half rate needs. Train one with `avd train "
            "PRESET --method frame_interpolation` and export the run again with `avd export --interpolator`, or pass "
            "--full-rate."
        )
    return chosen


def choose_shape(student: Student, size: str | None, rates: Rates) -> Shape:
    """The latent shape of clips.

    Args:
        student: The student.
        size: ``WIDTHxHEIGHTxFRAMES`` in pixels; None for what the student was trained on, or Wan2.1's 832x480x81.
        rates: See :func:`choose_rates`.

    Returns:
        ``(C, F, H, W)``.

    Raises:
        UserError: If there is no such size, or the transformer or the interpolator cannot take it.
    """
    if size is None and student.clip is not None:
        shape = student.clip
    else:
        _, frames, height, width = wan_latent_shape(size or WAN_SIZE)
        shape = (student.architecture["in_channels"], frames, height, width)
    _check_positions(student, shape)
    if max(rates) > 1:
        if shape[1] < 2:
            raise UserError("A clip of one frame has no half frame rate. Pass --full-rate, or more frames by --size.")
        assert student.interpolator is not None
        try:
            student.interpolator.check_input(torch.empty(1, *shape, device="meta"))
        except ValueError as error:
            raise UserError(f"--size: {error} Pass a larger one, or --full-rate.") from error
    return shape


def choose_device(name: str | None) -> torch.device:
    """A device by its name, or the GPU where there is one.

    Raises:
        UserError: If there is no such device.
    """
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        probe = torch.zeros((), device=name)
        probe.item()  # "meta" has tensors, but no values
        return probe.device
    except (RuntimeError, AssertionError) as error:
        reason = str(error).partition("\n")[0]
        raise UserError(f"--device {name} cannot be used ({reason}). Pass cpu, cuda or cuda:1.") from error


def choose_dtype(name: str | None, device: torch.device) -> torch.dtype:
    """What models compute in by its name, or bfloat16 on a GPU and float32 on the CPU."""
    return DTYPES[name or ("bfloat16" if device.type == "cuda" else "float32")]


def sample_clips(
    student: Student,
    prompts: Sequence[str],
    rates: Sequence[Rates],
    shape: Shape,
    *,
    seed: int = 0,
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
        seed: The prompt in place ``i`` draws from a generator of its own, seeded with ``seed + i``, on the CPU: its
            noise depends neither on the other prompts nor on the kind of device.
        device: Where to compute.
        dtype: What text encoder and transformer compute in.
        on_step: Called after each step of each clip.

    Yields:
        For each prompt a sample at each rate.

    Raises:
        UserError: If weights are missing or damaged.
    """
    width = student.architecture["text_dim"]
    texts = embed_prompts(str(student.folder), student.latent_space, width, prompts, device=device, dtype=dtype)
    yield from _sample_all(student, texts, rates, shape, seed, device, dtype, on_step)


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


def decode_clips(
    student: Student, latents: Iterable[Tensor], *, device: torch.device, dtype: torch.dtype
) -> Iterator[Tensor]:
    """Clips ``[3, F, H, W]`` float32 on the CPU, about [0, 1], one by one from ``[C, F, H, W]``.

    Raises:
        UserError: If the VAE is missing or damaged.
    """
    _free_memory(device)  # of what sampling held
    codec: BlockDCTCodec | WanCodec
    if student.latent_space == "block-dct":
        codec, device = BlockDCTCodec(), torch.device("cpu")
    else:
        codec = WanCodec.from_pretrained(str(student.folder), device, dtype)
    for each in latents:
        yield codec.decode(each.unsqueeze(0).to(device))[0].cpu()


def clip_name(number: int, prompt: str) -> str:
    """A file's name, without ending: the prompt's place and its first words."""
    words = "-".join(re.findall(r"\w+", prompt.lower())[:6])[:50]
    return f"{number:03d}-{words}".rstrip("-")


def _sample_all(
    student: Student,
    texts: Sequence[Tensor],
    rates: Sequence[Rates],
    shape: Shape,
    seed: int,
    device: torch.device,
    dtype: torch.dtype,
    on_step: Callable[[], None],
) -> Iterator[list[Sample]]:
    model = VelocityModel(load_transformer(str(student.folder), device, dtype), dtype=dtype)
    schedule = FlowMatchingSchedule()

    def predict_x_0(x_t: Tensor, timesteps: Tensor, text: Tensor) -> Tensor:
        return schedule.velocity_to_x_0(model(x_t, timesteps, text), x_t, timesteps)

    def count(_: SamplingStep) -> None:
        on_step()

    interpolator = interpolate_linearly if student.interpolator is None else student.interpolator.to(device)
    samplers = [
        HalfRateInterpolationSampler(predict_x_0, interpolator, student.timesteps, rates=each, on_step=count)
        for each in rates
    ]
    for number, text in enumerate(texts):
        yield [_sample(sampler, text.to(device).unsqueeze(0), shape, seed + number) for sampler in samplers]


def _sample(sampler: HalfRateInterpolationSampler, text: Tensor, shape: Shape, seed: int) -> Sample:
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(1, *shape, generator=generator).to(text.device)
    start = time.perf_counter()
    latents = sampler(noise, generator, text=text)[0].cpu()  # which waits for the device
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
    if latent_space == "block-dct":
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


def _never(*_: object) -> Tensor:
    raise AssertionError


def _no_pipeline(folder: Path) -> UserError:
    if not folder.is_dir():
        return UserError(f"{folder}: there is no such folder. Pass the --output folder of `avd export`.")
    method = method_of_run(folder)
    if method == "frame_interpolation":
        return UserError(
            f"{folder} is a run of method {method}, which makes no clips. Export a student with it: `avd export "
            f"STUDENT_RUN --output DIR --interpolator {folder}`, and pass DIR."
        )
    if method is not None:
        return UserError(f"{folder} is a run. Export it first: `avd export {folder} --output DIR`, and pass DIR.")
    transformer = " It holds a transformer alone." if (folder / ABOUT).is_file() else ""
    return UserError(
        f"{folder} holds no scheduler/scheduler_config.json, so it is no pipeline.{transformer} Pass a folder that "
        "`avd export` wrote, without --transformer-only."
    )


def _check_positions(student: Student, shape: Shape) -> None:
    most = student.architecture.get("rope_max_seq_len", 1024)
    tokens = [size // patch for size, patch in zip(shape[1:], student.architecture["patch_size"], strict=True)]
    if max(tokens) > most:
        raise UserError(
            f"Clips of this --size are {' x '.join(map(str, tokens))} tokens (frames, height, width), and the "
            f"transformer has places for {most} in each direction. Pass a smaller --size."
        )


def _is_shape(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 4 and all(type(size) is int and size > 0 for size in value)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read: {error}. Export the run again.") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} holds a {type(content).__name__}, expected an object. Export the run again.")
    return content
