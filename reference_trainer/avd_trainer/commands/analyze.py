"""``avd analyze``: look at how a model samples."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from avd_trainer.commands.sampling_options import ComputeDtype, Device
from avd_trainer.runtime.errors import UserError
from avd_trainer.runtime.terminal import readable_errors, say

Output = Annotated[Path, typer.Option("--output", "-o", help="Folder for the numbers (JSON) and the plot (PNG).")]
Count = Annotated[int, typer.Option(min=1, help="Clips to sample.")]
Steps = Annotated[
    int | None, typer.Option(min=1, help="Euler steps, for a model that was not distilled into few steps.")
]
GuidanceScale = Annotated[
    float | None, typer.Option(min=1, help="Classifier-free guidance of such a model; 5 without this option.")
]
Shift = Annotated[
    float | None, typer.Option(min=0.01, help="Shift of such a model's timesteps; 5 without this option.")
]
Timesteps = Annotated[
    str | None,
    typer.Option(help="The few steps, comma-separated. Default: those that its folder names, else 1000,900,757,522."),
]
Seed = Annotated[int, typer.Option(min=0, help="Of the noise.")]

analyze_app = typer.Typer(help="Look at how a model samples.", no_args_is_help=True)


@analyze_app.command()
def similarity(
    source: Annotated[
        str,
        typer.Argument(
            help="bundled:tiny, a pipeline or transformer folder of diffusers, or anything else that avd train takes "
            "for a teacher."
        ),
    ],
    output: Output,
    prompts_file: Annotated[
        Path | None, typer.Option(help="A prompt a line. The tiny model has captions of its own.")
    ] = None,
    data: Annotated[
        Path | None, typer.Option(help="A data set of avd data, for its text embeddings, in place of --prompts-file.")
    ] = None,
    count: Count = 48,
    steps: Steps = None,
    guidance_scale: GuidanceScale = None,
    shift: Shift = None,
    timesteps: Timesteps = None,
    seed: Seed = 0,
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
        grid = None if timesteps is None else _parse("--timesteps", timesteps)
        from avd_trainer.evaluation.sampling import find_sampling
        from avd_trainer.evaluation.similarity_analysis import NUMBERS_FILE, PLOT_FILE, analyze_similarity
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


@analyze_app.command()
def spectrum(
    source: Annotated[
        str,
        typer.Argument(
            metavar="RUN_OR_STUDENT",
            help="A run's folder, what avd export writes, or anything else that avd train takes for a teacher.",
        ),
    ],
    output: Output,
    data: Annotated[
        Path | None,
        typer.Option(help="Real clips: a data set of avd data. The tiny model has clips of its own."),
    ] = None,
    levels: Annotated[
        str, typer.Option(help="Timesteps to which clips are noised before the blocks see them, comma-separated.")
    ] = "900,700,500,300,100",
    count: Count = 48,
    steps: Steps = None,
    guidance_scale: GuidanceScale = None,
    shift: Shift = None,
    timesteps: Timesteps = None,
    seed: Seed = 0,
    device: Device = None,
    dtype: ComputeDtype = None,
) -> None:
    """Find the blocks that tell real clips from generated ones, by the spectral roll-off of what they put out: those
    are worth a discriminator's attention.

    Writes the numbers and a violin plot. docs/spectrum.md says how to read them.
    """
    with readable_errors():
        grid = None if timesteps is None else _parse("--timesteps", timesteps)
        noised = _parse("--levels", levels)
        from avd_trainer.evaluation.spectrum_analysis import NUMBERS_FILE, PLOT_FILE, analyze_spectrum, open_source
        from avd_trainer.evaluation.spectrum_report import render
        from avd_trainer.inference.choices import choose_device, choose_dtype

        where = choose_device(device)
        model = open_source(source)
        report = analyze_spectrum(
            model.weights,
            output,
            sampling=model.sampling(grid, steps, guidance_scale, shift),
            data=data,
            levels=noised,
            count=count,
            seed=seed,
            device=where,
            dtype=choose_dtype(dtype, where),
        )
        Console().print(render(report))
        published = ", ".join(map(str, report.published))
        if report.recommended:
            recommended = ", ".join(map(str, report.recommended))
            say(f"Recommended for a discriminator: blocks {recommended} (published choices: {published}).")
        else:
            say(f"Chance may explain what separates here: keep the published choices, blocks {published}.")
        say(f"Numbers: {output / NUMBERS_FILE}. Plot: {output / PLOT_FILE}.")


def _parse(option: str, timesteps: str) -> tuple[float, ...]:
    try:
        return tuple(map(float, timesteps.split(",")))
    except ValueError as error:
        raise UserError(f"{option} must be numbers with commas, such as 900,757,522, got {timesteps!r}.") from error
