"""``avd demo``: two students side by side."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from avd_trainer.commands.options import MaxSteps, Output, Overrides, Videos, clips_of, overrides_of
from avd_trainer.runtime.terminal import readable_errors, say


def demo(output: Output, videos: Videos = None, max_steps: MaxSteps = None, set_: Overrides = None) -> None:
    """Distil two tiny students, by DMD alone and with AVD, and compare them in pictures and numbers."""
    with readable_errors():
        from avd_trainer.config.loading import load_config
        from avd_trainer.runtime.ranks import join_ranks
        from avd_trainer.studies.demo import DemoConfig, run_demo

        config = load_config(DemoConfig, "tiny", overrides_of(set_, max_steps), clips_of(videos, None))

        with join_ranks() as ranks:
            metrics = run_demo(config, output, ranks)
        table = Table("", "saturation", "temporal loss", "pixel motion", "distance")
        for name, row in metrics.items():
            table.add_row(name, *(f"{value:.4f}" for value in row.model_dump().values()))
        Console().print(table)
        say(f"Pictures: {output / 'report.png'}, {output}/*.gif. Numbers: {output / 'metrics.json'}.")
