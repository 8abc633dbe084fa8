"""``avd`` as a person calls it, in the tests' own process."""

from __future__ import annotations

from typer.testing import CliRunner

from avd_trainer.commands.app import app


def run_command(*arguments: object) -> tuple[int, str]:
    """Exit status and everything that was printed, in one line."""
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, " ".join(result.output.split())
