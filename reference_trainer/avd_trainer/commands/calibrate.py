"""``avd calibrate``: the motion term's floor, measured."""

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
    samples: Annotated[int, typer.Option(min=2, help="Teacher samples, and real clips to compare with.")] = 64,
    steps: Annotated[int, typer.Option(min=1, help="Sampling steps of the teacher.")] = 25,
    json_file: Annotated[Path | None, typer.Option("--json", help="Also write the numbers here.")] = None,
    set_: Overrides = None,
) -> None:
    """Measure the temporal loss of teacher samples and real clips, and the motion term's floor that follows."""
    with readable_errors():
        config = train_config(preset, None, videos, data, prompts, None, set_)
        from avd_trainer.evaluation.calibration import calibrate_run, render

        calibration = calibrate_run(config, samples=samples, steps=steps)
        Console().print(render(calibration))
        if json_file is not None:
            json_file.write_text(calibration.model_dump_json(indent=2) + "\n")
