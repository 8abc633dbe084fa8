"""``avd calibrate``: the motion term's floor and the regression's sharpness, measured."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from avd_trainer.commands.options import Data, Overrides, Preset, Prompts, Videos, train_config
from avd_trainer.runtime.terminal import readable_errors


def calibrate(
    preset: Preset,
    videos: Videos = None,
    data: Data = None,
    prompts: Prompts = None,
    samples: Annotated[int, typer.Option(min=2, help="Teacher samples, and real clips.")] = 64,
    steps: Annotated[int, typer.Option(min=1, help="Sampling steps of the teacher.")] = 25,
    shift: Annotated[
        float | None,
        typer.Option(min=0.01, help="Shift of the teacher's timesteps, in place of method.sampling_shift."),
    ] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Also write the numbers here.")] = None,
    set_: Overrides = None,
) -> None:
    """Measure what belongs to a latent space: the motion term's floor, from the temporal loss of teacher samples, and
    whether the regression's sharpness fits, from the losses of real clips.
    """
    with readable_errors():
        own = [] if shift is None else [f"method.sampling_shift={shift}"]
        config = train_config(preset, None, videos, data, prompts, None, [*(set_ or []), *own])
        from avd_trainer.evaluation.calibration import calibrate_run, render

        calibration = calibrate_run(config, samples=samples, steps=steps)
        Console().print(render(calibration))
        if json_file is not None:
            json_file.write_text(calibration.model_dump_json(indent=2) + "\n")
