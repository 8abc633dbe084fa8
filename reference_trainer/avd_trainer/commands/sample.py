"""``avd sample``: clips of an exported student."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby
from pathlib import Path
from statistics import median
from traceback import clear_frames
from typing import TYPE_CHECKING, Annotated

import typer

from avd_trainer.commands.clip_files import (
    PROMPTS,
    check_output,
    clip_files,
    read_asked_prompts,
    write_clips,
    write_list,
)
from avd_trainer.commands.sampling_options import (
    ComputeDtype,
    Device,
    Fps,
    HalfRate,
    HalfRateSteps,
    Image,
    Output,
    Pipeline,
    Prompts,
    PromptsFile,
    RatesOfSteps,
    Seed,
    Size,
    asked_rates,
)
from avd_trainer.runtime.errors import UserError
from avd_trainer.runtime.progress import ProgressBar
from avd_trainer.runtime.terminal import readable_errors, say

if TYPE_CHECKING:
    from avd_trainer.inference.generation import Sample
    from avd_trainer.inference.students import Student


def sample(
    folder: Annotated[Path, typer.Argument(help="The --output folder of avd export, of any --format.")],
    output: Output,
    prompt: Prompts = None,
    prompts_file: PromptsFile = None,
    image: Image = None,
    half_rate: HalfRate = None,
    half_rate_steps: HalfRateSteps = None,
    rates: RatesOfSteps = None,
    side_by_side: Annotated[
        bool, typer.Option("--side-by-side", help="The same noise at full and at half rate, next to each other.")
    ] = False,
    seed: Seed = 0,
    size: Size = None,
    fps: Fps = None,
    pipeline: Pipeline = None,
    device: Device = None,
    dtype: ComputeDtype = None,
) -> None:
    """Sample clips of an exported student, at full or half rate."""
    with readable_errors():
        # All that a person can get wrong comes before the models.
        prompts = read_asked_prompts(prompt, prompts_file)
        alone = prompts_file is None and len(prompts) == 1
        check_output(output, alone)
        from avd_trainer.inference.choices import choose_device, choose_dtype, choose_shape
        from avd_trainer.inference.generation import decode_clips, sample_clips
        from avd_trainer.inference.students import open_student
        from avd_trainer.runtime.files import claim_folder

        student = open_student(folder, pipeline)
        plans = _plans(student, half_rate, half_rate_steps, rates, side_by_side)
        shape = choose_shape(student, size, max(plans.values()))
        where = choose_device(device)
        kind = choose_dtype(dtype, where)
        claim_folder(output.parent if alone else output)
        with ProgressBar("sample", len(prompts) * len(plans) * len(student.timesteps)) as bar:
            samples, cut = _finished(
                sample_clips(
                    student, prompts, list(plans.values()), shape, image=image, seed=seed, device=where, dtype=kind,
                    on_step=bar.advance,
                )
            )  # fmt: skip
        if cut is not None:
            say(f"Cut short: {len(samples)} of {len(prompts)} prompts are sampled, and are written before this ends.")
        done = prompts[: len(samples)]
        videos = decode_clips(student, (each.latents for row in samples for each in row), device=where, dtype=kind)
        files = [output] if alone else clip_files(output, done)

        def list_files(written: int) -> None:
            if not alone:
                write_list(output / PROMPTS, done[:written], files[:written], seed)

        write_clips(videos, list(plans), files, fps or student.fps, list_files)
        say(f"{'The clip is' if len(files) == 1 else f'{len(files)} clips are'} in {output}.")
        for (name, each), column in zip(plans.items(), zip(*samples, strict=True), strict=True):
            seconds = median(sampled.seconds for sampled in column)
            say(f"{name} ({describe_rates(each)}): {seconds:.3g} s a clip")
        if cut is not None:
            raise cut


def _plans(
    student: Student, half_rate: bool | None, half_rate_steps: int | None, rates: str | None, side_by_side: bool
) -> dict[str, tuple[int, ...]]:
    """The rates of each version of a clip, by its label."""
    if side_by_side and half_rate is False:
        raise UserError("--side-by-side shows full and half rate: leave --full-rate out.")
    chosen = asked_rates(student, True if side_by_side else half_rate, half_rate_steps, rates)
    full = {"full rate": (1,) * len(student.timesteps)}
    reduced = {"half rate": chosen} if max(chosen) > 1 else {}
    return full | reduced if side_by_side else reduced or full


def describe_rates(rates: Sequence[int]) -> str:
    """``(2, 2, 1, 1)``: 2 steps on every 2nd frame, 2 on all frames."""
    ordinals = {1: "all frames", 2: "every 2nd frame", 3: "every 3rd frame"}
    parts: list[str] = []
    for rate, steps in groupby(rates):
        number = len(list(steps))
        unit = "" if parts else " steps" if number > 1 else " step"
        parts.append(f"{number}{unit} on {ordinals.get(rate, f'every {rate}th frame')}")
    return ", ".join(parts)


def _finished(rows: Iterator[list[Sample]]) -> tuple[list[list[Sample]], BaseException | None]:
    """All rows, or those before an error or Ctrl-C, and that; raises it if there are none."""
    found: list[list[Sample]] = []
    try:
        for row in rows:
            found.append(row)
    except (Exception, KeyboardInterrupt) as error:
        if not found:
            raise
        clear_frames(error.__traceback__)  # they hold the transformer, in whose place the VAE comes
        return found, error
    return found, None
