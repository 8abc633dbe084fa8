import json
import math
import os
import sys
import time
import tracemalloc
import types
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.summary.writer.record_writer import RecordWriter
from torch.utils._python_dispatch import TorchDispatchMode

from avd_trainer.config.sections import WandbConfig
from avd_trainer.runtime.errors import UserError
from avd_trainer.training.metrics_log import MetricsLog, read_series
from disks import disk_with_room_for


def log(folder: Path, steps: range, **options: Any) -> None:
    """Steps whose loss is a tenth of their number."""
    with MetricsLog(folder, **options) as metrics:
        for step in steps:
            metrics.append(step, {"loss": torch.tensor(step / 10)})


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def wait_for_another_name() -> None:
    """TensorBoard orders its files by name, which has whole seconds, and behind them 10 before 9."""
    time.sleep(1 - time.time() % 1)


def drawn(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """What TensorBoard shows: per name, steps and values."""
    events = EventAccumulator(str(folder / "tensorboard"), size_guidance={"scalars": 0})
    events.Reload()
    return {name: [(e.step, e.value) for e in events.Scalars(name)] for name in events.Tags()["scalars"]}


def test_a_step_is_a_line_and_comes_back_as_numbers(tmp_path: Path) -> None:
    metrics = {"loss": torch.tensor(0.5), "regression/weights": torch.tensor([0.25, 1.0]), "lr": 1e-4}
    with MetricsLog(tmp_path, tensorboard=False) as history:
        assert history.append(1, metrics) == {"loss": 0.5, "regression/weights": [0.25, 1.0], "lr": 1e-4}
        # Already there, for whoever watches or when the run is killed.
        assert lines(tmp_path) == [{"step": 1, "loss": 0.5, "regression/weights": [0.25, 1.0], "lr": 1e-4}]
        history.append(2, {"loss": torch.tensor(0.25)})
    path = tmp_path / "metrics.jsonl"
    assert read_series(path, "loss") == [0.5, 0.25]
    assert read_series(path, "regression/weights") == [[0.25, 1.0]]
    assert read_series(path, "other") == []
    assert os.listdir(tmp_path) == ["metrics.jsonl"]


def test_what_is_not_finite_is_null_in_the_file(tmp_path: Path) -> None:
    with MetricsLog(tmp_path, tensorboard=False) as history:
        values = history.append(1, {"loss": torch.tensor(math.nan), "w": torch.tensor([1.0, math.inf]), "lr": math.inf})
    assert math.isnan(values["loss"])  # type: ignore[arg-type]
    assert lines(tmp_path) == [{"step": 1, "loss": None, "w": [1.0, None], "lr": None}]
    (loss,), (weights,) = (read_series(tmp_path / "metrics.jsonl", name) for name in ("loss", "w"))
    assert math.isnan(loss)  # type: ignore[arg-type]
    assert weights[0] == 1  # type: ignore[index]
    assert math.isnan(weights[1])  # type: ignore[index]


def test_all_tensors_of_a_step_come_in_one_transfer(tmp_path: Path) -> None:
    class Calls(TorchDispatchMode):
        count = Counter[str]()

        def __torch_dispatch__(self, function: Any, kinds: Any, args: Any = (), kwargs: Any = None) -> Any:
            self.count[function.overloadpacket.__name__] += 1
            return function(*args, **(kwargs or {}))

    metrics = {f"scalar/{i}": torch.tensor(float(i)) for i in range(5)} | {"list": torch.arange(3)}
    with MetricsLog(tmp_path, tensorboard=False) as history, Calls() as calls:
        assert history.append(1, metrics)["list"] == [0, 1, 2]
    assert calls.count["cat"] == 1
    assert calls.count["_local_scalar_dense"] == 0  # what item() of a single tensor is


@pytest.mark.gpu
def test_tensors_of_two_devices_come_in_the_order_given(tmp_path: Path) -> None:
    metrics = {"a": torch.tensor(1.0, device="cuda"), "b": torch.tensor(2.0), "c": torch.tensor([3.0], device="cuda")}
    with MetricsLog(tmp_path, tensorboard=False) as history:
        assert list(history.append(1, metrics).items()) == [("a", 1.0), ("b", 2.0), ("c", [3.0])]


def test_a_resumed_run_keeps_the_steps_up_to_its_checkpoint(tmp_path: Path) -> None:
    log(tmp_path, range(1, 6))
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "lo')  # killed while it wrote
    wait_for_another_name()
    log(tmp_path, range(4, 8), resume_step=3)
    assert [line["step"] for line in lines(tmp_path)] == [1, 2, 3, 4, 5, 6, 7]
    assert [step for step, _ in drawn(tmp_path)["loss"]] == [1, 2, 3, 4, 5, 6, 7]
    assert not list(tmp_path.glob("*.part"))


@pytest.mark.parametrize("torn", ["", '{"st', '{"step": 3, "loss": 0.3', "3\n", "\0\0\0\n", '{"loss": 1}\n', "é"])
def test_a_torn_line_never_stays(tmp_path: Path, torn: str) -> None:
    log(tmp_path, range(1, 3), tensorboard=False)
    with (tmp_path / "metrics.jsonl").open("a", encoding="latin-1") as file:
        file.write(torn)
    assert read_series(tmp_path / "metrics.jsonl", "loss") == pytest.approx([0.1, 0.2])
    log(tmp_path, range(3, 4), resume_step=2, tensorboard=False)
    assert [line["step"] for line in lines(tmp_path)] == [1, 2, 3]


def test_a_last_line_without_its_end_is_kept_whole(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 0.5}')
    log(tmp_path, range(2, 3), resume_step=1, tensorboard=False)
    assert [line["step"] for line in lines(tmp_path)] == [1, 2]


def test_a_run_that_begins_anew_keeps_nothing(tmp_path: Path) -> None:
    """It was killed before its first checkpoint."""
    log(tmp_path, range(1, 6))
    wait_for_another_name()
    log(tmp_path, range(1, 3))
    assert [line["step"] for line in lines(tmp_path)] == [1, 2]
    assert [step for step, _ in drawn(tmp_path)["loss"]] == [1, 2]


def test_a_failed_replacement_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log(tmp_path, range(1, 6), tensorboard=False)

    def fail(*_: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(UserError, match=r"metrics.jsonl cannot be written: Permission denied"):
        MetricsLog(tmp_path, resume_step=2, tensorboard=False)
    assert len(lines(tmp_path)) == 5


def test_tensorboard_has_scalars_and_the_regression_for_each_few_step(tmp_path: Path) -> None:
    with MetricsLog(tmp_path) as history:
        metrics = {
            "regression/loss": torch.tensor(0.5),
            "regression/timesteps": torch.tensor([1000.0, 937.5, 1000.0]),
            "regression/sample_losses": torch.tensor([1.0, 4.0, 2.0]),
            "regression/other": torch.tensor([1.0, 2.0]),
            "list": torch.tensor([1.0, 2.0, 3.0]),
            "empty": torch.tensor([]),
        }
        history.append(7, metrics)
    assert drawn(tmp_path) == {
        "regression/loss": [(7, 0.5)],
        "regression/sample_losses": [(7, pytest.approx(7 / 3))],
        "regression/sample_losses/t1000": [(7, 1.5)],
        "regression/sample_losses/t937.5": [(7, 4.0)],
        "regression/other": [(7, 1.5)],
        "list": [(7, 2.0)],
    }


def test_tensorboard_has_each_step_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its thread may lag behind; a run that is killed must not have lost what its checkpoint has."""
    write = RecordWriter.write
    monkeypatch.setattr(RecordWriter, "write", lambda writer, data: (time.sleep(0.05), write(writer, data)))
    with MetricsLog(tmp_path) as history:
        for step in (1, 2, 3):
            history.append(step, {"loss": 0.5})
            assert drawn(tmp_path)["loss"][-1] == (step, 0.5)


def test_tensorboard_that_is_missing_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(UserError, match=r"`pip install tensorboard`, or set logging.tensorboard=false"):
        MetricsLog(tmp_path)


def test_a_full_disk_is_an_error_that_names_the_file(tmp_path: Path) -> None:
    with MetricsLog(tmp_path, tensorboard=False) as history:
        history.append(1, {"loss": 0.5})
        with disk_with_room_for(30), pytest.raises(UserError, match=r"metrics.jsonl cannot be written: .*Free some"):
            history.append(2, {"loss": 0.25})
    assert read_series(tmp_path / "metrics.jsonl", "loss") == [0.5]


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "tensorboard").touch()
    with pytest.raises(UserError, match="tensorboard cannot be written"):
        MetricsLog(tmp_path)
    with pytest.raises(UserError, match=r"metrics.jsonl cannot be written: No such file"):
        MetricsLog(tmp_path / "missing", tensorboard=False)


def test_memory_does_not_grow_with_the_run(tmp_path: Path) -> None:
    with MetricsLog(tmp_path) as history:
        metrics = {"loss": torch.tensor(0.5), "regression/weights": torch.rand(64)}
        for step in range(1, 51):
            history.append(step, metrics)
        tracemalloc.start()
        before, _ = tracemalloc.get_traced_memory()
        for step in range(51, 251):
            history.append(step, metrics)
        after, _ = tracemalloc.get_traced_memory()
        tracemalloc.stop()
    assert after - before < 100_000  # 200 steps of 65 numbers would be 400 kB


class FakeWandb(types.ModuleType):
    """A stand-in for the network service: it notes what it is told."""

    class Error(Exception):
        pass

    def __init__(self) -> None:
        super().__init__("wandb")
        self.started: list[dict[str, Any]] = []
        self.logged: list[dict[str, float]] = []
        self.metrics: list[tuple[str, str]] = []
        self.finished = 0

    def init(self, **options: Any) -> Any:
        if options["mode"] is None:
            raise self.Error("No API key configured.")
        self.started.append(options)
        return types.SimpleNamespace(
            define_metric=lambda name, step_metric: self.metrics.append((name, step_metric)),
            log=self.logged.append,
            finish=self.finish,
        )

    def finish(self) -> None:
        self.finished += 1


@pytest.fixture
def wandb(monkeypatch: pytest.MonkeyPatch) -> FakeWandb:
    module = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", module)
    return module


def test_weights_and_biases_gets_what_tensorboard_gets(tmp_path: Path, wandb: FakeWandb) -> None:
    config = WandbConfig(project="videos", mode="offline")
    log(tmp_path, range(1, 3), wandb=config, run_config={"seed": 3})
    (started,) = wandb.started
    assert (started["project"], started["name"], started["config"]) == ("videos", tmp_path.name, {"seed": 3})
    assert started["dir"] == tmp_path
    assert wandb.metrics == [("*", "step")]
    assert [(entry["step"], entry["loss"]) for entry in wandb.logged] == [(s, v) for s, v in drawn(tmp_path)["loss"]]
    assert wandb.finished == 1


def test_a_resumed_run_is_the_same_run_of_weights_and_biases_and_a_new_one_is_not(
    tmp_path: Path, wandb: FakeWandb
) -> None:
    config = WandbConfig(project="videos", entity="team", name="mine", mode="offline")
    for resume_step in (0, 1, 0):
        log(tmp_path, range(resume_step + 1, resume_step + 2), resume_step=resume_step, wandb=config)
    first, resumed, new = wandb.started
    assert first["id"] == resumed["id"] != new["id"]
    assert {run["resume"] for run in wandb.started} == {"allow"}
    assert (first["entity"], first["name"]) == ("team", "mine")


def test_weights_and_biases_that_is_missing_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UserError, match=r"Install it with `pip install wandb`"):
        MetricsLog(tmp_path, wandb=WandbConfig(project="videos"))


def test_without_an_account_there_is_a_way_on_and_nothing_is_lost(tmp_path: Path, wandb: FakeWandb) -> None:
    log(tmp_path, range(1, 3), tensorboard=False)
    with pytest.raises(UserError, match=r"No API key configured. Run `wandb login`, set logging.wandb.mode=offline"):
        MetricsLog(tmp_path, wandb=WandbConfig(project="videos"))
    assert len(lines(tmp_path)) == 2


@pytest.mark.parametrize("options", [{}, {"project": ""}, {"project": "p", "mode": "shared"}, {"project": "p", "x": 1}])
def test_a_wrong_configuration_is_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        WandbConfig(**options)
