"""``avd demo``: two students side by side."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

from avd_trainer.commands.options import MaxSteps, Output, Overrides, Videos, train_config
from avd_trainer.runtime.terminal import readable_errors, say

if TYPE_CHECKING:
    pass


def demo(output: Output, videos: Videos = None, max_steps: MaxSteps = None, set_: Overrides = None) -> None:
    """Distil two tiny students, by DMD alone and with AVD, and compare them in pictures and numbers."""
    with readable_errors():
        config = train_config("tiny", videos, None, None, max_steps, set_)
        from avd_trainer.runtime.ranks import join_ranks
        from avd_trainer.studies.demo import run_demo

        with join_ranks() as ranks:
            metrics = run_demo(config, output, ranks)
        table = Table("", "saturation", "temporal loss", "motion", "distance")
        for name, row in metrics.items():
            table.add_row(name, *(f"{value:.4f}" for value in row.model_dump().values()))
        Console().print(table)
        say(f"Pictures: {output / 'report.png'}, {output}/*.gif. Numbers: {output / 'metrics.json'}.")
