"""A demo is what a person waited for: it goes on where it stands, and nothing of it is deleted."""

import json
import shutil
from pathlib import Path

import pytest

from avd_trainer.config.loading import load_config
from avd_trainer.evaluation.clip_metrics import ClipMetrics
from avd_trainer.runtime.errors import UserError
from avd_trainer.runtime.ranks import Ranks, join_ranks
from avd_trainer.studies import demo
from avd_trainer.studies.demo import DemoConfig, run_demo
from avd_trainer.training.config import TrainConfig

SMALL = [
    "max_steps=2", "batch_size=2", "data.clips=16", "data.held_out=8", "samples.every=null", "evaluation.samples=8",
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
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, ClipMetrics]]:
    """A demo that was stopped before its second run, and went on."""
    folder = tmp_path_factory.mktemp("demo")
    with join_ranks() as ranks:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(demo, "train", Stopped("avd"))
            assert run_demo(config(), folder, ranks) is None
        trained = files(folder / "dmd" / "checkpoints")
        assert trained
        metrics = run_demo(config(), folder, ranks)
    assert files(folder / "dmd" / "checkpoints") == trained  # what was done before was not done again
    assert metrics is not None
    return folder, metrics


def test_a_stopped_demo_goes_on(finished: tuple[Path, dict[str, ClipMetrics]]) -> None:
    folder, metrics = finished
    assert list(metrics) == ["real", "teacher", "dmd", "avd"]
    assert json.loads((folder / "metrics.json").read_text()).keys() == metrics.keys()
    assert metrics["dmd"] != metrics["avd"]


def test_of_a_finished_demo_nothing_is_done_again(
    finished: tuple[Path, dict[str, ClipMetrics]], ranks: Ranks, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, metrics = finished
    before = files(folder)
    assert run_demo(config(), folder, ranks) == metrics
    assert files(folder) == before
    assert "is finished, and nothing is done again" in capsys.readouterr().out


def test_a_missing_picture_is_drawn_without_training_again(
    finished: tuple[Path, dict[str, ClipMetrics]], ranks: Ranks, tmp_path: Path
) -> None:
    folder, metrics = finished
    copy = tmp_path / "demo"
    shutil.copytree(folder, copy)
    (copy / "teacher.gif").unlink()
    trained = files(copy / "avd" / "checkpoints")
    assert run_demo(config(), copy, ranks) == metrics
    assert (copy / "teacher.gif").exists()
    assert files(copy / "avd" / "checkpoints") == trained


@pytest.mark.parametrize("change", ["max_steps=3", "method.motion.weight=0.5", "evaluation.samples=4"])
def test_other_settings_want_another_folder(
    finished: tuple[Path, dict[str, ClipMetrics]], ranks: Ranks, change: str
) -> None:
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
