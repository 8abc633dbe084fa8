"""``avd train`` as a person meets it: trying it without writing, going on, and what is said at the end."""

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from avd_trainer.models.weight_files import ADAPTERS
from command_line import run_command as run

SMALL = [
    "--max-steps", "1", "--set", "batch_size=2", "--set", "data.clips=16", "--set", "data.held_out=8",
    "--set", "samples.every=null",
]  # fmt: skip


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A run of two steps, and what it printed."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    status, printed = run("train", "tiny", "--output", folder, *SMALL, "--max-steps", "2")
    assert status == 0, printed
    return folder, printed


def test_a_run_says_how_it_computes_and_what_comes_next(finished: tuple[Path, str]) -> None:
    folder, printed = finished
    assert "Computing on the CPU with one thread" in printed
    assert f"The student is in {folder / 'student'}." in printed
    assert f"tensorboard --logdir {folder}" in printed
    assert f"avd export {folder} --output {folder}-student" in printed
    assert "going on" not in printed


def test_resume_takes_all_values_from_the_run(finished: tuple[Path, str], tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(finished[0], folder)
    status, printed = run("train", "--resume", folder, "--set", "max_steps=3")
    assert status == 0, printed
    assert "avd: going on at step 2 of 3." in printed
    assert len((folder / "metrics.jsonl").read_text().splitlines()) == 3
    status, printed = run("train", "--resume", folder)
    assert status == 0
    assert "avd: all 3 steps are done already." in printed


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "Expected a preset and an --output"),
        (["tiny"], "Expected a preset and an --output"),
        (["tiny", "--resume", "RUN"], "leave PRESET, --method, --output out"),
        (["--resume", "RUN", "--output", "elsewhere"], "leave PRESET, --method, --output out"),
        (["--resume", "nowhere"], "--resume nowhere: there is no run of avd train"),
        (["--resume", "RUN", "--set", "batch_size=3"], "batch_size: 2 there, 3 now"),
        (["--resume", "RUN", "--set", "batch_size=3", "--dry-run"], "batch_size: 2 there, 3 now"),
    ],
)
def test_what_is_wrong_about_going_on_is_said(finished: tuple[Path, str], arguments: list[str], message: str) -> None:
    status, printed = run("train", *(str(finished[0]) if each == "RUN" else each for each in arguments))
    assert status == 2
    assert message in printed


@pytest.mark.parametrize("method", ["avd", "flow_matching", "frame_interpolation"])
def test_a_dry_run_prints_values_and_plan_and_writes_nothing(tmp_path: Path, method: str) -> None:
    status, printed = run("train", "tiny", "--method", method, "--output", tmp_path / "run", *SMALL, "--dry-run")
    assert status == 0, printed
    assert f"kind: {method}" in printed
    assert "max_steps: 1 " in printed
    assert ("what frame_interpolation needs is not known" if method == "frame_interpolation" else "It fits") in printed
    assert f"this would start a new run in {tmp_path / 'run'}" in printed
    assert not list(tmp_path.iterdir())


def test_a_dry_run_says_that_a_run_would_go_on(finished: tuple[Path, str]) -> None:
    folder, _ = finished
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    for more, what in (([], "find nothing left to do after step 2"), (["--max-steps", 3], "go on at step 2")):
        status, printed = run("train", "--resume", folder, "--dry-run", *more)
        assert status == 0
        assert f"this would {what}" in printed
    status, printed = run("train", "--resume", folder, "--dry-run", "--max-steps", 1)
    assert status == 2
    assert "max_steps is 1, and the run in" in printed
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before


@pytest.mark.parametrize(
    ("method", "override", "message"),
    [
        ("dmd2", "method.head.blocks=[9]", "blocks must rise within 0 to 5, the blocks of this transformer, got [9]"),
        ("data_forcing", "student_weights=no/such/student", "no/such/student"),
        ("data_forcing", "student_weights=ADAPTERS", "avd export RUN --output STUDENT"),
    ],
)
@pytest.mark.parametrize("trying", [["--dry-run"], []])
def test_models_that_cannot_be_are_refused_before_data_is_read(
    method: str,
    override: str,
    message: str,
    trying: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def read(*_: object, **__: object) -> None:
        raise AssertionError("data was read")

    monkeypatch.setattr("avd_trainer.training.run.load_data", read)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    save_file({"a": torch.zeros(1)}, tmp_path / ADAPTERS)
    own = ["--set", override.replace("ADAPTERS", str(tmp_path))]
    status, printed = run("train", "tiny", "--method", method, "--output", tmp_path / "run", *own, *trying)
    assert status == 2, printed
    assert message in printed


@pytest.mark.parametrize(
    ("method", "override", "what"),
    [
        ("dcm", "method.detail.after=5", "the training of details"),
        ("vpae", "method.priming_steps=5", "phase II, the adversarial one,"),
        ("rcm", "method.tangent_warmup=5", "what is behind the warm-up"),
        ("scm", "method.tangent_warmup=5", "what is behind the warm-up"),
    ],
)
def test_a_phase_that_never_comes_is_warned_of(
    method: str, override: str, what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("avd_trainer.training.run.train", lambda *_: False)
    name = override.partition("=")[0]
    for steps in (5, 6):
        start = ("train", "tiny", "--method", method, "--set", override, "--max-steps", steps, "--output", "unused")
        _, printed = run(*start)
        warned = f"warning: {name} is 5, and the run has max_steps 5: {what} never comes." in printed
        assert warned == (steps == 5), printed


@pytest.mark.parametrize(("weights", "warned"), [("null", True), ("runs/dmd2/student", False)])
def test_data_forcing_from_the_teacher_itself_is_warned_of(
    weights: str, warned: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("avd_trainer.training.run.train", lambda *_: False)
    start = ("--set", f"student_weights={weights}")
    _, printed = run("train", "tiny", "--method", "data_forcing", "--output", tmp_path / "run", *start)
    assert ("warning: data_forcing starts from the teacher itself" in printed) == warned
    assert "Stopped on request" in printed
