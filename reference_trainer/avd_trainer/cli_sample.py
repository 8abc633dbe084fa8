"""``avd sample``: clips of an exported student."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from avd_trainer.errors import UserError
from avd_trainer.progress import ProgressBar
from avd_trainer.terminal import readable_errors, say

if TYPE_CHECKING:
    from torch import Tensor

    from avd_trainer.generation import Student

ENDINGS = (".mp4", ".gif")


def sample(
    folder: Annotated[Path, typer.Argument(help="The --output folder of avd export.")],
    output: Annotated[
        Path,
        typer.Option(
            "--output", "-o", help="Of one prompt: the clip, .mp4 or .gif. Of several: a folder for them (MP4)."
        ),
    ],
    prompt: Annotated[list[str] | None, typer.Option(help="What to show. Repeatable.")] = None,
    prompts_file: Annotated[Path | None, typer.Option(help="A text file in UTF-8, one prompt a line.")] = None,
    half_rate: Annotated[
        bool | None,
        typer.Option(
            "--half-rate/--full-rate",
            help="Run the first half of the steps on half of the frames, or none. Default: half rate where the folder "
            "has an interpolator.",
        ),
    ] = None,
    half_rate_steps: Annotated[
        int | None, typer.Option(metavar="N", help="How many steps run at half rate, from the first.")
    ] = None,
    rates: Annotated[
        str | None,
        typer.Option(metavar="R,R,...", help="In place of that, for each step: on one frame of how many. 4,2,1,1."),
    ] = None,
    side_by_side: Annotated[
        bool, typer.Option("--side-by-side", help="The same noise at full and at half rate, next to each other.")
    ] = False,
    seed: Annotated[int, typer.Option(min=0, help="Of the first prompt's noise; the next one has the next.")] = 0,
    size: Annotated[
        str | None,
        typer.Option(metavar="WxHxF", help="Pixels and frames, 832x480x81. Default: what the student was trained on."),
    ] = None,
    fps: Annotated[float | None, typer.Option(min=1, help="Frames per second of the files.")] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1. Default: the GPU where there is one.")] = None,
    dtype: Annotated[
        Literal["float32", "bfloat16"] | None,
        typer.Option(help="What models compute in. Default: bfloat16 on a GPU, float32 on the CPU."),
    ] = None,
) -> None:
    """Sample clips of an exported student, at full or half rate."""
    with readable_errors():
        # All that a person can get wrong comes before the models.
        prompts = _prompts(prompt, prompts_file)
        _check_output(output, len(prompts))
        import torch

        from avd_trainer.generation import choose_device, choose_shape, decode_clips, open_student, sample_clips
        from avd_trainer.runs import claim_folder

        student = open_student(folder)
        plans = _plans(student, half_rate, half_rate_steps, rates, side_by_side)
        shape = choose_shape(student, size, max(plans.values()))
        where = choose_device(device)
        precision = getattr(torch, dtype or ("bfloat16" if where.type == "cuda" else "float32"))
        claim_folder(output.parent if len(prompts) == 1 else output)
        steps = len(prompts) * len(plans) * len(student.timesteps)
        with ProgressBar("sample", steps) as bar:
            samples = sample_clips(
                student, prompts, list(plans.values()), shape, seed=seed, device=where, dtype=precision,
                on_step=bar.advance,
            )  # fmt: skip
        videos = decode_clips(student, (each.latents for row in samples for each in row), device=where, dtype=precision)
        files = _files(output, prompts)
        for file in files:
            _save({name: next(videos) for name in plans}, file, fps or student.fps)
        if len(prompts) > 1:
            _write_list(output / "prompts.json", prompts, files, seed)
        what = "The clip is" if len(prompts) == 1 else f"{len(prompts)} clips are"
        say(f"{what} in {output}.")
        for (name, each), column in zip(plans.items(), zip(*samples, strict=True), strict=True):
            seconds = median(sampled.seconds for sampled in column)
            say(f"{name}, steps on one frame of {', '.join(map(str, each))}: {seconds:.3g} s a clip")


def _prompts(given: list[str] | None, file: Path | None) -> list[str]:
    from avd_trainer.data.encode import read_prompts

    prompts = [*(given or []), *([] if file is None else (text for _, text in read_prompts(file)))]
    if not prompts:
        raise UserError("There is nothing to show. Pass --prompt TEXT or --prompts-file FILE.")
    return prompts


def _check_output(output: Path, prompts: int) -> None:
    if prompts == 1 and output.suffix not in ENDINGS:
        raise UserError(
            f"--output {output} has an unknown ending: of one prompt it is a file that ends in {' or '.join(ENDINGS)}."
        )
    if prompts == 1 and output.is_dir():
        raise UserError(f"--output {output} is a folder. Pass the name of a file.")
    if prompts > 1 and output.suffix in ENDINGS:
        raise UserError(f"--output {output} is one clip, and there are {prompts} prompts. Pass a folder for them.")


def _plans(
    student: Student, half_rate: bool | None, half_rate_steps: int | None, rates: str | None, side_by_side: bool
) -> dict[str, tuple[int, ...]]:
    """The rates of each version of a clip, by its label."""
    from avd_trainer.generation import choose_rates

    if side_by_side and half_rate is False:
        raise UserError("--side-by-side shows full and half rate: leave --full-rate out.")
    chosen = choose_rates(
        student,
        half_rate=True if side_by_side else half_rate,
        half_rate_steps=half_rate_steps,
        rates=None if rates is None else _read_rates(rates),
    )
    full = {"full rate": (1,) * len(student.timesteps)}
    reduced = {"half rate": chosen} if max(chosen) > 1 else {}
    if side_by_side and not reduced:
        raise UserError("--side-by-side shows full and half rate, but no step is at half rate. Leave it out.")
    return full | reduced if side_by_side else reduced or full


def _read_rates(rates: str) -> list[int]:
    try:
        return [int(rate) for rate in rates.split(",")]
    except ValueError as error:
        raise UserError(f"--rates {rates}: expected a whole number for each step, such as 4,2,1,1.") from error


def _files(output: Path, prompts: Sequence[str]) -> list[Path]:
    from avd_trainer.generation import clip_name

    if len(prompts) == 1:
        return [output]
    return [output / f"{clip_name(number, prompt)}.mp4" for number, prompt in enumerate(prompts)]


def _save(versions: Mapping[str, Tensor], file: Path, fps: float) -> None:
    """Write one clip, or several next to each other below their labels."""
    import torch

    from avd_trainer.samples import save_clip, save_grid

    path, formats = file.with_suffix(""), [file.suffix.removeprefix(".")]
    labels, videos = list(versions), list(versions.values())
    if len(videos) == 1:
        save_clip(videos[0], path, fps, formats)
    else:
        save_grid(torch.stack(videos), labels, path, fps, formats)


def _write_list(file: Path, prompts: Sequence[str], files: Sequence[Path], seed: int) -> None:
    from avd_trainer.runs import write_json

    rows = [
        {"file": path.name, "prompt": prompt, "seed": seed + number}
        for number, (path, prompt) in enumerate(zip(files, prompts, strict=True))
    ]
    write_json(file, rows)
