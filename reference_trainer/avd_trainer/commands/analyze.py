"""``avd analyze``: look at how a model samples."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from avd_trainer.commands.sample import ComputeDtype, Device
from avd_trainer.runtime.errors import UserError
from avd_trainer.runtime.terminal import readable_errors, say

analyze_app = typer.Typer(help="Look at how a model samples.", no_args_is_help=True)


@analyze_app.callback()
def _group() -> None:
    """Without it typer takes a single command for the whole application."""


@analyze_app.command()
def similarity(
    source: Annotated[
        str,
        typer.Argument(
            help="bundled:tiny, a pipeline or transformer folder of diffusers, or anything else that avd train takes "
            "for a teacher."
        ),
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for similarity.json and similarity.png.")],
    prompts_file: Annotated[
        Path | None, typer.Option(help="A prompt a line. The tiny model has captions of its own.")
    ] = None,
    data: Annotated[
        Path | None, typer.Option(help="A data set of avd data, for its text embeddings, in place of --prompts-file.")
    ] = None,
    count: Annotated[int, typer.Option(min=1, help="Clips to sample.")] = 48,
    steps: Annotated[
        int | None, typer.Option(min=1, help="Euler steps, for a model that was not distilled into few steps.")
    ] = None,
    guidance_scale: Annotated[
        float | None, typer.Option(min=1, help="Classifier-free guidance of such a model; 5 without this option.")
    ] = None,
    shift: Annotated[
        float | None, typer.Option(min=0.01, help="Shift of such a model's timesteps; 5 without this option.")
    ] = None,
    timesteps: Annotated[
        str | None,
        typer.Option(help="The few steps, comma-separated. Default: the pipeline's own, else 1000,900,757,522."),
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of the noise.")] = 0,
    size: Annotated[
        str | None,
        typer.Option(metavar="WxHxF", help="Size of a clip. Default: the data's, else what the model was trained on."),
    ] = None,
    device: Device = None,
    dtype: ComputeDtype = None,
) -> None:
    """Measure how alike adjacent frames of each step's clean prediction are, and at how many steps half the frame rate
    will do.

    Writes the numbers and a violin plot. docs/half-rate.md says how to read them.
    """
    with readable_errors():
        if data is not None and prompts_file is not None:
            raise UserError("--data and --prompts-file exclude each other: prompts come from one of them.")
        grid = None if timesteps is None else _parse(timesteps)
        from avd_trainer.evaluation.similarity_analysis import (
            NUMBERS_FILE,
            PLOT_FILE,
            analyze_similarity,
            find_sampling,
        )
        from avd_trainer.evaluation.similarity_report import render
        from avd_trainer.inference.choices import choose_device, choose_dtype

        where = choose_device(device)
        report = analyze_similarity(
            source,
            output,
            sampling=find_sampling(source, grid, steps, guidance_scale, shift),
            prompts_file=prompts_file,
            data=data,
            size=size,
            count=count,
            seed=seed,
            device=where,
            dtype=choose_dtype(dtype, where),
        )
        Console().print(render(report))
        say(f"Half rate is supported at the first {report.half_rate_steps} of {len(report.steps)} steps.")
        say(f"Numbers: {output / NUMBERS_FILE}. Plot: {output / PLOT_FILE}.")


def _parse(timesteps: str) -> tuple[float, ...]:
    try:
        return tuple(map(float, timesteps.split(",")))
    except ValueError as error:
        raise UserError(
            f"--timesteps must be numbers with commas, such as 1000,900,757,522, got {timesteps!r}."
        ) from error
