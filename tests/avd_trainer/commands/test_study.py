"""``avd study`` leaves tables however it ends."""

from pathlib import Path

import pytest

from avd_trainer.runtime.processes import FailedProcessError
from avd_trainer.studies import reuse, runner
from avd_trainer.studies.definition import load_study
from avd_trainer.studies.runner import FailedUnitsError, claim_study
from avd_trainer.studies.units import StoppedError
from command_line import run_command
from small_study import write_study


@pytest.mark.parametrize("error", [FailedUnitsError, FailedProcessError])
def test_tables_are_made_of_what_is_done_where_units_fail(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: type[Exception]
) -> None:
    name, folder = write_study(tmp_path / "small"), tmp_path / "out"
    claim_study(load_study(name), folder)

    def fail(*_: object, **__: object) -> bool:
        raise error("dmd-1: no memory")

    monkeypatch.setattr(runner, "run_study", fail)
    status, told = run_command("study", name, "--output", folder)
    assert (status, "dmd-1: no memory" in told) == (2, True)
    assert (folder / "table.md").exists()


def test_who_stops_it_while_steps_are_timed_for_reuse_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name, folder = write_study(tmp_path / "small"), tmp_path / "out"
    claim_study(load_study(name), folder)

    def stop(*_: object) -> None:
        raise StoppedError

    monkeypatch.setattr(reuse, "reuse", stop)
    status, told = run_command("study", name, "--output", folder, "--reuse", tmp_path)
    assert (status, "Stopped on request" in told) == (0, True)
    assert (folder / "table.md").exists()


def test_clips_are_drawn_where_asked_for(tmp_path: Path) -> None:
    name, folder = write_study(tmp_path / "small"), tmp_path / "out"
    status, told = run_command("study", name, "--output", folder, "--clips", 5)
    assert (status, "--clips 5 is more than the 4 that are held out" in told) == (2, True)
    assert not folder.exists()  # nothing was trained for nothing
    asked = "study", name, "--output", folder, "--seeds", 3, "--variants", "teacher", "--clips", 1
    status, told = run_command(*asked)
    assert (status, f"Clips: {folder}" in told) == (0, True)
    (folder / "clips.png").unlink()
    assert run_command(*asked, "--jobs", 0)[0] == 0
    assert (folder / "clips.png").exists()
