"""What one process does: it runs stages for the rows of one file, and tells what it begins and what it found.

It knows no engine: it tells messages, and whoever runs it carries them to the journal.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
from av.error import FFmpegError
from safetensors.numpy import save

from avd_trainer.data.decoding import reason
from avd_trainer.data.preparation.clip_reader import OpenReader, Reader, VideoReader
from avd_trainer.data.preparation.file_scan import FileScan, KeptFrames
from avd_trainer.data.preparation.journal import FileState
from avd_trainer.data.preparation.recipe import Chosen, Recipe
from avd_trainer.data.preparation.stage import (
    SPAN,
    ClipStage,
    Done,
    Failed,
    FileStage,
    FrameRequest,
    Frames,
    Outcome,
    Row,
    ScanStage,
    Stage,
    Values,
)
from avd_trainer.runtime.files import write_bytes

HASHING = "reading"
DECODING = "decoding"
LOADING = "loading"
"""What a process does besides stages, in their names' place."""
_HASHING_LIMIT = 3600.0
_LOADING_LIMIT = 900.0
_CHUNK = 2**20
_SECONDS_BETWEEN_SIGNS = 5.0
_SHARE_KEPT = 1 / 16
"""Of the memory that a process may take, what kept frames may."""
_NO_FRAMES: Frames = np.zeros((0, 0, 0, 3), dtype=np.uint8)


class RowTask(NamedTuple):
    """Stages to run for a row.

    Attributes:
        row: With the results of all stages that ran before.
        stages: Names, in the recipe's order.
    """

    row: Row
    stages: tuple[str, ...]


class Task(NamedTuple):
    """Work on one file.

    Attributes:
        path: The file.
        state: Of the file whose rows these are; work ends if it changes. None to find out its state and its SHA-256.
        rows: The file itself, or clips of it in order of time.
        ahead: Names of stages that clips of the file will need afterwards: while the file is decoded, frames are kept
            for them.
    """

    path: Path
    state: FileState | None = None
    rows: tuple[RowTask, ...] = ()
    ahead: tuple[str, ...] = ()


class Begun(NamedTuple):
    """Something begins that may not end.

    Attributes:
        row: Of what; the empty string for the file as a whole.
        stages: For which stages; several are decoded for at once.
        doing: A stage's name, :data:`HASHING`, :data:`DECODING` or :data:`LOADING`.
        limit: Seconds that it may take.
        weights: Bytes of memory that the process took for weights up to now.
    """

    row: str
    stages: tuple[str, ...]
    doing: str
    limit: float
    weights: int = 0


class Hashed(NamedTuple):
    """The bytes of a file are known.

    Attributes:
        state: When they were read.
        sha256: In hex; None if they could not be read.
        failed: Why not.
    """

    state: FileState
    sha256: str | None
    failed: str | None = None


class Found(NamedTuple):
    """A stage has run.

    Attributes:
        key: For which row, as ``Chosen.key`` has it.
        stage: Its name, or :data:`DECODING`.
        outcome: Without arrays, which are on disk already.
        seconds: That it took.
    """

    key: str
    stage: str
    outcome: Outcome
    seconds: float


class Changed(NamedTuple):
    """The file is not the one that it was; nothing more is found in it."""


class Finished(NamedTuple):
    """The task is done."""


class Halted(NamedTuple):
    """Nothing can go on.

    Attributes:
        reason: Such as a full disk.
    """

    reason: str


class Lost(NamedTuple):
    """The process is gone, or was ended; told by whoever looks after it.

    Attributes:
        begun: What it had begun last; None if nothing.
        reason: What became of it: "crashed with SIGSEGV".
        again: As of :class:`Failed`.
        limit: Likewise.
    """

    begun: Begun | None
    reason: str
    again: bool = False
    limit: tuple[str, float] | None = None


class Abandoned(NamedTuple):
    """The machine is gone, through no fault of the file; told by whoever looks after it.

    Attributes:
        reason: What is known of it.
    """

    reason: str


Message = Begun | Hashed | Found | Changed | Finished | Halted | Lost | Abandoned
Ending = Changed | Finished | Halted | Lost | Abandoned
"""The last message of a task."""


def arrays_path(folder: Path, stage: str, digest: str, key: str) -> Path:
    """Where the arrays of a row lie."""
    return folder / "arrays" / stage / digest / key[:2] / f"{key}.safetensors"


def own_memory(pid: int | None = None) -> int:
    """Bytes of main memory that a process, or else this one, holds for itself alone; 0 if it is gone.

    Files that are mapped, such as weights, do not count: the system takes their pages back where it needs some.
    """
    import psutil

    try:
        memory = psutil.Process(pid).memory_info()
    except psutil.NoSuchProcess:
        return 0
    return int(memory.rss - getattr(memory, "shared", 0))


class _Source(NamedTuple):
    """Where frames of clips come from: what was kept, and else the file."""

    reader: Reader
    kept: KeptFrames | None


class Worker:
    """Runs stages. Stages are built when they are first needed, and kept.

    Args:
        recipe: Stages and settings.
        folder: Of the prepared videos, for arrays.
        tell: Carries messages.
        open_reader: How clips are read.
    """

    def __init__(
        self, recipe: Recipe, folder: Path, tell: Callable[[Message], None], open_reader: OpenReader = VideoReader
    ) -> None:
        self._recipe, self._folder, self._tell, self._open_reader = recipe, folder, tell, open_reader
        self._stages: dict[str, Stage[Any]] = {}
        self._weights = 0
        self._kept: tuple[Path, FileState, KeptFrames] | None = None
        self._decoding = Begun("", (), DECODING, 0.0)
        self._last_sign = 0.0

    def work(self, task: Task) -> None:
        """Do a task, telling of each step; the last message is :class:`Finished`, or says why there is none."""
        try:
            if task.state is None:
                self._hash(task.path)
            else:
                kept = self._kept_of(task.path, task.state)
                with self._open_reader(task.path, self._recipe.head.clip, self._show_life) as reader:
                    for row in task.rows:
                        self._run(row, task, _Source(reader, kept))
                        if kept is not None and row.row.span is not None:
                            kept.drop(row.row.span)
        except _OtherFileError:
            self._tell(Changed())
        except _CannotLoadError as error:
            self._tell(Halted(str(error)))
        except OSError as error:
            # Of a stage or a video it would have been an outcome: this is the folder that is written to.
            self._tell(
                Halted(
                    f"{self._folder} cannot be written to: {error.strerror or error}. What was recorded is intact: "
                    "free some space there, then run the same command again."
                )
            )
        else:
            self._tell(Finished())

    def _hash(self, path: Path) -> None:
        self._tell(Begun("", (), HASHING, _HASHING_LIMIT, self._weights))
        state = FileState.at(path)
        if (wrong := _no_file(path)) is not None:
            self._tell(Hashed(state, None, wrong))
            return
        try:
            digest = hashlib.sha256()
            with path.open("rb") as file:
                while chunk := file.read(_CHUNK):
                    digest.update(chunk)
        except OSError as error:
            self._tell(Hashed(state, None, reason(error)))
            return
        _expect(path, state)
        self._tell(Hashed(state, digest.hexdigest()))

    def _run(self, row_task: RowTask, task: Task, source: _Source) -> None:
        """Run the stages of a row, wave by wave: each wave needs results of earlier ones alone."""
        results = dict(row_task.row.results)
        with FileScan(task.path, lambda: self._keep(task, row_task.row._replace(results=results))) as scan:
            self._run_waves(row_task, task, source, scan, results)

    def _run_waves(
        self, row_task: RowTask, task: Task, source: _Source, scan: FileScan, results: dict[str, Values]
    ) -> None:
        assert task.state is not None
        pending = [self._recipe.stages[name] for name in row_task.stages]
        while ready := [chosen for chosen in pending if all(read in results for read in chosen.stage.reads)]:
            wave = [
                (chosen, row, self._request(chosen, row))
                for chosen in ready
                for row in [_with_results(row_task.row, chosen, results)]
            ]
            # What needs no frames comes first: its results may say which frames others want.
            wave = [each for each in wave if not isinstance(each[2], FrameRequest)] or wave
            inputs = self._decode(row_task.row, [each for each in wave if isinstance(each[2], FrameRequest)], source)
            for chosen, row, request in wave:
                name = chosen.stage.name
                given: Frames | FileScan | Failed
                if issubclass(chosen.stage, ScanStage):
                    given = scan
                else:
                    given = request if isinstance(request, Failed) else inputs.get(name, _NO_FRAMES)
                outcome, seconds = (given, 0.0) if isinstance(given, Failed) else self._run_stage(chosen, row, given)
                # What was found in a file that changed meanwhile is of neither of the two.
                _expect(row.path, task.state)
                self._tell(Found(chosen.key(row.id, row.caption), name, outcome, seconds))
                if isinstance(outcome, Done):
                    results[name] = outcome.values
            done = {chosen.stage.name for chosen, *_ in wave}
            pending = [chosen for chosen in pending if chosen.stage.name not in done]

    def _request(self, chosen: Chosen, row: Row) -> FrameRequest | Failed | None:
        stage = self._stage(chosen, row)
        try:
            request = stage.frames(row) if isinstance(stage, ClipStage) else None
            if request is not None:
                frames, wanted = self._recipe.head.clip.frames, sorted(request.indices)
                if not wanted or wanted[0] < 0 or wanted[-1] >= frames:
                    raise ValueError(f"it wants frames {wanted}; a clip has {frames}, counted from 0")
        except Exception as error:
            return Failed(_words(error))
        return request

    def _decode(
        self, row: Row, wanted: Sequence[tuple[Chosen, Row, Any]], source: _Source
    ) -> Mapping[str, Frames | Failed]:
        if not wanted:
            return {}
        names = tuple(chosen.stage.name for chosen, *_ in wanted)
        requests = [request for *_, request in wanted]
        assert row.span is not None
        self._decoding = Begun(row.id, names, DECODING, self._recipe.head.decode_limit, self._weights)
        self._begin(self._decoding)
        began = time.monotonic()
        try:
            frames = None if source.kept is None else source.kept.take(row.span, requests)
            decoded = frames is None
            if frames is None:
                frames = source.reader.read(row.span, requests)
        except (FFmpegError, OSError, ValueError) as error:
            return dict.fromkeys(names, Failed(f"its frames cannot be decoded: {reason(error)}"))
        if decoded:
            self._tell(Found(row.id, DECODING, Done({}), time.monotonic() - began))
        return dict(zip(names, frames, strict=True))

    def _keep(self, task: Task, row: Row) -> KeptFrames:
        """What keeps frames of a file for the stages ahead of its clips; ``row`` has all results so far."""
        requests = []
        for chosen in (self._recipe.stages[name] for name in task.ahead):
            if all(read in row.results for read in chosen.stage.reads):
                request = self._request(chosen, _with_results(row, chosen, row.results))
                if isinstance(request, FrameRequest):
                    requests.append(request)
        span = self._recipe.stages[SPAN]
        clips_ahead = cast(FileStage[Any], self._stage(span, row)).clips_ahead
        head = self._recipe.head
        kept = KeptFrames(head.clip.fps, requests, clips_ahead, round(head.memory_gb * _SHARE_KEPT * 1e9))
        assert task.state is not None
        self._kept = (task.path, task.state, kept)
        return kept

    def _kept_of(self, path: Path, state: FileState) -> KeptFrames | None:
        """What was kept when the file was scanned, if it was the last one; what was kept of another file goes."""
        if self._kept is not None and self._kept[:2] != (path, state):
            self._kept = None
        return None if self._kept is None else self._kept[2]

    def _run_stage(self, chosen: Chosen, row: Row, given: Frames | FileScan) -> tuple[Outcome, float]:
        name = chosen.stage.name
        stage = self._stage(chosen, row)
        self._begin(Begun(row.id, (name,), name, chosen.settings.time_limit, self._weights))
        began = time.monotonic()
        outcome = _outcome(stage, row, given)
        if isinstance(outcome, Done) and chosen.stage.makes_arrays:
            path = arrays_path(self._folder, name, chosen.digest, chosen.key(row.id, row.caption))
            # Bytes first: safetensors' own errors do not say whether the disk is full.
            write_bytes(path, save({array: np.ascontiguousarray(of) for array, of in outcome.arrays.items()}))
            outcome = Done(outcome.values)
        return outcome, time.monotonic() - began

    def _stage(self, chosen: Chosen, row: Row) -> Stage[Any]:
        name = chosen.stage.name
        if name not in self._stages:
            stage = chosen.stage(chosen.settings, self._recipe.head.clip)
            self._begin(Begun(row.id, (name,), LOADING, _LOADING_LIMIT))
            before = own_memory()
            try:
                stage.load()
            except Exception as error:
                raise _CannotLoadError(
                    f"{name} cannot load what it needs: {_words(error)}. What was recorded is intact: mend this, then "
                    f"run the same command again, or leave {name} out by --set {name}=off."
                ) from error
            self._weights += max(0, own_memory() - before)
            self._stages[name] = stage
        return self._stages[name]

    def _begin(self, begun: Begun) -> None:
        self._last_sign = time.monotonic()
        self._tell(begun)

    def _show_life(self) -> None:
        """While a reader skips frames, which takes long in a long film."""
        if time.monotonic() - self._last_sign > _SECONDS_BETWEEN_SIGNS:
            self._begin(self._decoding)


class _OtherFileError(Exception):
    """A file is not the one that it was."""


class _CannotLoadError(Exception):
    """A stage lacks something; no row can be blamed."""


def _expect(path: Path, state: FileState) -> None:
    if FileState.at(path) != state:
        raise _OtherFileError


def _no_file(path: Path) -> str | None:
    if path.is_symlink() and not path.exists():
        return f"it is a link that leads nowhere (to {path.readlink()})"
    if path.is_dir():
        return "it is a folder with the name of a video"
    if not path.exists():
        return "it is not there; a name that is shown with \\x is not UTF-8: rename the file"
    return None if path.is_file() else "it is no regular file, such as a pipe, which might never end"


def _with_results(row: Row, chosen: Chosen, results: Mapping[str, Values]) -> Row:
    """The row as a stage sees it: with the results that it reads."""
    return row._replace(results={read: results[read] for read in chosen.stage.reads})


def _outcome(stage: Stage[Any], row: Row, given: Frames | FileScan) -> Outcome:
    try:
        if isinstance(stage, FileStage):
            outcome: Outcome = stage.run(row)
        else:
            outcome = cast(ClipStage[Any] | ScanStage[Any], stage).run(row, cast(Any, given))
        if isinstance(outcome, Done):
            json.dumps(outcome.values, allow_nan=False)
    except Exception as error:
        return Failed(_words(error))
    return outcome


def _words(error: Exception) -> str:
    """What went wrong; with its type for errors that were not meant for people, whose words alone say little."""
    if isinstance(error, FFmpegError | OSError | ValueError) and str(error):
        return reason(error)
    return f"{type(error).__name__}: {error}"
