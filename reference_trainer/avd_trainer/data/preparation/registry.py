"""Which stages there are: every file of ``stages/``. Listing them reads the folder and imports none."""

from __future__ import annotations

import importlib
from functools import cache
from pathlib import Path
from typing import Any

from avd_trainer.data.preparation.stage import Stage


@cache
def list_stages() -> tuple[str, ...]:
    """Names of all stages, by alphabet; the order in which they run and decide is the recipe's."""
    files = (Path(__file__).parent / "stages").glob("*.py")
    return tuple(sorted(file.stem for file in files if file.stem != "__init__"))


def load_stage(name: str) -> type[Stage[Any]]:
    """A stage's class, by one of the names that :func:`list_stages` gives."""
    stage: type[Stage[Any]] = importlib.import_module(f"avd_trainer.data.preparation.stages.{name}").STAGE
    return stage
