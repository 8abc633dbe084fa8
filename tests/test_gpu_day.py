"""The order of work on a GPU: what fails or hangs costs its own time only."""

import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from avd_trainer.runtime.files import read_json
from gpu import PARTS, REPORT, RUNS, Part, run_parts


def part(name: str, code: str, minutes: float = 1.0) -> Part:
    def arguments(output: Path) -> Sequence[str]:
        return ["-c", code, str(output)]

    return Part(name, minutes, arguments)


def test_a_part_that_fails_does_not_stop_the_next(tmp_path: Path) -> None:
    entries = run_parts(
        [part("first", "raise SystemExit('no such thing')"), part("second", "print('fine')")],
        tmp_path,
        seconds=60,
        rehearse=True,
    )
    assert [entry["outcome"] for entry in entries] == ["failed", "done"]
    assert "no such thing" in entries[0]["output"]
    assert read_json(tmp_path / REPORT)["parts"] == entries


def test_a_part_that_hangs_is_ended_with_what_it_started(tmp_path: Path) -> None:
    # It writes down the process that it starts, and both sleep.
    code = (
        "import subprocess, sys, time, pathlib\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])\n"
        "pathlib.Path(sys.argv[1], 'child').write_text(str(child.pid))\n"
        "time.sleep(600)"
    )
    (entry,) = run_parts([part("hangs", code, minutes=3 / 60)], tmp_path, seconds=60, rehearse=True)
    assert entry["outcome"] == "stopped"
    child = Path(f"/proc/{(tmp_path / 'child').read_text()}/stat")
    deadline = time.monotonic() + 10
    while child.exists() and child.read_text().split()[2] != "Z":
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_without_time_a_part_is_left_out_and_said_to_be(tmp_path: Path) -> None:
    (entry,) = run_parts([part("late", "print()")], tmp_path, seconds=1, rehearse=True)
    assert entry == {"part": "late", "outcome": "no time left"}


def test_a_rehearsal_sees_no_gpu(tmp_path: Path) -> None:
    code = "import os; raise SystemExit(os.environ['CUDA_VISIBLE_DEVICES'] != '')"
    (entry,) = run_parts([part("looks", code)], tmp_path, seconds=60, rehearse=True)
    assert entry["outcome"] == "done"


@pytest.mark.parametrize("part", PARTS, ids=lambda part: part.name)
def test_what_a_part_runs_exists(part: Part, tmp_path: Path) -> None:
    root = Path(__file__).parent.parent
    arguments = part.arguments(tmp_path)
    assert arguments[0] == "-m" or (root / arguments[0]).exists()


def test_a_rehearsal_is_the_same_command_with_more_options(tmp_path: Path) -> None:
    own = part("prints", "import sys; print(sys.argv[2:]); sys.exit(1)")._replace(rehearsal=["--small"])
    (rehearsed,) = run_parts([own], tmp_path, seconds=60, rehearse=True)
    (real,) = run_parts([own], tmp_path, seconds=60, rehearse=False)
    assert rehearsed["command"] == f"{real['command']} --small"
    assert (rehearsed["output"], real["output"]) == ("['--small']\n", "[]\n")


def test_what_is_no_result_is_where_git_does_not_look(tmp_path: Path) -> None:
    (entry,) = run_parts([part("prints", "print()")], tmp_path, seconds=60, rehearse=True)
    assert entry["outcome"] == "done"
    assert {path.name for path in tmp_path.iterdir()} == {REPORT, RUNS}
    (study,) = (own.arguments(tmp_path) for own in PARTS if own.name == "study")
    assert Path(study[study.index("--output") + 1]).parent == tmp_path / RUNS
    assert f"{RUNS}/" in (Path(__file__).parent.parent / ".gitignore").read_text().splitlines()
