"""Whose the folder of a run is, and whether a run may go on in it."""

import fcntl
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from avd_trainer.config.loading import ConfigError, load_config, save_config
from avd_trainer.data.sources import TrainingData
from avd_trainer.runtime.errors import UserError
from avd_trainer.runtime.ranks import Ranks, join_ranks
from avd_trainer.training import folder
from avd_trainer.training.checkpoint import read_state
from avd_trainer.training.config import TrainConfig
from avd_trainer.training.folder import check_run, claim_run, is_beginning, locked, method_of_run
from avd_trainer.training.run import train
from launches import Launch
from runs import MakeConfig, files, outcome


def test_another_configuration_is_refused_and_nothing_is_written(
    configure: MakeConfig, data: TrainingData, tmp_path: Path, ranks: Ranks
) -> None:
    train(configure(max_steps=1), tmp_path, ranks, data=data)
    before = files(tmp_path)
    other = {"student": {"optimizer": {"lr": 0.002}}, "online": {"lora": {"rank": 2}}}
    with pytest.raises(ConfigError) as raised:
        train(configure(method=other, max_steps=2, seed=5), tmp_path, ranks, data=data)
    message = str(raised.value)
    assert f"not the one that {tmp_path}/checkpoints/step-00000001 was saved with" in message
    assert "  seed: 0 there, 5 now\n" in message
    assert "  method.student.optimizer.lr: 0.001 there, 0.002 now\n" in message
    assert "  method.online.lora.rank: None there, 2 now\n" in message
    assert "max_steps" not in message
    assert "Run with the saved values to go on, or choose a new --output" in message
    assert files(tmp_path) == before


@pytest.mark.parametrize(
    ("kind", "method"),
    [
        ("frame_interpolation", {"optimizer": {"schedule": "cosine"}}),
        ("avd", {"online": {"optimizer": {"schedule": "cosine"}}}),
    ],
)
def test_a_schedule_that_depends_on_the_length_of_a_run_fixes_it(
    make_config: MakeConfig, data: TrainingData, tmp_path: Path, ranks: Ranks, kind: str, method: dict[str, Any]
) -> None:
    changes = {"logging": {"tensorboard": False}}
    data = data._replace(held_out=data.clips)
    train(make_config(kind, method=method, max_steps=1, **changes), tmp_path, ranks, data=data)
    with pytest.raises(ConfigError, match="  max_steps: 1 there, 2 now"):
        train(make_config(kind, method=method, max_steps=2, **changes), tmp_path, ranks, data=data)


@pytest.mark.parametrize(
    ("kind", "of_shorter", "of_longer", "expected"),
    [
        ("dmd", {"max_steps": 200}, {"max_steps": 300}, True),
        ("dmd", {"max_steps": 300}, {"max_steps": 300}, True),
        ("dmd", {"max_steps": 300}, {"max_steps": 200}, False),
        ("vpae", {"max_steps": 800}, {"max_steps": 900}, True),
        ("vpae", {"max_steps": 200}, {"max_steps": 300}, False),  # a discriminator has 25 steps to learn, and 37
        ("vpae", {"max_steps": 200}, {"max_steps": 300, "monitor_patience": 25}, True),
        ("dmd", {"max_steps": 10}, {"max_steps": 20}, False),  # the monitors judge from step 5 on, and from 10 on
        ("dmd", {"max_steps": 10}, {"max_steps": 20, "monitor_grace": 5}, True),
        ("dmd", {"max_steps": 200}, {"max_steps": 300, "seed": 1}, False),
        (
            "frame_interpolation",
            {"max_steps": 200, "method": {"optimizer": {"schedule": "cosine"}}},
            {"max_steps": 300, "method": {"optimizer": {"schedule": "cosine"}}},
            False,
        ),
    ],
)
def test_a_run_is_the_beginning_of_one_that_is_longer_and_otherwise_the_same(
    make_config: MakeConfig, kind: str, of_shorter: dict[str, Any], of_longer: dict[str, Any], expected: bool
) -> None:
    assert is_beginning(make_config(kind, **of_shorter), make_config(kind, **of_longer)) is expected


def test_options_that_came_to_be_since_a_run_was_started_are_at_their_defaults(
    configure: MakeConfig, data: TrainingData, tmp_path: Path, ranks: Ranks, monkeypatch: pytest.MonkeyPatch
) -> None:
    train(configure(max_steps=1), tmp_path, ranks, data=data)

    def without_new_options(checkpoint: Path) -> dict[str, Any]:
        state = read_state(checkpoint)
        for name in ("judged", "deviation"):
            del state["config"]["method"]["regression"][name]
        del state["config"]["method"]["sampling_shift"]
        return state

    monkeypatch.setattr(folder, "read_state", without_new_options)
    # Training does not sample the teacher, so how that is done may change.
    assert check_run(tmp_path, configure(max_steps=2, method={"sampling_shift": 3.0})) == 1
    with pytest.raises(ConfigError, match=r"  method\.regression\.judged: 'loss' there, 'excess' now"):
        check_run(tmp_path, configure(max_steps=2, method={"regression": {"judged": "excess"}}))


def test_the_run_of_another_method_is_said_to_be_one(make_config: MakeConfig, tmp_path: Path) -> None:
    save_config(make_config("frame_interpolation"), tmp_path / "config.yaml", "avd train")
    with pytest.raises(UserError) as raised:
        claim_run(tmp_path, make_config())
    assert str(raised.value) == (
        f"--output {tmp_path} holds a run of method frame_interpolation, and this is avd. Choose a new --output."
    )
    assert os.listdir(tmp_path) == ["config.yaml"]


@pytest.mark.parametrize(
    "text",
    [
        "method: {kind: avd}\n",  # not by avd train: it says so in what it writes
        "command: avd data encode\nmethod: {kind: avd}\n",
        "command: avd train\nmethod: avd\n",
        "command: avd train\n",
        "- command\n",
        "max_steps: [\n",
        "",
    ],
)
def test_what_no_run_wrote_is_no_run(tmp_path: Path, text: str) -> None:
    (tmp_path / "config.yaml").write_text(text)
    assert method_of_run(tmp_path) is None


def test_the_method_of_a_run_is_read_from_its_folder(make_config: MakeConfig, tmp_path: Path) -> None:
    assert method_of_run(tmp_path / "nowhere") is None
    for kind in ("avd", "dmd", "flow_matching"):
        save_config(make_config(kind), tmp_path / "config.yaml", "avd train")
        assert method_of_run(tmp_path) == kind
    assert load_config(TrainConfig, str(tmp_path / "config.yaml")) == make_config("flow_matching")


def test_a_run_that_has_saved_nothing_starts_over(
    configure: MakeConfig, data: TrainingData, tmp_path: Path, ranks: Ranks
) -> None:
    for name, seed in (("first", 0), ("second", 1), ("whole", 1)):
        folder = tmp_path / ("whole" if name == "whole" else "run")
        train(configure(max_steps=1, seed=seed), folder, ranks, data=data)
        if name == "first":
            shutil.rmtree(folder / "checkpoints")
    assert outcome(tmp_path / "run") == outcome(tmp_path / "whole")


def test_a_folder_of_something_else_is_left_alone(make_config: MakeConfig, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match=r"is not empty and holds no run\. Choose a new --output"):
        claim_run(tmp_path, make_config())
    assert os.listdir(tmp_path) == ["notes.txt"]


def train_where(config: TrainConfig, folder: Path, data: TrainingData) -> None:
    with join_ranks() as ranks:
        train(config, folder, ranks, data=data)


def test_a_folder_that_another_process_trains_in_is_left_alone(
    configure: MakeConfig, data: TrainingData, tmp_path: Path
) -> None:
    with locked(tmp_path), Launch(1, train_where, configure(), tmp_path, data) as launch:
        assert launch.wait() == [1]
        assert f"Another process is working in {tmp_path}" in launch.printed()
    assert os.listdir(tmp_path) == [".lock"]
    with (tmp_path / ".lock").open("w") as file:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # it was let go of
