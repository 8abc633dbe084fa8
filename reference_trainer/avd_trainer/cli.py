"""The ``avd`` command."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.logging import RichHandler
from rich.markup import escape
from rich.table import Table

from avd_core import NonFiniteError
from avd_trainer.config import TeacherConfig, TrainConfig, VideosData, load_config
from avd_trainer.errors import UserError
from avd_trainer.progress import console

app = typer.Typer(
    help="Distil video models into few-step students that keep their colours and their motion.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

Preset = Annotated[str, typer.Argument(help="A preset's name (tiny) or a YAML file.")]
Output = Annotated[Path, typer.Option("--output", "-o", help="Folder for everything that the run writes.")]
Videos = Annotated[Path | None, typer.Option(help="Folder of your own videos, used as the real clips.")]
MaxSteps = Annotated[int | None, typer.Option(help="Number of updates, in place of the preset's.")]
Overrides = Annotated[
    list[str] | None,
    typer.Option(
        "--set", metavar="KEY=VALUE", help="Override one value, e.g. objective.regression.weight=0.5. Repeatable."
    ),
]


@app.command()
def train(
    preset: Preset, output: Output, videos: Videos = None, max_steps: MaxSteps = None, set_: Overrides = None
) -> None:
    """Distil a student; writes config.yaml, metrics.jsonl, findings.json and the student's averaged weights."""
    with _readable_errors():
        config = _train_config(preset, videos, max_steps, set_)
        from avd_trainer.data.codec import BlockDCTCodec
        from avd_trainer.data.sources import load_clips
        from avd_trainer.models import build_text_embedding, load_transformer
        from avd_trainer.runs import claim_new_folder
        from avd_trainer.runs import train as run
        from avd_trainer.trainer import Trainer

        claim_new_folder(output)
        teacher = load_transformer(config.teacher)
        clips = load_clips(config.data, BlockDCTCodec()).train
        run(Trainer(config, teacher, clips, build_text_embedding(teacher)), output)
        _say(f"The student is in {output / 'student'}.")


@app.command()
def demo(output: Output, videos: Videos = None, max_steps: MaxSteps = None, set_: Overrides = None) -> None:
    """Distil two tiny students, by DMD alone and with AVD, and compare them in pictures and numbers."""
    with _readable_errors():
        config = _train_config("tiny", videos, max_steps, set_)
        from avd_trainer.demo import run_demo

        metrics = run_demo(config, output)
        table = Table("", "saturation", "temporal loss", "motion", "distance")
        for name, row in metrics.items():
            table.add_row(name, *(f"{value:.4f}" for value in row.model_dump().values()))
        Console().print(table)
        _say(f"Pictures: {output / 'report.png'}, {output}/*.gif. Numbers: {output / 'metrics.json'}.")


@app.command()
def train_teacher(preset: Preset, output: Output, max_steps: MaxSteps = None, set_: Overrides = None) -> None:
    """Train the small teacher that the tiny preset distils, from random weights."""
    with _readable_errors():
        config = load_config(TeacherConfig, preset, _overrides(set_, max_steps))
        from avd_trainer.runs import claim_new_folder, train_teacher
        from avd_trainer.teacher import TeacherTrainer

        claim_new_folder(output)
        train_teacher(TeacherTrainer(config), output)
        _say(f"The teacher is in {output}.")


def _train_config(preset: str, videos: Path | None, max_steps: int | None, set_: list[str] | None) -> TrainConfig:
    config = load_config(TrainConfig, preset, _overrides(set_, max_steps))
    return config if videos is None else config.model_copy(update={"data": VideosData(path=videos)})


def _say(message: str) -> None:
    Console().print(escape(message), soft_wrap=True, highlight=False)


def _overrides(set_: list[str] | None, max_steps: int | None) -> list[str]:
    return [*(set_ or []), *([] if max_steps is None else [f"max_steps={max_steps}"])]


@contextmanager
def _readable_errors() -> Iterator[None]:
    """Log to the terminal, and print a person's mistake as a message, not as a traceback."""
    handler = RichHandler(console=console, show_path=False, show_time=False)
    logging.basicConfig(level=logging.WARNING, format="%(message)s", handlers=[handler])
    try:
        yield
    except (UserError, NonFiniteError) as error:
        console.print(f"[bold red]error:[/] {escape(str(error))}", soft_wrap=True, highlight=False)
        sys.exit(2)
