"""``avd demo``: two students side by side."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from avd_trainer.commands.options import MaxSteps, Overrides, Videos, clips_of, overrides_of
from avd_trainer.runtime.terminal import readable_errors, say
from avd_trainer.runtime.threads import describe_threads


def demo(
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for everything that the demo writes.")],
    videos: Videos = None,
    max_steps: MaxSteps = None,
    set_: Overrides = None,
) -> None:
    """Distil two tiny students, by DMD alone and with AVD, and compare them in pictures and numbers.

    One that was stopped goes on by the same command.
    """
    with readable_errors():
        from avd_trainer.config.loading import load_config
        from avd_trainer.runtime.ranks import join_ranks
        from avd_trainer.studies.demo import METRICS, REPORT, DemoConfig, run_demo

        own = {} if videos is None else {**clips_of(videos, None), "calibrate": _to_calibrate(set_ or [])}
        config = load_config(DemoConfig, "tiny", overrides_of(set_, max_steps), own)
        with join_ranks() as ranks:
            if ranks.device.type == "cpu":
                say(describe_threads())
            metrics = run_demo(config, output, ranks)
        if metrics is None:
            say(f"Stopped on request, saved in {output}. Run the same command again to go on.")
            return
        table = Table("", "saturation", "temporal loss", "pixel motion", "distance")
        for name, row in metrics.items():
            table.add_row(name, *(f"{value:.4f}" for value in row.model_dump().values()))
        Console().print(table)
        say(f"Pictures: {output / REPORT}, {output}/*.gif. Numbers: {output / METRICS}.")


def _to_calibrate(overrides: list[str]) -> list[str]:
    """What the user's clips decide: values that were chosen for others, unless the user has set them."""
    values = {
        "floor": ("method.motion.floor",),
        "sharpness": ("method.regression.deviation", "method.regression.sharpness"),
    }
    given = tuple(override.partition("=")[0] for override in overrides)
    # Whoever sets a whole section has set what is in it.
    return [
        part
        for part, keys in values.items()
        if not any(key == own or key.startswith(f"{own}.") for key in keys for own in given)
    ]
