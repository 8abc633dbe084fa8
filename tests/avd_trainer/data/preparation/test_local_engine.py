"""What a decoder or a stage does to its process costs that file or that row, and nothing else."""

from __future__ import annotations

import logging
import os
import re
import signal
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest

from avd_trainer.data.preparation import local_engine
from avd_trainer.data.preparation.engine import StoppedError
from avd_trainer.data.preparation.journal import Journal
from avd_trainer.data.preparation.stage import Done, Failed, Outcome
from avd_trainer.runtime.errors import UserError
from toy_runs import ToyRun, toy_recipe

PLAIN = "plain.mp4"


def brightness_of(toy: ToyRun, name: str, start: int) -> Done:
    return Done({"mean": float(((toy.videos / name).stat().st_size + start // 100) % 256)})


def expect_all_of(toy: ToyRun, found: dict[tuple[str, str], Outcome], name: str) -> None:
    for start in (0, 500, 1000):
        assert found[f"{name}@{start}", "brightness"] == brightness_of(toy, name, start)
        assert isinstance(found[f"{name}@{start}", "contrast"], Done)


@pytest.mark.parametrize("workers", [1, 2])
def test_every_stage_runs_once_for_every_row(toy: ToyRun, workers: int) -> None:
    names = ("a.mp4", "b/c.MOV", "d.webm")
    toy.add(*names)
    seen: list[None] = []
    found = dict(toy(workers=workers, on_file=lambda: seen.append(None)))
    assert len(found) == 3 * (2 + 3 * 2)  # two stages of files, two of clips
    assert len(seen) == 3
    for name in names:
        assert found[name, "span"] == Done({"clips": [[0, 500], [500, 1000], [1000, 1500]]})
        expect_all_of(toy, found, name)
    assert set(toy.begun().values()) == {1}
    assert dict(toy(workers=workers)) == found
    assert toy.begun() == {}


@pytest.mark.parametrize(
    ("name", "stage", "lost", "reason"),
    [
        ("decoding-SIGSEGV.mp4", "brightness", (500, 1000), "decoding crashed with SIGSEGV"),
        ("decoding-hangs.mp4", "brightness", (500, 1000), "decoding did not end within 2 s"),
        ("decoding-raises.mp4", "brightness", (500,), "its frames cannot be decoded: it is odd"),
        ("brightness-SIGKILL.mp4", "brightness", (500,), "brightness crashed with SIGKILL"),
        ("brightness-hangs.mp4", "brightness", (500,), "brightness did not end within 3 s"),
        ("brightness-eats.mp4", "brightness", (500,), "brightness took .* GB of memory, 0.3 are allowed"),
        ("contrast-raises.mp4", "contrast", (500,), "it is odd"),
    ],
)
def test_what_goes_wrong_is_named_and_does_not_stop_the_rest(
    toy: ToyRun, name: str, stage: str, lost: tuple[int, ...], reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    toy.add(PLAIN, name)
    # Limits that a busy machine reaches, only where one is to be reached.
    decoding, judging = (2, 3) if "hangs" in name else (60, 60)
    recipe = toy_recipe(decode_limit=decoding, memory_gb=0.3, brightness={"time_limit": judging})
    with caplog.at_level(logging.WARNING):
        found = dict(toy(recipe))
    expect_all_of(toy, found, PLAIN)
    for start in (0, 500, 1000):
        outcome = found[f"{name}@{start}", stage]
        if start in lost:
            assert isinstance(outcome, Failed)
            assert re.search(reason, outcome.reason)
        else:
            assert isinstance(outcome, Done)
        # What reads it has nothing to read.
        assert ((f"{name}@{start}", "contrast") in found) == (stage == "contrast" or start not in lost)
    if "raises" not in name:
        assert name in caplog.text
    toy.begun()
    assert dict(toy(recipe)) == found
    # The same command does not try it again, but for a process that the system may have killed for another one's sake.
    assert bool(toy.begun()) == ("SIGKILL" in name)


def test_what_reached_a_limit_is_tried_again_with_a_higher_one(toy: ToyRun) -> None:
    lingers, borrows = "brightness-lingers.mp4", "brightness-borrows.mp4"
    toy.add(lingers, borrows)
    found = dict(toy(toy_recipe(brightness={"time_limit": 1.2}), workers=2))
    for name in (lingers, borrows):
        assert found[f"{name}@500", "brightness"] == Failed(
            "brightness did not end within 1.2 s", limit=("time_limit", 1.2)
        )
    toy.begun()
    found = dict(toy(toy_recipe(memory_gb=0.3), workers=2))
    assert found[f"{lingers}@500", "brightness"] == brightness_of(toy, lingers, 500)
    failed = found[f"{borrows}@500", "brightness"]
    assert isinstance(failed, Failed)
    assert failed.limit == ("memory_gb", 0.3)
    assert {line for line in toy.begun() if "brightness " in line} == {
        f"brightness {lingers} 500",
        f"brightness {borrows} 500",
    }
    found = dict(toy(toy_recipe(memory_gb=2)))
    assert found[f"{borrows}@500", "brightness"] == brightness_of(toy, borrows, 500)


def test_what_crashed_is_tried_again_if_asked_for(toy: ToyRun) -> None:
    toy.add("brightness-SIGSEGV.mp4")
    found = dict(toy())
    toy.begun()
    assert dict(toy(retry=True)) == found
    assert toy.begun() == {"decoding brightness-SIGSEGV.mp4 500": 1, "brightness brightness-SIGSEGV.mp4 500": 1}


def test_weights_do_not_count_as_memory_of_a_row(toy: ToyRun) -> None:
    toy.add(PLAIN, "brightness-eats.mp4")
    weights = toy.runs.with_name("weights")
    weights.write_text("600")
    found = dict(toy(toy_recipe(memory_gb=0.3, brightness={"weights": weights})))
    expect_all_of(toy, found, PLAIN)
    failed = found["brightness-eats.mp4@500", "brightness"]
    assert isinstance(failed, Failed)
    assert failed.limit == ("memory_gb", 0.3)


def test_weights_that_cannot_be_loaded_stop_the_run_and_cost_nothing(toy: ToyRun) -> None:
    toy.add(PLAIN)
    weights = toy.runs.with_name("weights")
    recipe = toy_recipe(brightness={"weights": weights})
    with pytest.raises(UserError, match=r"brightness cannot load what it needs: No such file.*same command again"):
        toy(recipe)
    weights.write_text("1")
    expect_all_of(toy, dict(toy(recipe)), PLAIN)


def test_a_pause_does_not_count(toy: ToyRun, monkeypatch: pytest.MonkeyPatch) -> None:
    """As by Ctrl-Z, which stops this process and those that it looks after."""
    toy.add("brightness-lingers.mp4")
    began: list[float] = []

    def clock() -> float:
        now = time.monotonic()
        if not began and toy.runs.exists() and "brightness brightness-lingers.mp4 500" in toy.runs.read_text():
            began.append(now)
        # A second after it began, when it has been looked at, and before it ends.
        return now + 1000 if began and now - began[0] > 1 else now

    monkeypatch.setattr(local_engine, "time", SimpleNamespace(monotonic=clock))
    expect_all_of(toy, dict(toy()), "brightness-lingers.mp4")


def test_a_file_stage_that_crashes_costs_its_file(toy: ToyRun) -> None:
    toy.add(PLAIN, "span-SIGABRT.mp4")
    found = dict(toy())
    expect_all_of(toy, found, PLAIN)
    assert found["span-SIGABRT.mp4", "span"] == Failed("span crashed with SIGABRT")
    assert {stage for name, stage in found if name.startswith("span")} == {"span", "framing"}


def test_what_cannot_be_read_is_named(toy: ToyRun) -> None:
    toy.add(PLAIN)
    (toy.videos / "folder.mp4").mkdir()
    (toy.videos / "link.mp4").symlink_to("nowhere.mp4")
    os.mkfifo(toy.videos / "pipe.mp4")
    Path(os.fsdecode(bytes(toy.videos) + b"/caf\xe9.mp4")).write_bytes(b"video")
    (toy.videos / "odd.mp4").write_bytes(b"video")
    (toy.videos / "odd.json").write_text("{")
    found = dict(toy())
    expect_all_of(toy, found, PLAIN)
    with Journal(toy.output) as journal:
        failed = {file.path: file.failed for file in journal.files()}
    assert failed == {
        PLAIN: None,
        "folder.mp4": "it is a folder with the name of a video",
        "link.mp4": "it is a link that leads nowhere (to nowhere.mp4)",
        "pipe.mp4": "it is no regular file, such as a pipe, which might never end",
        r"caf\xe9.mp4": r"it is not there; a name that is shown with \x is not UTF-8: rename the file",
        "odd.mp4": "the file odd.json beside it is no JSON: Expecting property name enclosed in double quotes: "
        "line 1 column 2 (char 1)",
    }
    (toy.videos / "odd.json").write_text("{}")
    (toy.videos / "nowhere.mp4").write_bytes(b"now it is there")
    found = dict(toy())
    expect_all_of(toy, found, "odd.mp4")
    expect_all_of(toy, found, "nowhere.mp4")  # the same bytes, named by one of their names


def test_the_same_bytes_under_another_name_are_not_worked_on_again(toy: ToyRun) -> None:
    toy.add("a.mp4")
    toy()
    (toy.videos / "a.mp4").rename(toy.videos / "renamed.mp4")
    toy.begun()
    toy()
    assert toy.begun() == {}


def test_a_file_with_new_bytes_is_worked_on_again(toy: ToyRun) -> None:
    toy.add("a.mp4", PLAIN)
    toy()
    toy.begun()
    (toy.videos / "a.mp4").write_bytes(b"something else")
    found = dict(toy())
    assert {line.split()[1] for line in toy.begun()} == {"a.mp4"}
    expect_all_of(toy, found, "a.mp4")


@pytest.mark.parametrize("name", ["brightness-changes.mp4", "decoding-changes.mp4"])
def test_what_is_found_in_a_file_that_changes_meanwhile_is_not_recorded(
    toy: ToyRun, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    toy.add(PLAIN, name)
    found = dict(toy())
    expect_all_of(toy, found, PLAIN)
    assert f"{name}: it changed while it was read. Run the same command again." in caplog.text
    assert (f"{name}@0", "brightness") in found
    assert (f"{name}@500", "brightness") not in found
    expect_all_of(toy, dict(toy()), name)  # of the bytes that it has now


def test_ctrl_c_stops_at_once_and_loses_nothing(toy: ToyRun) -> None:
    toy.add(*(f"{number}.mp4" for number in range(4)), "brightness-hangs.mp4")
    interrupt = threading.Timer(6, lambda: os.kill(os.getpid(), signal.SIGINT))
    interrupt.start()
    began = time.monotonic()
    with pytest.raises(StoppedError, match=r"Stopped by SIGINT.*same command goes on"):
        toy()
    assert time.monotonic() - began < 60  # the limit of the stage that hangs is 120
    workers = [child for child in psutil.Process().children() if "spawn_main" in " ".join(child.cmdline())]
    assert not workers
    before = toy.begun()
    (toy.videos / "brightness-hangs.mp4").unlink()
    found = dict(toy())
    for number in range(4):
        expect_all_of(toy, found, f"{number}.mp4")
    assert not [line for line in toy.begun() if line in before]


def test_a_worker_that_cannot_start_is_no_endless_loop(toy: ToyRun, monkeypatch: pytest.MonkeyPatch) -> None:
    toy.add(PLAIN)
    monkeypatch.setattr("multiprocessing.spawn.get_executable", lambda: b"/bin/false")
    with pytest.raises(UserError, match="status 1 before it began to work"):
        toy()
