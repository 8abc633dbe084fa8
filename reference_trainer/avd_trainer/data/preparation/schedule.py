"""What is still to be done, file by file; the journal alone says it, so a run that was killed goes on by itself."""

from __future__ import annotations

import hashlib
import logging
from collections import deque
from collections.abc import Callable, Collection, Iterable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path

from avd_trainer.data.decoding import VIDEO_SUFFIXES
from avd_trainer.data.preparation.journal import FileState, Journal, KnownFile
from avd_trainer.data.preparation.recipe import Chosen, Recipe
from avd_trainer.data.preparation.stage import SPAN, Done, Failed, Row, Span, Values
from avd_trainer.data.preparation.worker import (
    DECODING,
    HASHING,
    Begun,
    Changed,
    Finished,
    Found,
    Halted,
    Hashed,
    Message,
    RowTask,
    Task,
    arrays_path,
)
from avd_trainer.runtime.errors import UserError

logger = logging.getLogger(__name__)


def list_videos(folder: Path) -> list[str]:
    """Paths, relative to ``folder``, of everything below it that is named like a video, sorted.

    Folders of such a name and links that lead nowhere are among them, so that they are named with a reason rather than
    passed over.

    Raises:
        UserError: If there is none.
    """
    if not folder.is_dir():
        raise UserError(f"--videos {folder} is not a folder. Pass the folder that holds your video files.")
    paths = sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.suffix.lower() in VIDEO_SUFFIXES)
    if not paths:
        raise UserError(f"--videos {folder} holds no video files. Looked for {', '.join(sorted(VIDEO_SUFFIXES))}.")
    return paths


def part_of(paths: Iterable[str], index: int, count: int) -> list[str]:
    """The files of one of ``count`` parts. Which part a file is in depends on its path alone."""
    return [path for path in paths if _number(path) % count == index]


def sample_of(paths: Sequence[str], share: float) -> list[str]:
    """A share of files, at least one; the same ones each time, and all of them in any larger share."""
    count = max(1, round(share * len(paths)))
    return sorted(sorted(paths, key=lambda path: (_number(path), path))[:count])


def clip_id(sha256: str, span: Span) -> str:
    """Key of all that is recorded about a clip; it sorts by time within a file."""
    return f"{sha256[:16]}-{span.start:09d}-{span.end:09d}"


class Schedule:
    """Hands out tasks, and carries what they find to the journal.

    A file's next task is planned from the journal when the one before has ended, however it ended.

    Args:
        journal: Open for writing.
        recipe: Stages and settings.
        videos: Folder of the files.
        paths: Relative to it.
        stages: Names of the clip stages to run; stages of files always run.
        clips: Run them only for these clips; None for all.
        on_file: Called for each file with which nothing is left to do.
        look: Whether to look for files that changed. Without it, a file is looked at only if something is to be done
            with it, and left alone if it is not the one that the journal knows.
    """

    def __init__(
        self,
        journal: Journal,
        recipe: Recipe,
        videos: Path,
        paths: Sequence[str],
        stages: Collection[str],
        clips: Collection[str] | None = None,
        on_file: Callable[[], None] = lambda: None,
        *,
        look: bool = True,
    ) -> None:
        self._journal, self._recipe, self._videos = journal, recipe, videos
        self._of_files = list(recipe.of_files())
        self._of_clips = [chosen for chosen in recipe.stages.values() if chosen.stage.name in stages]
        self._clips, self._on_file, self._look = clips, on_file, look
        self._waiting = deque(paths)
        self._tried: set[tuple[str, str]] = set()
        """Of this run: what failed, and is to be tried again by the next one."""

    def take(self) -> Task | None:
        """The next task; None if there is none but those that are in work."""
        while self._waiting:
            path = self._waiting.popleft()
            task = self._plan(path)
            if task is not None:
                return task
            self._on_file()
        return None

    def together(self) -> AbstractContextManager[None]:
        """Within it, what is heard is recorded at its end, all of it or nothing."""
        return self._journal.transaction()

    def hear(self, task: Task, message: Message) -> None:
        """Take in what a worker tells of a task.

        Raises:
            UserError: If nothing can go on.
        """
        name = str(task.path.relative_to(self._videos))
        match message:
            case Hashed(state, sha256, failed):
                self._add_file(KnownFile(name, state, sha256, failed))
            case Found(row, stage, outcome, seconds):
                self._record(row, stage, outcome, seconds)
            case Changed():
                logger.warning("Left out %s: it changed while it was read. Run the same command again.", name)
                self._on_file()
            case Finished():
                self._waiting.appendleft(name)
            case Halted(reason):
                raise UserError(reason)

    def lose(self, task: Task, begun: Begun, reason: str) -> None:
        """Take in that a worker is gone, or was ended; the rest of the file is planned anew.

        Args:
            task: What it did.
            begun: What it had begun last.
            reason: What became of it: "crashed with SIGSEGV".
        """
        name = str(task.path.relative_to(self._videos))
        logger.warning("%s: %s %s.", name, begun.doing, reason)
        if begun.doing == HASHING:
            self._add_file(KnownFile(name, FileState.at(task.path), None, f"{begun.doing} {reason}"))
        rows = [row.row.id for row in task.rows]
        # A decoder that cannot be trusted costs the rest of its file, a stage one row.
        lost = rows[rows.index(begun.row) :] if begun.doing == DECODING else [begun.row]
        for row in task.rows:
            for stage in set(begun.stages) & set(row.stages):
                if row.row.id in lost:
                    self._record(row.row.id, stage, Failed(f"{begun.doing} {reason}"), 0.0)
        self._waiting.appendleft(name)

    def _plan(self, name: str) -> Task | None:
        path = self._videos / name
        known = self._journal.file(name)
        if known is None or (self._look and known.state != FileState.at(path)):
            return Task(path)
        if known.sha256 is None:
            return Task(path) if self._look and (name, "") not in self._tried else None
        task = self._plan_rows(path, known.state, known.sha256)
        if task is not None and known.state != FileState.at(path):
            logger.warning("Left out %s: it is not the file that was prepared. Prepare the videos again.", path)
            return None
        return task

    def _plan_rows(self, path: Path, state: FileState, sha256: str) -> Task | None:
        row = Row(sha256, path, sha256, None, {})
        results, pending = self._look_up(row.id, self._of_files, {})
        if pending:
            return Task(path, state, (RowTask(row._replace(results=results), pending),))
        rows = []
        for start, end in results.get(SPAN, {}).get("clips", []):
            clip = row._replace(id=clip_id(row.sha256, Span(start, end)), span=Span(start, end))
            if self._clips is None or clip.id in self._clips:
                found, pending = self._look_up(clip.id, self._of_clips, results)
                if pending:
                    rows.append(RowTask(clip._replace(results=found), pending))
        return Task(path, state, tuple(rows)) if rows else None

    def _look_up(
        self, row: str, stages: Sequence[Chosen], before: dict[str, Values]
    ) -> tuple[dict[str, Values], tuple[str, ...]]:
        """Results of a row, those of ``before`` among them, and the names of the stages that are still to run."""
        results = dict(before)
        pending: list[str] = []
        for chosen in stages:
            name = chosen.stage.name
            for read in chosen.stage.reads:
                other = self._recipe.stages[read]
                if read not in results and other not in stages:  # of an earlier pass over clips
                    outcome = self._journal.outcome(read, other.digest, row)
                    if isinstance(outcome, Done):
                        results[read] = outcome.values
            outcome = self._journal.outcome(name, chosen.digest, row)
            lost = chosen.stage.makes_arrays and not self._arrays(chosen, row).is_file()
            if isinstance(outcome, Done) and not lost:
                results[name] = outcome.values
                continue
            to_run = not isinstance(outcome, Failed) or (outcome.again and (row, name) not in self._tried)
            if to_run and all(read in results or read in pending for read in chosen.stage.reads):
                pending.append(name)
        return results, tuple(pending)

    def _arrays(self, chosen: Chosen, row: str) -> Path:
        return arrays_path(self._journal.folder, chosen.stage.name, chosen.digest, row)

    def _add_file(self, file: KnownFile) -> None:
        self._tried.add((file.path, ""))
        self._journal.add_file(file)

    def _record(self, row: str, stage: str, outcome: Done | Failed, seconds: float) -> None:
        if isinstance(outcome, Failed) and outcome.again:
            self._tried.add((row, stage))
        digest = "" if stage == DECODING else self._recipe.stages[stage].digest
        self._journal.record(stage, digest, row, outcome, seconds)


def _number(path: str) -> int:
    return int.from_bytes(hashlib.sha256(path.encode("utf-8", "surrogateescape")).digest()[:8], "big")
