"""Data preparation without processes of its own, for tests of what comes out of it: it starts at once."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from avd_trainer.data.preparation import prepare
from avd_trainer.data.preparation.clip_reader import OpenReader, VideoReader
from avd_trainer.data.preparation.recipe import Recipe
from avd_trainer.data.preparation.schedule import Schedule
from avd_trainer.data.preparation.worker import Worker


class EngineInThisProcess:
    """Does one task after another; what crashes, hangs or eats memory takes the tests with it."""

    def __init__(
        self, recipe: Recipe, folder: Path, workers: int, *, gpus: int = 0, open_reader: OpenReader = VideoReader
    ) -> None:
        self._recipe, self._folder, self._open_reader = recipe, folder, open_reader

    def run(self, schedule: Schedule) -> None:
        worker = Worker(self._recipe, self._folder, lambda message: schedule.hear(task, message), self._open_reader)
        while (task := schedule.take()) is not None:
            worker.work(task)


@contextmanager
def prepared_in_this_process() -> Iterator[None]:
    """Within it, data is prepared so."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prepare, "LocalEngine", EngineInThisProcess)
        yield
