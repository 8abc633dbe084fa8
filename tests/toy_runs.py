"""Folders of pretended videos, and a run of toy stages over them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from avd_trainer.data.preparation import prepare
from avd_trainer.data.preparation.engine import Engine
from avd_trainer.data.preparation.journal import Journal
from avd_trainer.data.preparation.local_engine import LocalEngine
from avd_trainer.data.preparation.recipe import Recipe, build_recipe
from avd_trainer.data.preparation.schedule import Schedule, list_videos
from avd_trainer.data.preparation.stage import Outcome
from toy_stages import TOYS, ToyReader

CLIP = {"frames": 5, "fps": 10.0}


def files_of(folder: Path) -> dict[str, bytes]:
    """Everything in a folder, by path."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def toy_recipe(**values: Any) -> Recipe:
    """All toy stages; of clips of half a second."""
    return build_recipe(TOYS, {"clip": CLIP, **values})


class ToyRun(NamedTuple):
    """Toy stages over a folder.

    Attributes:
        videos: The folder.
        output: Of the prepared videos.
        runs: What stages note that they begin.
    """

    videos: Path
    output: Path
    runs: Path

    def add(self, *names: str) -> None:
        """Pretend some videos."""
        for name in names:
            path = self.videos / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(name.encode() * 3)

    def __call__(
        self,
        recipe: Recipe | None = None,
        *,
        stages: Sequence[str] = ("brightness", "contrast"),
        clips: Sequence[str] | None = None,
        workers: int = 1,
        on_file: Callable[[], None] = lambda: None,
        retry: bool = False,
        engine: type[Engine[Any]] = LocalEngine,
    ) -> Mapping[tuple[str, str], Outcome]:
        """Run, and give the outcomes of each row and stage; rows are named by file and start."""
        recipe = recipe or toy_recipe()
        with Journal(self.output) as journal:
            paths = list_videos(self.videos)
            schedule = Schedule(journal, recipe, self.videos, paths, stages, clips, on_file, retry=retry)
            engine(recipe, self.output, workers, open_reader=ToyReader).run(schedule)
            names = {file.sha256[:16]: file.path for file in journal.files() if file.sha256}
            return {
                (names[row[:16]] + (f"@{int(row.split('-')[1])}" if "-" in row else ""), stage): outcome
                for stage, chosen in recipe.stages.items()
                for row, outcome, _ in journal.outcomes(stage, chosen.digest)
                if row[:16] in names
            }

    def prepare(
        self,
        recipe: Recipe | None = None,
        *,
        workers: int = 1,
        gpus: int = 0,
        sample: float | None = None,
        part: tuple[int, int] | None = None,
        engine: type[Engine[Any]] = LocalEngine,
    ) -> prepare.Prepared:
        """From the folder to shards."""
        who = prepare.Workers(workers, gpus, ToyReader, engine)
        return prepare.prepare(self.videos, self.output, recipe or toy_recipe(), who, sample=sample, part=part)

    def lines(self) -> int:
        """How many things were begun."""
        return self.runs.read_text().count("\n") if self.runs.exists() else 0

    def begun(self) -> Counter[str]:
        """How often each was begun since the last call: ``"brightness a.mp4 500"``."""
        lines = self.runs.read_text().splitlines() if self.runs.exists() else []
        self.runs.unlink(missing_ok=True)
        return Counter(line.strip() for line in lines)
