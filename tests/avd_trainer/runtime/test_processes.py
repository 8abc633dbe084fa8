"""Processes of one thread each: what they print, how they fail, and how they are stopped."""

import os
import signal
import threading
import time
from functools import partial
from pathlib import Path

import pytest
import torch

from avd_trainer.runtime import processes
from avd_trainer.runtime.errors import UserError
from avd_trainer.runtime.processes import Ended, run_processes
from avd_trainer.runtime.signals import StopSignals

PRELOAD = "avd_trainer.runtime.processes"


@pytest.fixture(autouse=True)
def _impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "SECONDS_BETWEEN_LOOKS", 0.02)


def compute(value: torch.Tensor) -> None:
    print(f"{value.tolist()} in {torch.get_num_threads()} thread")


def fail(waiting: Path) -> None:
    while not waiting.exists():
        time.sleep(0.01)
    raise UserError("Something is missing. Add it.")


def work(begun: Path) -> None:
    """Until a signal comes."""
    with StopSignals() as signals:
        begun.touch()
        for _ in range(6000):
            if signals.received is not None:
                print(f"saved on {signals.received}")
                return
            time.sleep(0.01)


def test_each_prints_to_its_file_and_computes_in_one_thread(tmp_path: Path) -> None:
    logs, looks = [tmp_path / "one.txt", tmp_path / "other.txt"], []
    calls = {log: partial(compute, torch.tensor([place])) for place, log in enumerate(logs)}
    ended = run_processes(calls, preload=PRELOAD, on_look=lambda: looks.append([log.exists() for log in logs]))
    assert ended == Ended([], None)
    assert [log.read_text() for log in logs] == ["[0] in 1 thread\n", "[1] in 1 thread\n"]
    assert looks[-1] == [True, True]


@pytest.mark.parametrize("until_failure", [True, False])
def test_one_that_fails_says_why_and_may_stop_the_others(tmp_path: Path, until_failure: bool) -> None:
    begun, failing, working = tmp_path / "begun", tmp_path / "failing.txt", tmp_path / "working.txt"
    other = partial(work, begun) if until_failure else begun.touch
    ended = run_processes({working: other, failing: partial(fail, begun)}, preload=PRELOAD, until_failure=until_failure)
    assert ended == Ended([failing], None)
    assert "error: Something is missing. Add it." in failing.read_text()
    assert working.read_text() == ("saved on SIGTERM\n" if until_failure else "")


def test_a_signal_is_passed_on(tmp_path: Path) -> None:
    begun = [tmp_path / "one", tmp_path / "other"]

    def interrupt() -> None:
        while not all(path.exists() for path in begun):
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGINT)

    person = threading.Thread(target=interrupt)
    person.start()
    calls = {path.with_suffix(".txt"): partial(work, path) for path in begun}
    assert run_processes(calls, preload=PRELOAD) == Ended([], "SIGINT")
    person.join()
    assert [log.read_text() for log in calls] == ["saved on SIGTERM\n"] * 2


def test_where_this_process_fails_the_others_are_stopped(tmp_path: Path) -> None:
    begun, log = tmp_path / "begun", tmp_path / "log.txt"

    def look() -> None:
        if begun.exists():
            raise RuntimeError("the disk is full")

    with pytest.raises(RuntimeError, match="the disk is full"):
        run_processes({log: partial(work, begun)}, preload=PRELOAD, on_look=look)
    deadline = time.monotonic() + 60
    while log.read_text() != "saved on SIGTERM\n":
        assert time.monotonic() < deadline
        time.sleep(0.01)
