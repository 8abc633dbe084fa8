"""What stages found, kept on disk: nothing that is in it is done again.

SQLite, since each outcome is then committed whole or not at all, whatever kills the process or fills the disk, and one
stage's scores are read without the rest. Its rollback journal rather than the write-ahead log, which network file
systems cannot hold. Only one process writes to a journal; parts of a large run have one each, and are merged.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import socket
import sqlite3
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, closing, contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import IO, Any, NamedTuple, Self

from avd_trainer.data.preparation.stage import Done, Failed, Outcome
from avd_trainer.runtime.errors import UserError

VERSION = 2
_PARTS = "journal-*-of-*.sqlite"
_WHOLE = "journal.sqlite"
_TABLES = """
CREATE TABLE IF NOT EXISTS files (
    path TEXT PRIMARY KEY, size INTEGER NOT NULL, modified INTEGER NOT NULL, sha256 TEXT, failed TEXT,
    caption TEXT NOT NULL, licence TEXT
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS outcomes (
    stage TEXT NOT NULL, digest TEXT NOT NULL, row TEXT NOT NULL, outcome TEXT NOT NULL, seconds REAL NOT NULL,
    PRIMARY KEY (stage, digest, row)
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS parts (
    name TEXT PRIMARY KEY, size INTEGER NOT NULL, modified INTEGER NOT NULL
) WITHOUT ROWID;
"""
_DONE = '{"values":'
"""How the text of a result begins, and no other."""
_TAKE_OVER = f"""
INSERT INTO main.outcomes SELECT * FROM part.outcomes WHERE true
ON CONFLICT DO UPDATE SET outcome = excluded.outcome, seconds = excluded.seconds
WHERE outcome NOT LIKE '{_DONE}%' AND excluded.outcome LIKE '{_DONE}%'
"""
"""What a part found, beside what is there: what a stage has done, wherever, is in place of its failures."""


def number_of(path: str) -> int:
    """A number that depends on a file's path alone: it says which files a sample has, and a part."""
    return int.from_bytes(hashlib.sha256(path.encode()).digest()[:8], "big")


class FileState(NamedTuple):
    """How a file looks from outside: while it is the same, so are its bytes.

    Attributes:
        size: In bytes.
        modified: In nanoseconds.
    """

    size: int
    modified: int

    @classmethod
    def at(cls, path: Path) -> FileState:
        """The state now; zeros of what is not there."""
        try:
            status = path.stat()
        except OSError:
            return cls(0, 0)
        return cls(status.st_size, status.st_mtime_ns)


class KnownFile(NamedTuple):
    """A file that was read once.

    Attributes:
        path: Relative to the folder of videos.
        state: When it was read.
        sha256: Of its bytes, in hex; None if it could not be read.
        failed: Why not, if so.
        caption: What the text file beside it said last, or else its name.
        licence: What the files beside it said last; None if nothing.
    """

    path: str
    state: FileState
    sha256: str | None
    failed: str | None
    caption: str = ""
    licence: str | None = None


class Outcomes:
    """What stages found in a file and its clips.

    Args:
        texts: As the journal has them, by stage and row; read where they are asked for.
    """

    def __init__(self, texts: Mapping[tuple[str, str], str]) -> None:
        self._texts = texts

    def is_done(self, stage: str, row: str) -> bool:
        """Whether there is a result."""
        return self._texts.get((stage, row), "").startswith(_DONE)

    def __call__(self, stage: str, row: str) -> Outcome | None:
        """What a stage found for a row, or None if it has not run."""
        text = self._texts.get((stage, row))
        return None if text is None else _outcome(text)


class Journal:
    """A journal on disk; a context manager. One process at a time can write to it; others can read meanwhile.

    Args:
        folder: Of the prepared videos; made if need be.
        part: ``(i, n)`` for the i-th of n parts, which has a journal of its own that begins with what the whole has
            recorded of its files; None for the whole, which takes over what parts have recorded.
        write: Whether to write, or to read alone.

    Raises:
        UserError: If another process writes to it, there is none to read, the file is damaged or of another version, or
            the disk is full.
    """

    def __init__(self, folder: Path, part: tuple[int, int] | None = None, *, write: bool = True) -> None:
        self.folder, self.part, self._writes = folder, part, write
        self.path = folder / (_WHOLE if part is None else f"journal-{part[0]:05d}-of-{part[1]:05d}.sqlite")

    def __enter__(self) -> Self:
        if not self._writes and not self.path.is_file():
            if any(self.folder.glob(_PARTS)):
                raise UserError(
                    f"{self.folder} holds parts alone. Run `avd data prepare` without --shard to join them."
                )
            raise UserError(f"{self.folder} holds no prepared videos. Run `avd data prepare` with it as --output.")
        with ExitStack() as undo:
            if self._writes:
                with self._readable_errors():
                    self.folder.mkdir(parents=True, exist_ok=True)
                    lock = undo.enter_context((self.folder / f"{self.path.stem}.lock").open("a+"))
                self._claim(lock)
            with self._readable_errors():
                self._database = undo.enter_context(closing(_open(self.path, write=self._writes)))
                _expect_version(self._database, "main", self.path)
                if self._writes:
                    self._database.executescript(_TABLES)
                    self._database.execute(f"PRAGMA user_version = {VERSION}")
            if self._writes and self.part is None:
                self._take_over_parts()
            elif self._writes:
                self._begin_with_the_whole()
            self._close = undo.pop_all().close
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._close()

    def files(self) -> Iterator[KnownFile]:
        """All files that were read, by path."""
        for path, size, modified, *rest in self._rows("SELECT * FROM files ORDER BY path"):
            yield KnownFile(path, FileState(size, modified), *rest)

    def file(self, path: str) -> KnownFile | None:
        """A file by its path."""
        for _, size, modified, *rest in self._rows("SELECT * FROM files WHERE path = ?", path):
            return KnownFile(path, FileState(size, modified), *rest)
        return None

    def add_file(self, file: KnownFile) -> None:
        """Record a file, in place of what was recorded of its path."""
        values = (file.path, *file.state, *file[2:])
        self._write("INSERT OR REPLACE INTO files VALUES (?, ?, ?, ?, ?, ?, ?)", values)

    def remove_file(self, path: str) -> None:
        """Forget a file that is no longer there; what stages found in it stays, by its SHA-256."""
        self._write("DELETE FROM files WHERE path = ?", (path,))

    def outcome(self, stage: str, digest: str, row: str) -> Outcome | None:
        """What a stage found for a row, or None if it has not run."""
        found = self._rows(
            "SELECT outcome FROM outcomes WHERE stage = ? AND digest = ? AND row = ?", stage, digest, row
        )
        return next((_outcome(text) for (text,) in found), None)

    def outcomes_of(self, sha256: str, stages: Iterable[tuple[str, str]]) -> Outcomes:
        """What stages, by name and digest, found in a file and its clips; much faster than one by one."""
        # Ids of clips, and keys that depend on a caption, begin with the same 16 digits; g comes behind all of these.
        start = sha256[:16]
        query = "SELECT row, outcome FROM outcomes WHERE stage = ? AND digest = ? AND row >= ? AND row < ?"
        return Outcomes(
            {
                (name, row): text
                for name, digest in stages
                for row, text in self._rows(query, name, digest, start, f"{start}g")
            }
        )

    def outcomes(self, stage: str, digest: str) -> Iterator[tuple[str, Outcome, float]]:
        """Row, outcome and seconds of all rows that a stage has worked on, by row."""
        query = "SELECT row, outcome, seconds FROM outcomes WHERE stage = ? AND digest = ? ORDER BY row"
        for row, text, seconds in self._rows(query, stage, digest):
            yield row, _outcome(text), seconds

    def record(self, stage: str, digest: str, row: str, outcome: Outcome, seconds: float) -> None:
        """Record what a stage found, without its arrays; when this returns, no kill can take it away.

        Raises:
            UserError: If the disk is full; what was recorded before stays.
        """
        values = (stage, digest, row, _text(outcome), seconds)
        self._write("INSERT OR REPLACE INTO outcomes VALUES (?, ?, ?, ?, ?)", values)

    @contextmanager
    def transaction(self) -> Iterator[None]:
        """What is recorded within it is on disk at its end, all of it or, after an error, nothing."""
        with self._readable_errors():
            self._database.execute("BEGIN")
        try:
            yield
            with self._readable_errors():
                self._database.execute("COMMIT")
        except BaseException:
            with suppress(sqlite3.Error):
                self._database.execute("ROLLBACK")
            raise

    def _rows(self, query: str, *values: Any) -> Iterator[Any]:
        with self._readable_errors():
            yield from self._database.execute(query, values)

    def _write(self, statement: str, values: tuple[Any, ...]) -> None:
        with self._readable_errors():
            self._database.execute(statement, values)

    def _claim(self, lock: IO[str]) -> None:
        """Hold the lock until the file is closed, which the system does for a process that is killed."""
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            lock.seek(0)
            raise UserError(
                f"{self.folder} is worked on by {lock.read().strip() or 'another process'}. Wait for it, stop it, or "
                "choose another --output; parts of one run (--shard) can work side by side."
            ) from error
        with self._readable_errors():
            lock.truncate(0)
            lock.write(f"process {os.getpid()} on {socket.gethostname()}\n")
            lock.flush()

    def _begin_with_the_whole(self) -> None:
        """Let a new part know what was found before of its files, in a sample or in the whole, so that it is not done
        again."""
        whole = self.folder / _WHOLE
        if not whole.is_file() or list(self._rows("SELECT 1 FROM files UNION SELECT 1 FROM outcomes LIMIT 1")):
            return
        assert self.part is not None
        index, count = self.part
        with self._attached(whole, "whole"), self._readable_errors(), self.transaction():
            self._database.create_function("is_mine", 1, lambda path: number_of(path) % count == index)
            self._database.execute("INSERT INTO main.files SELECT * FROM whole.files WHERE is_mine(path)")
            # Keys of a file's outcomes, and of its clips', begin with the same 16 digits of its SHA-256.
            self._database.execute(
                "INSERT INTO main.outcomes SELECT * FROM whole.outcomes "
                "WHERE substr(row, 1, 16) IN (SELECT substr(sha256, 1, 16) FROM main.files)"
            )

    @contextmanager
    def _attached(self, path: Path, name: str) -> Iterator[None]:
        """Another journal under a name of the database; errors in it are told as of it."""
        with ExitStack() as undo:
            with self._readable_errors(path):
                self._database.execute("ATTACH ? AS " + name, (str(path),))
                undo.callback(self._database.execute, f"DETACH {name}")
                _expect_version(self._database, name, path)
                # All of it is read once, so that what goes wrong later is of the whole journal.
                ((found,),) = self._database.execute(f"PRAGMA {name}.quick_check(1)")
                if found != "ok":
                    raise sqlite3.DatabaseError(found)
            yield

    def _take_over_parts(self) -> None:
        for path in sorted(self.folder.glob(_PARTS)):
            values = (path.name, *FileState.at(path))
            query = "SELECT 1 FROM parts WHERE name = ? AND size = ? AND modified = ?"
            if list(self._rows(query, *values)):
                continue
            with self._attached(path, "part"), self._readable_errors(), self.transaction():
                self._database.execute("INSERT OR REPLACE INTO main.files SELECT * FROM part.files")
                self._database.execute(_TAKE_OVER)
                self._database.execute("INSERT OR REPLACE INTO parts VALUES (?, ?, ?)", values)

    @contextmanager
    def _readable_errors(self, path: Path | None = None) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise UserError(
                f"{self.folder} cannot be written to: {error.strerror or error}. Free some space there, or choose "
                "another --output."
            ) from error
        except sqlite3.DatabaseError as error:
            raise UserError(_explain(path or self.path, error)) from error


def _open(path: Path, *, write: bool) -> sqlite3.Connection:
    # No transactions but those that are asked for: each statement is committed when it returns.
    mode = "rwc" if write else "ro"
    database = sqlite3.connect(f"{path.absolute().as_uri()}?mode={mode}", uri=True, isolation_level=None, timeout=60)
    if write:
        database.execute("PRAGMA journal_mode = TRUNCATE")
        database.execute("PRAGMA synchronous = NORMAL")
    return database


def _expect_version(database: sqlite3.Connection, schema: str, path: Path) -> None:
    ((version,),) = database.execute(f"PRAGMA {schema}.user_version")
    if version not in (0, VERSION):
        raise UserError(
            f"{path} has version {version}, this release reads version {VERSION}. Install the release that wrote it, "
            "or choose another --output."
        )


def _explain(path: Path, error: sqlite3.DatabaseError) -> str:
    if isinstance(error, sqlite3.OperationalError):
        return (
            f"{path} cannot be written or read: {error}. What was recorded is intact: free some space there, or mend "
            "its permissions, then run the same command again."
        )
    return f"{path} is damaged: {error}. Restore it from a copy, or move it away and run the same command again."


def _text(outcome: Outcome) -> str:
    value: Mapping[str, Any] = (
        {"values": outcome.values}
        if isinstance(outcome, Done)
        else {"failed": outcome.reason, "again": outcome.again, "limit": outcome.limit}
    )
    return json.dumps(value, allow_nan=False, separators=(",", ":"))


def _outcome(text: str) -> Outcome:
    value = json.loads(text)
    if "values" in value:
        return Done(value["values"])
    return Failed(value["failed"], value["again"], value["limit"] and tuple(value["limit"]))
