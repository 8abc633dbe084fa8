"""``avd train``: a run of any method, started or taken up again."""

from __future__ import annotations

import json
import os
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

from avd_trainer.commands.options import (
    PRESET_HELP,
    Data,
    MaxSteps,
    Method,
    Overrides,
    Prompts,
    Videos,
    train_config,
)
from avd_trainer.runtime.errors import UserError
from avd_trainer.runtime.terminal import readable_errors, say
from avd_trainer.runtime.threads import describe_threads

if TYPE_CHECKING:
    from avd_trainer.training.config import TrainConfig


def train(
    preset: Annotated[str | None, typer.Argument(help=PRESET_HELP)] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Folder for everything that the run writes.")
    ] = None,
    resume: Annotated[
        Path | None,
        typer.Option(
            metavar="RUN",
            help="In place of PRESET, --method and --output: go on with the run in this folder, with the values that "
            "it was started with. --set changes those that may change, such as max_steps.",
        ),
    ] = None,
    method: Method = None,
    videos: Videos = None,
    data: Data = None,
    prompts: Prompts = None,
    max_steps: MaxSteps = None,
    set_: Overrides = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print all values of the run and what it needs; write nothing.")
    ] = False,
) -> None:
    """Distil a student (or train what --method names), or take up again what the same command began in --output.

    Leaves config.yaml, metrics.jsonl, checkpoints, what was trained, and what the method has to say about it. On
    several GPUs: avd torchrun --nproc-per-node N -m avd_trainer train ...
    """
    with readable_errors():
        source, folder = _source_and_folder(preset, method, output, resume)
        config = train_config(source, method, videos, data, prompts, max_steps, set_)
        if dry_run:
            _show(config, folder)
            return
        for warning in config.method.warnings(config.max_steps, config.student_weights):
            say(f"warning: {warning}")
        from avd_trainer.runtime.ranks import join_ranks
        from avd_trainer.training.folder import EVALUATION
        from avd_trainer.training.run import train as run

        options = config.parallel
        with join_ranks(options.replicate, options.timeout_minutes) as ranks:
            if ranks.device.type == "cpu":
                say(describe_threads())
            done = run(config, folder, ranks)
            first = ranks.first
        if not done:
            say(
                f"Stopped on request, saved in {folder / 'checkpoints'}. Run the same command again to go on, or: "
                f"{_launcher()} train --resume {_quoted(folder)}"
            )
            return
        if first and (folder / EVALUATION).exists():
            _print_evaluation(folder / EVALUATION)
        role = config.method.main_role
        say(f"The {role} is in {folder / role}.")
        if config.logging.tensorboard:
            say(f"Curves: tensorboard --logdir {_quoted(folder)}")
        say(f"Next: {_next_step(role, folder)}")


def _source_and_folder(
    preset: str | None, method: str | None, output: Path | None, resume: Path | None
) -> tuple[str, Path]:
    """Where the configuration is read, and where the run is or will be."""
    if resume is None:
        if preset is None or output is None:
            raise UserError(
                "Expected a preset and an --output, as in avd train tiny --output runs/first, or --resume RUN to go on "
                "with a run. avd presets lists the presets."
            )
        return preset, output
    if preset is not None or method is not None or output is not None:
        raise UserError("--resume takes preset, method and folder from the run: leave PRESET, --method, --output out.")
    from avd_trainer.training.folder import CONFIG, method_of_run

    if method_of_run(resume) is None:
        raise UserError(f"--resume {resume}: there is no run of avd train. Pass the --output folder of one.")
    return str(resume / CONFIG), resume


def _show(config: TrainConfig, folder: Path) -> None:
    from avd_trainer.config.loading import to_yaml
    from avd_trainer.models.roles import check_roles
    from avd_trainer.planning.description import architecture_of
    from avd_trainer.planning.plan import make_plan
    from avd_trainer.planning.render import render
    from avd_trainer.training.folder import check_run

    step = check_run(folder, config)
    say(to_yaml(config.model_dump(mode="json")))
    if config.teacher is None and config.method.transformer_config(None) is None:
        say(f"avd plan is of transformers, so what {config.method.kind} needs is not known.")
    else:
        check_roles(config.method.roles(config.student_weights), architecture_of(config))
        made = make_plan(config, gpus=int(os.environ.get("WORLD_SIZE", "1")))
        Console().print(render(made), highlight=False)
    if step is None:
        begins = "start a new run"
    else:
        begins = f"go on at step {step}" if step < config.max_steps else f"find nothing left to do after step {step}"
    say(f"Nothing is written. Without --dry-run this would {begins} in {folder}.")


def _next_step(role: str, folder: Path) -> str:
    run = _quoted(folder)
    if role == "interpolator":
        return f"avd export RUN --interpolator {run} --output STUDENT, with the --output folder RUN of a student's run"
    if role == "teacher":
        return f"avd train tiny --set teacher={_quoted(folder / role)} --output RUN"
    student = _quoted(folder.with_name(f"{folder.name}-student"))
    return f'avd export {run} --output {student}\nThen: avd sample {student} --prompt "..." --output clip.mp4'


def _launcher() -> str:
    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    return "avd" if ranks == 1 else f"avd torchrun --nproc-per-node {os.environ['LOCAL_WORLD_SIZE']} -m avd_trainer"


def _quoted(path: Path) -> str:
    return shlex.quote(str(path))


def _print_evaluation(file: Path) -> None:
    table = Table("", file.stem, title="On held-out clips")
    for name, value in json.loads(file.read_text()).items():
        table.add_row(name, f"{value:.4g}")
    Console().print(table)
