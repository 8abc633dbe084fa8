"""The ``avd`` command."""

from __future__ import annotations

import typer

from avd_trainer.commands.analyze import analyze_app
from avd_trainer.commands.calibrate import calibrate
from avd_trainer.commands.data import data_app
from avd_trainer.commands.demo import demo
from avd_trainer.commands.export import export
from avd_trainer.commands.methods import methods
from avd_trainer.commands.plan import plan
from avd_trainer.commands.sample import sample
from avd_trainer.commands.train import train

app = typer.Typer(
    help="Distil video models into few-step students that keep their colours and their motion.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.add_typer(data_app, name="data")
app.add_typer(analyze_app, name="analyze")

for _command in (train, export, sample, plan, calibrate, demo, methods):
    app.command()(_command)
