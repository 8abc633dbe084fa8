"""Options by which clips are sampled, which several commands share."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from avd_trainer.commands.clip_files import MOST_SEED
from avd_trainer.runtime.errors import UserError

if TYPE_CHECKING:
    from avd_trainer.inference.choices import Rates
    from avd_trainer.inference.students import Student

Output = Annotated[
    Path,
    typer.Option(
        "--output",
        "-o",
        help="Of one --prompt: the clip, .mp4 or .gif. Of several, or --prompts-file: a folder for them (MP4).",
    ),
]
Prompts = Annotated[list[str] | None, typer.Option(help="What to show. Repeatable.")]
PromptsFile = Annotated[Path | None, typer.Option(help="A text file in UTF-8, one prompt a line.")]
Seed = Annotated[
    int, typer.Option(min=0, max=MOST_SEED, help="Of the first prompt's noise; the next one has the next.")
]
Fps = Annotated[float | None, typer.Option(min=1, help="Frames per second of the files.")]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1. Default: the GPU where there is one.")]
ComputeDtype = Annotated[
    Literal["float32", "bfloat16"] | None,
    typer.Option(help="What models compute in. Default: bfloat16 on a GPU, float32 on the CPU."),
]
HalfRate = Annotated[
    bool | None,
    typer.Option(
        "--half-rate/--full-rate",
        help="Run the first half of the steps on half of the frames, or none. Default: half rate where the folder "
        "has an interpolator.",
    ),
]
HalfRateSteps = Annotated[
    int | None, typer.Option(metavar="N", help="How many steps run at half rate, from the first.")
]
RatesOfSteps = Annotated[
    str | None,
    typer.Option(metavar="R,R,...", help="In place of that, for each step: on one frame of how many. 4,2,1,1."),
]
Size = Annotated[
    str | None,
    typer.Option(metavar="WxHxF", help="Pixels and frames, 832x480x81. Default: what the student was trained on."),
]
Pipeline = Annotated[
    str | None,
    typer.Option(
        metavar="SOURCE",
        help="Of students in another program's files: the Wan pipeline (folder or hub id) with what is not in "
        "them. Default: what the run was trained with.",
    ),
]
Image = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE",
        help="What the clips begin with, for students of image to video: a picture, or a video's first frame.",
    ),
]


def refuse_for_videos(options: Mapping[str, object]) -> None:
    """See that nobody told students what to make where there are only videos.

    Args:
        options: By name, such as ``--image``; those that were not given are None, empty or 0.

    Raises:
        UserError: If one was given.
    """
    if given := [name for name, value in options.items() if value]:
        raise UserError(
            f"Only students take {' and '.join(given)}, and these are videos: leave "
            f"{'it' if len(given) == 1 else 'them'} out."
        )


def asked_rates(student: Student, half_rate: bool | None, half_rate_steps: int | None, rates: str | None) -> Rates:
    """The rate of each step, as ``--half-rate``, ``--half-rate-steps`` or ``--rates`` ask, or by default.

    Raises:
        UserError: If the student cannot be sampled so, or ``--rates`` is no list of numbers.
    """
    from avd_trainer.inference.choices import choose_rates

    try:
        numbers = None if rates is None else [int(rate) for rate in rates.split(",")]
    except ValueError as error:
        raise UserError(f"--rates {rates}: expected a whole number for each step, such as 4,2,1,1.") from error
    return choose_rates(student, half_rate=half_rate, half_rate_steps=half_rate_steps, rates=numbers)
