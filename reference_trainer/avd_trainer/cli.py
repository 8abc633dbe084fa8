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
from rich.table import Table

from avd_core import NonFiniteError
from avd_trainer.config import TeacherConfig, TrainConfig, VideosData, load_config
from avd_trainer.errors import UserError
from avd_trainer.progress import ProgressBar, console

app = typer.Typer(
    help="Distil video models into few-step students that keep their colours and their motion.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

Output = Annotated[Path, typer.Option("--output", "-o", help="Folder for everything that the run writes.")]
MaxSteps = Annotated[int | None, typer.Option(help="Number of updates, in place of the preset's.")]
Overrides = Annotated[
    list[str] | None,
    typer.Option(
        "--set", metavar="KEY=VALUE", help="Override one value, e.g. objective.regression.weight=0.5. Repeatable."
    ),
]


@app.command()
def train(
    preset: Annotated[str, typer.Argument(help="A preset's name (tiny) or a YAML file.")],
    output: Output,
    max_steps: MaxSteps = None,
    set_: Overrides = None,
) -> None:
    """Distil a student; writes config.yaml, metrics.jsonl and the student's averaged weights."""
    with _readable_errors():
        config = load_config(TrainConfig, preset, _overrides(set_, max_steps))
        from avd_trainer.data.codec import BlockDCTCodec
        from avd_trainer.data.sources import load_clips
        from avd_trainer.models import build_text_embedding, load_transformer
        from avd_trainer.runs import claim_folder
        from avd_trainer.runs import train as run
        from avd_trainer.trainer import Trainer

        claim_folder(output, must_be_new=True)
        teacher = load_transformer(config.teacher)
        clips = load_clips(config.data, BlockDCTCodec()).train
        run(Trainer(config, teacher, clips, build_text_embedding(teacher)), output)
        console.print(f"The student is in {output / 'student'}.")


@app.command()
def demo(
    output: Output,
    videos: Annotated[Path | None, typer.Option(help="Folder of your own videos, used as the real clips.")] = None,
    max_steps: MaxSteps = None,
    set_: Overrides = None,
) -> None:
    """Distil two tiny students, by DMD alone and with AVD, and compare them in pictures and numbers."""
    with _readable_errors():
        config = load_config(TrainConfig, "tiny", _overrides(set_, max_steps))
        if videos is not None:
            config = config.model_copy(update={"data": VideosData(path=videos)})
        from avd_trainer.demo import run_demo

        metrics = run_demo(config, output)
        table = Table("", "saturation", "temporal loss", "motion", "distance")
        for name, row in metrics.items():
            table.add_row(name, *(f"{value:.4f}" for value in row.model_dump().values()))
        Console().print(table)
        Console().print(f"Pictures: {output / 'report.png'}, {output}/*.gif. Numbers: {output / 'metrics.json'}.")


@app.command()
def train_teacher(
    preset: Annotated[str, typer.Argument(help="A preset's name (tiny) or a YAML file.")],
    output: Output,
    max_steps: MaxSteps = None,
    set_: Overrides = None,
) -> None:
    """Train the small teacher that the tiny preset distils, from random weights."""
    with _readable_errors():
        config = load_config(TeacherConfig, preset, _overrides(set_, max_steps))
        import torch

        from avd_trainer.runs import claim_folder
        from avd_trainer.teacher import TeacherTrainer

        claim_folder(output, must_be_new=True)
        trainer = TeacherTrainer(config)
        with ProgressBar("teacher", config.max_steps) as bar:
            for loss in trainer.run():
                bar.advance({"loss": loss})
        with trainer.ema.average_parameters(), torch.no_grad():
            for parameter in trainer.model.parameters():
                parameter.data = parameter.data.bfloat16()  # half the download
            trainer.model.save_pretrained(output, safe_serialization=True)
        console.print(f"The teacher is in {output}.")


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
        console.print(f"[bold red]error:[/] {error}", soft_wrap=True, highlight=False)
        sys.exit(2)


if __name__ == "__main__":
    app()
