"""``avd train``: a run of any method, started or taken up again."""

from __future__ import annotations

import json
from pathlib import Path

from rich.console import Console
from rich.table import Table

from avd_trainer.commands.options import (
    Data,
    MaxSteps,
    Method,
    Output,
    Overrides,
    Preset,
    Prompts,
    Videos,
    train_config,
)
from avd_trainer.runtime.terminal import readable_errors, say


def train(
    preset: Preset,
    output: Output,
    method: Method = None,
    videos: Videos = None,
    data: Data = None,
    prompts: Prompts = None,
    max_steps: MaxSteps = None,
    set_: Overrides = None,
) -> None:
    """Distil a student (or train what --method names), or take up again what the same command began in --output.

    Leaves config.yaml, metrics.jsonl, checkpoints, what was trained, and what the method has to say about it. On
    several GPUs: torchrun --nproc-per-node N -m avd_trainer train ...
    """
    with readable_errors():
        config = train_config(preset, method, videos, data, prompts, max_steps, set_)
        from avd_trainer.runtime.ranks import join_ranks
        from avd_trainer.training.run import EVALUATION
        from avd_trainer.training.run import train as run

        options = config.parallel
        with join_ranks(options.replicate, options.timeout_minutes) as ranks:
            done = run(config, output, ranks)
            first = ranks.first
        if not done:
            say(f"Stopped on request, saved in {output / 'checkpoints'}. Run the same command again to go on.")
            return
        if first and (output / EVALUATION).exists():
            _print_evaluation(output / EVALUATION)
        role = config.method.main_role
        say(f"The {role} is in {output / role}.")


def _print_evaluation(file: Path) -> None:
    table = Table("", file.stem, title="On held-out clips")
    for name, value in json.loads(file.read_text()).items():
        table.add_row(name, f"{value:.4g}")
    Console().print(table)
