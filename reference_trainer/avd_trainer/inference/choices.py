"""How a student is sampled: rates, size, device and precision, by default or as asked."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from avd_core import (
    step_rates,
)
from avd_trainer.inference.students import Shape, Student
from avd_trainer.models.architecture import latent_channels
from avd_trainer.models.codecs.latent_space import SIZES, latent_shape_of
from avd_trainer.models.transformer import DTYPES
from avd_trainer.runtime.errors import UserError

Rates = tuple[int, ...]
"""For each step, on one frame of how many it runs."""


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
        size: ``WIDTHxHEIGHTxFRAMES`` in pixels; None for what the student was trained on, or else the
            models of its latent space.
        rates: See :func:`choose_rates`.

    Returns:
        ``(C, F, H, W)``.

    Raises:
        UserError: If there is no such size, or the transformer or the interpolator cannot take it.
    """
    if size is None and student.clip is not None:
        shape = student.clip
    else:
        _, frames, height, width = latent_shape_of(size or SIZES[student.latent_space], student.latent_space)
        shape = (latent_channels(student.architecture), frames, height, width)
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


def _check_positions(student: Student, shape: Shape) -> None:
    most = student.architecture.get("rope_max_seq_len", 1024)
    tokens = [size // patch for size, patch in zip(shape[1:], student.architecture["patch_size"], strict=True)]
    if max(tokens) > most:
        raise UserError(
            f"Clips of this --size are {' x '.join(map(str, tokens))} tokens (frames, height, width), and the "
            f"transformer has places for {most} in each direction. Pass a smaller --size."
        )
