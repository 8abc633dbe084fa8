"""Nothing that was recorded is lost, and nothing is recorded by halves."""

from __future__ import annotations

import os
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import pytest

from avd_trainer.data.preparation.journal import FileState, Journal, KnownFile, number_of
from avd_trainer.data.preparation.stage import Done, Failed
from avd_trainer.runtime.errors import UserError
from disks import disk_with_room_for

FILE = KnownFile("a/b.mp4", FileState(10, 20), "ab" * 32, None, "a dog", "CC0")
BAD = KnownFile("a/c.mp4", FileState(1, 2), None, "Permission denied")


def rows(journal: Journal) -> list[str]:
    return [row for row, *_ in journal.outcomes("flow", "d1")]


def fill(journal: Journal) -> None:
    for number in range(1, 1000):
        journal.record("flow", "d1", f"clip{number:04d}", Done({"text": "x" * 1000}), 0.0)


def test_what_was_recorded_is_read_again(tmp_path: Path) -> None:
    with Journal(tmp_path / "new" / "folder") as journal:
        journal.add_file(FILE)
        journal.add_file(BAD)
        journal.record("flow", "d1", "clip1", Done({"pixels": 0.5, "name": "café"}), 1.5)
        journal.record("flow", "d1", "clip0", Failed("it is grey", again=True, limit=("time_limit", 3.5)), 0.5)
        journal.record("flow", "d2", "clip0", Done({}), 0.0)
    with Journal(tmp_path / "new" / "folder") as journal:
        assert list(journal.files()) == [FILE, BAD]
        assert (journal.file("a/b.mp4"), journal.file("b.mp4")) == (FILE, None)
        assert journal.outcome("flow", "d1", "clip1") == Done({"pixels": 0.5, "name": "café"})
        assert list(journal.outcomes("flow", "d1")) == [
            ("clip0", Failed("it is grey", again=True, limit=("time_limit", 3.5)), 0.5),
            ("clip1", Done({"pixels": 0.5, "name": "café"}), 1.5),
        ]
        assert journal.outcome("flow", "d3", "clip1") is None
        assert journal.outcome("blur", "d1", "clip1") is None
        journal.remove_file("a/c.mp4")
        assert list(journal.files()) == [FILE]


def test_two_runs_on_one_folder_are_told_of_each_other(tmp_path: Path) -> None:
    with Journal(tmp_path) as journal:
        with pytest.raises(UserError, match=rf"worked on by process {os.getpid()} on .*--shard"), Journal(tmp_path):
            pass
        journal.record("flow", "d1", "clip0", Done({}), 0.0)
        with Journal(tmp_path, write=False) as reader:  # a report of a run that goes on
            assert rows(reader) == ["clip0"]
        with Journal(tmp_path, part=(0, 2)):  # has a journal of its own
            pass
    with Journal(tmp_path) as journal:
        assert rows(journal) == ["clip0"]


def test_parts_become_one_and_nothing_that_is_gone_comes_back(tmp_path: Path) -> None:
    for index in range(2):
        with Journal(tmp_path, part=(index, 2)) as journal:
            journal.add_file(FILE._replace(path=f"{index}.mp4"))
            journal.record("flow", "d1", f"clip{index}", Done({"part": index}), 0.0)
    with Journal(tmp_path) as journal:
        assert rows(journal) == ["clip0", "clip1"]
        assert [file.path for file in journal.files()] == ["0.mp4", "1.mp4"]
        journal.remove_file("0.mp4")
    with Journal(tmp_path) as journal:
        assert [file.path for file in journal.files()] == ["1.mp4"]
    with Journal(tmp_path, part=(0, 2)) as journal:
        assert rows(journal) == ["clip0"]  # a part goes on where it stopped
        journal.record("flow", "d1", "clip2", Done({}), 0.0)
    with Journal(tmp_path) as journal:
        assert rows(journal) == ["clip0", "clip1", "clip2"]


def test_a_part_begins_with_what_is_known_of_its_own_files(tmp_path: Path) -> None:
    names = {number_of(name) % 2: name for name in ("a.mp4", "b.mp4", "c.mp4", "d.mp4")}
    assert len(names) == 2
    shas = {part: str(part) * 64 for part in names}
    with Journal(tmp_path) as whole:
        for part, name in names.items():
            whole.add_file(FILE._replace(path=name, sha256=shas[part]))
            whole.record("probe", "d0", shas[part], Done({"width": part}), 0.0)
            whole.record("flow", "d1", f"{shas[part][:16]}-000000000-000005062", Done({"part": part}), 0.0)
    for index in range(2):
        with Journal(tmp_path, part=(index, 2)) as journal:
            assert [(file.path, file.sha256) for file in journal.files()] == [(names[index], shas[index])]
            assert [outcome for _, outcome, _ in journal.outcomes("probe", "d0")] == [Done({"width": index})]
            assert [outcome for _, outcome, _ in journal.outcomes("flow", "d1")] == [Done({"part": index})]


def test_of_two_outcomes_the_one_that_is_done_is_taken_over(tmp_path: Path) -> None:
    failed, done = Failed("it took longer than 3 s", again=False, limit=("time_limit", 3.0)), Done({"pixels": 0.5})
    with Journal(tmp_path) as whole:
        whole.record("flow", "d1", "clip0", failed, 3.0)
        whole.record("flow", "d1", "clip1", done, 1.0)
        whole.record("flow", "d1", "clip2", Done({"pixels": 0.25}), 1.0)
    with Journal(tmp_path, part=(0, 1)) as part:
        part.record("flow", "d1", "clip0", done, 4.0)
        part.record("flow", "d1", "clip1", failed, 3.0)
        part.record("flow", "d1", "clip2", done, 4.0)
    with Journal(tmp_path) as whole:
        assert list(whole.outcomes("flow", "d1")) == [
            ("clip0", done, 4.0),
            ("clip1", done, 1.0),
            ("clip2", Done({"pixels": 0.25}), 1.0),
        ]


def test_a_full_disk_leaves_what_was_recorded(tmp_path: Path) -> None:
    with Journal(tmp_path) as journal:
        journal.record("flow", "d1", "clip0", Done({}), 0.0)
        with (
            disk_with_room_for(journal.path.stat().st_size),
            pytest.raises(UserError, match=r"cannot be written.*intact.*free some space"),
        ):
            fill(journal)
        before = rows(journal)
        journal.record("flow", "d1", "clip9999", Done({}), 0.0)  # there is room again
    with Journal(tmp_path) as journal:
        assert rows(journal) == [*before, "clip9999"]
        assert before[0] == "clip0"


RECORDING = """
import sys
from pathlib import Path
from avd_trainer.data.preparation.journal import Journal
from avd_trainer.data.preparation.stage import Done
with Journal(Path(sys.argv[1])) as journal:
    for number in range(10**6):
        journal.record("flow", "d1", f"clip{number:07d}", Done({"text": "x" * 500}), 0.0)
        print(number, flush=True)
"""


@pytest.mark.parametrize("milliseconds", [3, 30, 130])
def test_a_killed_process_loses_nothing_that_it_recorded(tmp_path: Path, milliseconds: int) -> None:
    command = [sys.executable, "-c", RECORDING, str(tmp_path)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
        assert process.stdout is not None
        first = process.stdout.readline()
        time.sleep(milliseconds / 1000)
        process.send_signal(signal.SIGKILL)
        told = [first, *process.stdout]
    with Journal(tmp_path) as journal:
        found = rows(journal)
        assert found == [f"clip{number:07d}" for number in range(len(found))]
        # What it was about to tell may be recorded already; one line of what it told may be torn.
        assert len(told) - 1 <= len(found) <= len(told) + 1


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda path: path.write_bytes(b"no journal" * 1000), "is damaged.*Restore it"),
        (lambda path: sqlite3.connect(path).execute("PRAGMA user_version = 9"), "has version 9, this release reads"),
    ],
)
def test_a_journal_that_cannot_be_used_is_named(tmp_path: Path, spoil: object, message: str) -> None:
    with Journal(tmp_path) as journal:
        pass
    spoil(journal.path)  # type: ignore[operator]
    for write in (True, False):
        with pytest.raises(UserError, match=message), Journal(tmp_path, write=write):
            pass
    journal.path.unlink()
    with Journal(tmp_path) as journal:  # the lock was given back
        assert rows(journal) == []


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda path: path.write_bytes(b"no journal" * 1000), "is damaged.*Restore it"),
        (lambda path: path.write_bytes(path.read_bytes()[:8192] + b"x" * 8192), "is damaged.*Restore it"),
        (lambda path: sqlite3.connect(path).execute("PRAGMA user_version = 9"), "has version 9, this release reads"),
    ],
)
def test_a_part_that_cannot_be_used_is_the_one_that_is_named(tmp_path: Path, spoil: object, message: str) -> None:
    with Journal(tmp_path, part=(0, 1)) as part:
        for number in range(200):
            part.record("flow", "d1", f"clip{number}", Done({"text": "x" * 100}), 0.0)
    spoil(part.path)  # type: ignore[operator]
    with pytest.raises(UserError, match=rf"{part.path.name} {message}"), Journal(tmp_path):
        pass
    part.path.unlink()
    with Journal(tmp_path) as journal:  # nothing of it was taken over
        assert rows(journal) == []


def test_there_is_nothing_to_read(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds no prepared videos"), Journal(tmp_path, write=False):
        pass


def test_a_folder_that_cannot_be_written_to(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="choose another --output"), Journal(tmp_path / "file"):
        pass
