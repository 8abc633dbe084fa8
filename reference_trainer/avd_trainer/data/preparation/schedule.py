"""What is still to be done, file by file; the journal alone says it, so a run that was killed goes on by itself."""

from __future__ import annotations

import logging
import os
from collections import deque
from collections.abc import Callable, Collection, Iterable, Sequence, Set
from contextlib import AbstractContextManager
from pathlib import Path

from avd_trainer.data.decoding import VIDEO_SUFFIXES, reason
from avd_trainer.data.preparation.journal import FileState, Journal, KnownFile, Outcomes, number_of
from avd_trainer.data.preparation.recipe import Chosen, Recipe
from avd_trainer.data.preparation.sidecars import read_sidecars
from avd_trainer.data.preparation.stage import SPAN, Done, Failed, Row, Span, Values
from avd_trainer.data.preparation.worker import (
    DECODING,
    HASHING,
    LOADING,
    Abandoned,
    Changed,
    Finished,
    Found,
    Halted,
    Hashed,
    Lost,
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
    passed over. Likewise names that are not UTF-8, which neither the journal nor shards can hold: they are written with
    backslashes, ``caf\\xe9.mp4``, a name that no file has.

    Raises:
        UserError: If there is none.
    """
    if not folder.is_dir():
        raise UserError(f"--videos {folder} is not a folder. Pass the folder that holds your video files.")
    found = (os.fsencode(p.relative_to(folder)) for p in folder.rglob("*") if p.suffix.lower() in VIDEO_SUFFIXES)
    paths = sorted(name.decode(errors="backslashreplace") for name in found)
    if not paths:
        raise UserError(f"--videos {folder} holds no video files. Looked for {', '.join(sorted(VIDEO_SUFFIXES))}.")
    return paths


def part_of(paths: Iterable[str], index: int, count: int) -> list[str]:
    """The files of one of ``count`` parts. Which part a file is in depends on its path alone."""
    return [path for path in paths if number_of(path) % count == index]


def sample_of(paths: Sequence[str], share: float) -> list[str]:
    """A share of files, at least one; the same ones each time, and all of them in any larger share."""
    count = max(1, round(share * len(paths)))
    return sorted(sorted(paths, key=lambda path: (number_of(path), path))[:count])


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
        tried: What failed in this run, by row and stage, and is not tried again in it; several schedules share it.
        retry: Whether to try again what failed in earlier runs for good.
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
        tried: set[tuple[str, str]] | None = None,
        retry: bool = False,
    ) -> None:
        self._journal, self._recipe, self._videos = journal, recipe, videos
        self._of_files = list(recipe.of_files())
        self._of_clips = [chosen for chosen in recipe.stages.values() if chosen.stage.name in stages]
        self._keys = [(name, chosen.digest) for name, chosen in recipe.stages.items()]
        self._clips, self._on_file, self._look = clips, on_file, look
        self._waiting = deque(paths)
        self._tried = set() if tried is None else tried
        self._retry = retry

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
                self._add_file(_with_sidecars(KnownFile(name, state, sha256, failed), task.path))
            case Found(key, stage, outcome, seconds):
                self._record(key, stage, outcome, seconds)
            case Changed():
                logger.warning("Left out %s: it changed while it was read. Run the same command again.", name)
                self._on_file()
            case Finished():
                self._waiting.appendleft(name)
            case Halted(why):
                raise UserError(why)
            case Abandoned(why):
                logger.warning("Left out %s: %s. Run the same command again.", name, why)
                self._on_file()
            case Lost():
                self._lose(name, task, message)

    def _lose(self, name: str, task: Task, lost: Lost) -> None:
        """Take in that a worker is gone, or was ended; the rest of the file is planned anew."""
        begun, why = lost.begun, lost.reason
        if begun is None:
            raise UserError(f"A worker process {why} before it began to work; what it said stands above.")
        if begun.doing == LOADING:
            raise UserError(
                f"{begun.stages[0]}: a worker process {why} while it loaded what that stage needs. Work with fewer "
                f"processes (--workers), or leave it out by --set {begun.stages[0]}=off."
            )
        logger.warning("%s: %s %s.", name, begun.doing, why)
        if begun.doing == HASHING:
            self._add_file(KnownFile(name, FileState.at(task.path), None, f"{begun.doing} {why}"))
        rows = [row.row.id for row in task.rows]
        # A decoder that cannot be trusted costs the rest of its file, a stage one row.
        gone = rows[rows.index(begun.row) :] if begun.doing == DECODING else [begun.row]
        failed = Failed(f"{begun.doing} {why}", lost.again, lost.limit)
        for row, stages in task.rows:
            for stage in set(begun.stages) & set(stages):
                if row.id in gone:
                    self._record(self._recipe.stages[stage].key(row.id, row.caption), stage, failed, 0.0)
        self._waiting.appendleft(name)

    def _plan(self, name: str) -> Task | None:
        path = self._videos / name
        known = self._journal.file(name)
        if known is None or (self._look and known.state != FileState.at(path)):
            return Task(path)
        if known.sha256 is None:
            return Task(path) if self._look and (name, "") not in self._tried else None
        if self._look and (now := _with_sidecars(known, path)) != known:
            self._add_file(now)
            return self._plan(name)
        task = self._plan_rows(path, known)
        if task is not None and known.state != FileState.at(path):
            logger.warning("Left out %s: it is not the file that was prepared. Prepare the videos again.", path)
            return None
        return task

    def _plan_rows(self, path: Path, file: KnownFile) -> Task | None:
        assert file.sha256 is not None
        found = self._journal.outcomes_of(file.sha256, self._keys)
        row = Row(file.sha256, path, file.sha256, None, {}, file.caption)
        done, pending = self._look_up(row, self._of_files, found, set())
        results = self._results(row, done, found)
        if pending:
            ahead = tuple(chosen.stage.name for chosen in self._of_clips)
            return Task(path, file.state, (RowTask(row._replace(results=results), pending),), ahead)
        rows = []
        for start, end in results.get(SPAN, {}).get("clips", []):
            clip = row._replace(id=clip_id(row.sha256, Span(start, end)), span=Span(start, end))
            if self._clips is None or clip.id in self._clips:
                of_clip, pending = self._look_up(clip, self._of_clips, found, done)
                if pending:
                    values = results | self._results(clip, of_clip - done, found)
                    rows.append(RowTask(clip._replace(results=values), pending))
        return Task(path, file.state, tuple(rows)) if rows else None

    def _look_up(
        self, row: Row, stages: Sequence[Chosen], found: Outcomes, before: Set[str]
    ) -> tuple[set[str], tuple[str, ...]]:
        """Names of the stages whose results a row has, those of ``before`` among them, and of those still to run."""
        done = set(before)
        pending: list[str] = []
        for chosen in stages:
            name, key = chosen.stage.name, chosen.key(row.id, row.caption)
            for read in chosen.stage.reads:
                other = self._recipe.stages[read]
                of_earlier_pass = read not in done and other not in stages
                if of_earlier_pass and found.is_done(read, other.key(row.id, row.caption)):
                    done.add(read)
            if found.is_done(name, key):
                if not chosen.stage.makes_arrays or self._arrays(chosen, key).is_file():
                    done.add(name)
                    continue
                to_run = True
            else:
                failed = found(name, key)
                to_run = not isinstance(failed, Failed) or (
                    (key, name) not in self._tried and self._again(name, failed)
                )
            if to_run and all(read in done or read in pending for read in chosen.stage.reads):
                pending.append(name)
        return done, tuple(pending)

    def _results(self, row: Row, names: Iterable[str], found: Outcomes) -> dict[str, Values]:
        outcomes = {name: found(name, self._recipe.stages[name].key(row.id, row.caption)) for name in names}
        return {name: outcome.values for name, outcome in outcomes.items() if isinstance(outcome, Done)}

    def _again(self, stage: str, failed: Failed) -> bool:
        """Whether what failed in an earlier run is to be tried again."""
        may_more = failed.limit is not None and self._recipe.limit(failed.limit[0], stage) > failed.limit[1]
        return failed.again or self._retry or may_more

    def _arrays(self, chosen: Chosen, key: str) -> Path:
        return arrays_path(self._journal.folder, chosen.stage.name, chosen.digest, key)

    def _add_file(self, file: KnownFile) -> None:
        self._tried.add((file.path, ""))
        self._journal.add_file(file)

    def _record(self, key: str, stage: str, outcome: Done | Failed, seconds: float) -> None:
        if isinstance(outcome, Failed):
            self._tried.add((key, stage))
        digest = "" if stage == DECODING else self._recipe.stages[stage].digest
        self._journal.record(stage, digest, key, outcome, seconds)


def _with_sidecars(file: KnownFile, path: Path) -> KnownFile:
    """With what lies beside it now; a file whose sidecars cannot be read is one that cannot be."""
    if file.sha256 is None:
        return file
    try:
        return file._replace(**read_sidecars(path)._asdict())
    except (OSError, ValueError) as error:
        return KnownFile(file.path, file.state, None, reason(error))
