"""A demo is what a person waited for: it goes on where it stands, and nothing of it is deleted."""

import json
import os
import shutil
import signal
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from avd_trainer.config.loading import load_config
from avd_trainer.data.moving_shapes import is_held_out
from avd_trainer.evaluation.controls import CONTROLS, REPEATED
from avd_trainer.evaluation.measures import MEASURES
from avd_trainer.runtime.environment import environment
from avd_trainer.runtime.errors import UserError
from avd_trainer.runtime.processes import Ended, FailedProcessError
from avd_trainer.runtime.ranks import Ranks, join_ranks
from avd_trainer.studies import demo
from avd_trainer.studies.demo import DemoConfig, run_demo, write_blind_pairs
from avd_trainer.studies.demo_clips import DemoClips
from avd_trainer.studies.findings import Findings
from avd_trainer.studies.verdict import summarize
from avd_trainer.training.config import TrainConfig

SMALL = [
    "max_steps=2", "batch_size=2", "data.clips=16", "samples.every=null", "evaluation.samples=8",
    "evaluation.teacher_steps=2",
]  # fmt: skip


def config(*changes: str) -> DemoConfig:
    return load_config(DemoConfig, "tiny", [*SMALL, *changes])


def files(folder: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}


class Stopped:
    """In place of training: the run of this name is stopped by a signal before its first step."""

    def __init__(self, name: str) -> None:
        self._name, self._train = name, demo.train

    def __call__(self, *args: object, description: str, **kwargs: object) -> bool:
        return description != self._name and self._train(*args, description=description, **kwargs)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Findings]:
    """A demo that was stopped before its second run, and went on."""
    folder = tmp_path_factory.mktemp("demo")
    with join_ranks() as ranks:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(demo, "train", Stopped("avd"))
            assert run_demo(config(), folder, ranks) is None
        trained = files(folder / "dmd" / "checkpoints")
        assert trained
        findings = run_demo(config(), folder, ranks)
    assert files(folder / "dmd" / "checkpoints") == trained  # what was done before was not done again
    assert findings is not None
    return folder, findings


def test_a_stopped_demo_goes_on(finished: tuple[Path, Findings]) -> None:
    folder, findings = finished
    assert list(findings.rows) == ["teacher", "dmd", "avd"]
    assert findings.rows["dmd"] != findings.rows["avd"]
    assert not list(folder.rglob("*.part"))


def test_students_that_are_trained_at_the_same_time_are_the_same(
    finished: tuple[Path, Findings], tmp_path: Path, ranks: Ranks
) -> None:
    """Also where Ctrl-C came between."""
    begun = tmp_path / "logs" / "avd.txt"

    def interrupt() -> None:
        while not begun.exists():
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGINT)

    person = threading.Thread(target=interrupt)
    person.start()
    assert run_demo(config(), tmp_path, ranks, jobs=2) is None
    person.join()
    assert not (tmp_path / "clips.safetensors").exists()
    assert run_demo(config(), tmp_path, ranks, jobs=2) is not None
    mine, theirs = (DemoClips.load(folder / "clips.safetensors").latents for folder in (tmp_path, finished[0]))
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)


def test_progress_is_that_of_both_students_and_a_failure_is_shown(
    tmp_path: Path, ranks: Ranks, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ends = [Ended([], "SIGINT"), Ended([tmp_path / "logs" / "avd.txt"], None)]

    def ended(calls: Mapping[Path, object], *, on_look: Callable[[], None], **_: object) -> Ended:
        assert [log.name for log in calls] == ["dmd.txt", "avd.txt"]
        for name in ("dmd", "avd"):
            (tmp_path / name).mkdir(exist_ok=True)
            (tmp_path / name / "metrics.jsonl").write_text("{}\n{}\n")
        (tmp_path / "logs" / "avd.txt").write_text("error: The disk is full.\n")
        on_look()
        return ends.pop(0)

    monkeypatch.setattr(demo, "run_processes", ended)
    assert run_demo(config(), tmp_path, ranks, jobs=2) is None
    assert "dmd and avd: 4/4, 0 s left dmd 2 avd 2 " in capsys.readouterr().err
    failed = r"Training avd failed. .*avd.txt ends with:\nerror: The disk is full.\nMend it and run the same command"
    with pytest.raises(FailedProcessError, match=failed):
        run_demo(config(), tmp_path, ranks, jobs=2)
    assert "dmd and avd" not in capsys.readouterr().err  # none of it was to do


def test_all_rows_the_reference_and_the_controls_are_measured(finished: tuple[Path, Findings]) -> None:
    saved = json.loads((finished[0] / "metrics.json").read_text())
    assert list(saved["rows"]) == ["teacher", "dmd", "avd"]
    assert list(saved["controls"]) == [name for name in CONTROLS if name != REPEATED]
    assert (saved["reference"]["sets"], saved["reference"]["clips"]) == (20, 8)
    rows = [*saved["rows"].values(), *saved["controls"].values(), saved["reference"]["spreads"]]
    assert all(list(row) == list(MEASURES) for row in rows)
    assert {name: len(groups) for name, groups in saved["groups"].items()} == {"dmd": 4, "avd": 4}


def test_a_demo_that_went_on_claims_no_time(finished: tuple[Path, Findings]) -> None:
    saved = json.loads((finished[0] / "metrics.json").read_text())
    assert (saved["command"], saved["continued"], saved["seconds"]) == (None, True, None)
    assert saved["environment"] == environment()


def test_captions_were_never_trained_on_and_are_of_the_clips(finished: tuple[Path, Findings]) -> None:
    clips = DemoClips.load(finished[0] / "clips.safetensors")
    assert list(clips.latents) == ["real", "teacher", "dmd", "avd"]
    assert len(set(clips.captions)) == 8
    assert all(map(is_held_out, clips.captions))
    # Real clips show what their captions say; see the tests of the measures.
    assert finished[1].reference.spreads["direction"].mean == 1
    assert torch.equal(finished[1].reference.real.latents, clips.latents["real"])


def test_the_pictures_are_there(finished: tuple[Path, Findings]) -> None:
    folder, findings = finished
    with Image.open(folder / "report.png") as report:
        assert report.width == 1500
        assert len(report.convert("RGB").getcolors(1 << 24) or []) > 100
    with Image.open(folder / "demo.gif") as animation:
        assert animation.n_frames == 17  # type: ignore[attr-defined]
        assert animation.width > 6 * 128
        assert animation.height > 4 * 128
    verdict = (folder / "verdict.md").read_text()
    assert summarize(findings) in verdict
    assert all(CONTROLS[name].title in verdict for name in CONTROLS if name != REPEATED)


def test_of_a_finished_demo_nothing_is_done_again(
    finished: tuple[Path, Findings], ranks: Ranks, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, findings = finished
    before = files(folder)
    again = run_demo(config(), folder, ranks)
    assert again is not None
    assert (again.rows, again.controls, again.groups) == (findings.rows, findings.controls, findings.groups)
    assert again.reference.spreads == findings.reference.spreads
    assert all(map(torch.equal, again.reference.real, findings.reference.real))
    assert files(folder) == before
    assert "is finished, and nothing is done again" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["demo.gif", "clips.safetensors"])
def test_what_is_missing_is_made_again_without_training(
    finished: tuple[Path, Findings], ranks: Ranks, tmp_path: Path, name: str
) -> None:
    folder, findings = finished
    copy = tmp_path / "demo"
    shutil.copytree(folder, copy)
    (copy / name).unlink()
    trained = files(copy / "avd" / "checkpoints")
    again = run_demo(config(), copy, ranks)
    assert again is not None
    assert again.rows == findings.rows
    assert (copy / "demo.gif").read_bytes() == (folder / "demo.gif").read_bytes()
    assert (copy / "clips.safetensors").exists()
    assert files(copy / "avd" / "checkpoints") == trained


def test_the_blind_check_is_of_the_demos_clips(finished: tuple[Path, Findings], tmp_path: Path) -> None:
    folder = finished[0]
    copy = tmp_path / "demo"
    shutil.copytree(folder, copy)
    before = files(copy)
    assert write_blind_pairs(copy, seed=0) == copy / "blind.html"
    assert {path: time for path, time in files(copy).items() if path in before} == before
    key = json.loads((copy / "blind" / "key.json").read_text())
    captions = DemoClips.load(copy / "clips.safetensors").captions
    assert [pair["caption"] for pair in key["pairs"]] == [captions[pair["clip"]] for pair in key["pairs"]]
    assert {pair["left"] for pair in key["pairs"]} == {"dmd", "avd"}


def test_a_blind_check_needs_a_finished_demo(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"holds no finished demo\. Run `avd demo --output"):
        write_blind_pairs(tmp_path, seed=0)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("change", ["max_steps=3", "method.motion.weight=0.5", "evaluation.samples=4"])
def test_other_settings_want_another_folder(finished: tuple[Path, Findings], ranks: Ranks, change: str) -> None:
    folder, _ = finished
    before = files(folder)
    name = change.partition("=")[0]
    with pytest.raises(UserError, match=rf"(?s)demo of other settings:\n  {name}: .* there, .* now\nChoose a new"):
        run_demo(config(change), folder, ranks)
    assert files(folder) == before


def test_a_folder_of_something_else_is_left_alone(tmp_path: Path, ranks: Ranks) -> None:
    (tmp_path / "metrics.json").write_text("precious")
    with pytest.raises(UserError, match="holds something that is no demo"):
        run_demo(config(), tmp_path, ranks)
    assert (tmp_path / "metrics.json").read_text() == "precious"


def test_the_demo_is_of_avd(tmp_path: Path, ranks: Ranks) -> None:
    other = DemoConfig.model_validate(load_config(TrainConfig, "tiny", SMALL[:-2], method="dmd").model_dump())
    with pytest.raises(UserError, match="compares AVD with DMD alone, and this is method dmd"):
        run_demo(other, tmp_path / "demo", ranks)
    assert not (tmp_path / "demo").exists()


def test_all_rows_start_from_the_same_noise(
    tmp_path: Path, ranks: Ranks, finished: tuple[Path, Findings], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("dmd", "avd"):
        shutil.copytree(finished[0] / name, tmp_path / name)
    shutil.copy(finished[0] / demo.CONFIG, tmp_path / demo.CONFIG)
    seen: list[list[Tensor]] = []

    def recorded(sampler: Any) -> Any:
        def sample(*args: Any, **kwargs: Any) -> Any:
            (draw,) = (each for each in args if callable(each) and not hasattr(each, "module"))

            def record(shape: Sequence[int]) -> Tensor:
                noise: Tensor = draw(shape)
                seen[-1].append(noise)
                return noise

            seen.append([])
            return sampler(*(record if each is draw else each for each in args), **kwargs)

        return sample

    for name in ("sample_teacher", "few_step_rollout"):
        monkeypatch.setattr(demo, name, recorded(getattr(demo, name)))
    assert run_demo(config(), tmp_path, ranks) is not None
    teacher, *students = (torch.stack(each) for each in seen)
    for student in students:
        assert torch.equal(student[0], teacher[0])
        assert torch.equal(student, students[0])
        assert len(student.flatten(0, 1).unique(dim=0)) == student.shape[0] * student.shape[1]
