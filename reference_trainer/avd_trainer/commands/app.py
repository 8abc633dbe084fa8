"""The ``avd`` command."""

from __future__ import annotations

import platform
from importlib.metadata import version
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from avd_trainer.commands.analyze import analyze_app
from avd_trainer.commands.calibrate import calibrate
from avd_trainer.commands.compare import compare
from avd_trainer.commands.data import data_app
from avd_trainer.commands.demo import demo
from avd_trainer.commands.evaluate import evaluate
from avd_trainer.commands.export import export
from avd_trainer.commands.methods import methods
from avd_trainer.commands.plan import plan
from avd_trainer.commands.presets import presets
from avd_trainer.commands.sample import sample
from avd_trainer.commands.study import study
from avd_trainer.commands.torchrun import SETTINGS, torchrun
from avd_trainer.commands.train import train
from avd_trainer.commands.vbench import vbench_app
from avd_trainer.runtime.terminal import say


class Commands(TyperGroup):
    """Has commands of two words as well, which come before one of their first word: ``evaluate vbench``."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        words = " ".join(args[:2])
        return super().resolve_command(ctx, [words, *args[2:]] if words in self.commands else args)


app = typer.Typer(
    cls=Commands,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.add_typer(data_app, name="data")
app.add_typer(analyze_app, name="analyze")

for _command in (train, export, sample, compare, evaluate, plan, calibrate, demo, study, methods, presets):
    app.command()(_command)
app.add_typer(vbench_app, name="evaluate vbench")
app.command(context_settings=SETTINGS)(torchrun)


def _print_version(asked: bool) -> None:
    if asked:
        # From what is installed: importing PyTorch to ask it takes seconds.
        say(f"avd-core {version('avd-core')}, torch {version('torch')}, Python {platform.python_version()}")
        raise typer.Exit


@app.callback()
def _main(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print versions and exit.")
    ] = False,
) -> None:
    """Distil video models into few-step students that keep their colours and their motion."""
