"""``python -m avd_trainer`` is the ``avd`` command."""

from avd_trainer.cli import app

app()
