"""What goes wrong around a run must not cost what it has saved, nor be told as something else."""

import json
import logging
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter

from avd_trainer.data.batches import read_batches
from avd_trainer.data.examples import Example
from avd_trainer.data.in_memory import CaptionedLatents, InMemoryData
from avd_trainer.data.shard_writing import ShardWriter
from avd_trainer.data.sources import TrainingData
from avd_trainer.runtime.errors import UserError
from avd_trainer.runtime.ranks import Ranks, join_ranks
from avd_trainer.training import checkpoint as checkpoint_module
from avd_trainer.training.checkpoint import Checkpoints, latest_checkpoint, read_tensors
from avd_trainer.training.config import TrainConfig
from avd_trainer.training.run import train
from launches import Launch
from runs import EMBED, MakeConfig, both, saved_steps


def test_a_signal_to_the_whole_process_group_spares_the_workers_until_all_is_saved(
    teacher_folder: Path, data: TrainingData, tmp_path: Path
) -> None:
    """Launchers signal groups: the processes that read data get the signal too."""
    with ShardWriter(tmp_path / "data", text_length=4, text_dim=6) as writer:
        for index in range(len(data.clips)):
            example = data.clips[index]
            writer.add(example.latent, example.text, "", source=f"{index}.mp4")
        writer.set_unconditional(torch.zeros(1, 6), "")
    config = tmp_path / "config.yaml"
    config.write_text(
        f"method: {{kind: avd}}\nteacher: {teacher_folder}\nmax_steps: 100000\nbatch_size: 2\n"
        "checkpoint: {every: 100000}\n"
    )
    output = tmp_path / "run"
    command = [sys.executable, "-m", "avd_trainer", "train", config, "--data", tmp_path / "data", "--output", output]
    process = subprocess.Popen(
        [*map(str, command), "--set", "data.workers=1"],
        start_new_session=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    try:
        deadline = time.monotonic() + 120
        while not (output / "metrics.jsonl").exists() or not (output / "metrics.jsonl").read_text():
            assert process.poll() is None, process.communicate()[0]
            assert time.monotonic() < deadline
            time.sleep(0.05)
        os.killpg(process.pid, signal.SIGTERM)
        printed, _ = process.communicate(timeout=60)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == 0, printed
    assert "Run the same command again to go on" in " ".join(printed.split())
    assert len(saved_steps(output)) == 1


class Broken(InMemoryData):
    """Its third sample and those that follow are gone."""

    def __getitem__(self, index: int) -> Example:
        if index > 2:
            raise UserError("data-00001-of-00002.parquet is gone. Copy it again.")
        return super().__getitem__(index)


@pytest.mark.parametrize("workers", [0, 1])
def test_an_error_in_reading_is_told_in_its_own_words(clips: CaptionedLatents, workers: int) -> None:
    batches = read_batches(Broken(clips, EMBED), [[0, 1], [2, 3]], workers)
    assert len(next(batches).condition) == 2
    with pytest.raises(UserError, match=r"^data-00001-of-00002\.parquet is gone\. Copy it again\.$"):
        next(batches)


@pytest.mark.parametrize(
    "error",
    [torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("[gloo/transport/tcp/pair.cc:534] Connection closed")],
)
def test_what_is_no_fault_of_the_files_is_not_blamed_on_them(
    make_config: MakeConfig, data: TrainingData, ranks: Ranks, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    error: RuntimeError,
) -> None:  # fmt: skip
    train(make_config(max_steps=1), tmp_path, ranks, data=data)
    path = latest_checkpoint(tmp_path / "checkpoints")
    assert path is not None

    def fail(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr(checkpoint_module, "load", fail)
    with pytest.raises(type(error), match=str(error)[:8].replace("[", r"\[")) as raised:
        read_tensors(path, {})
    assert raised.value is error


def test_a_run_from_a_gpu_goes_on_without_one(
    make_config: MakeConfig, data: TrainingData, ranks: Ranks, tmp_path: Path
) -> None:
    """And the other way round: the state of a generator that is not there is not asked for."""

    def go(steps: int) -> None:
        train(make_config(max_steps=steps), tmp_path, ranks, data=data)

    go(1)
    path = latest_checkpoint(tmp_path / "checkpoints")
    assert path is not None
    state = json.loads((path / "state.json").read_text())
    (path / "state.json").write_text(json.dumps(state | {"device": "cuda"}))
    go(2)
    assert saved_steps(tmp_path)[-1] == 2


def train_in_own_folder(config: TrainConfig, folder: Path, data: TrainingData) -> None:
    with join_ranks() as ranks:
        train(config, folder / str(ranks.rank), ranks, data=data)


def test_nodes_that_do_not_share_the_output_folder_are_told_before_work(
    make_config: MakeConfig, data: TrainingData, tmp_path: Path
) -> None:
    with Launch(2, train_in_own_folder, make_config(), tmp_path, data) as launch:
        assert all(launch.wait())
        assert "Rank 1 does not see what the first rank wrote" in launch.printed(1)
        assert "Another rank of this run is gone" in launch.printed(0)
    assert not saved_steps(tmp_path / "0")


def test_an_old_checkpoint_that_cannot_be_removed_is_no_failure(
    make_config: MakeConfig, data: TrainingData, ranks: Ranks, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    def fail(self: Checkpoints) -> None:
        raise OSError("device is busy")

    monkeypatch.setattr(Checkpoints, "_remove_old", fail)
    caplog.set_level(logging.WARNING)
    assert train(make_config(max_steps=2, checkpoint={"every": 1}), tmp_path, ranks, data=data)
    assert saved_steps(tmp_path) == [1, 2]
    assert "could not be removed: device is busy" in caplog.text


def test_a_run_that_ends_by_an_error_still_finishes_the_checkpoint_in_work(
    make_config: MakeConfig,
    clips: CaptionedLatents,
    data: TrainingData,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    written = HuggingFaceStorageWriter.write_data

    def slow(self: HuggingFaceStorageWriter, *arguments: Any) -> Any:
        time.sleep(1.0)
        return written(self, *arguments)

    monkeypatch.setattr(HuggingFaceStorageWriter, "write_data", slow)

    class Ending(InMemoryData):
        reads = 0

        def __getitem__(self, index: int) -> Example:
            self.reads += 1
            # The monitor looks at all of them and at one for its shape, and a step takes two prompts and two clips.
            if self.reads > len(self) + 1 + 4:
                raise UserError("the second step's data is gone")
            return super().__getitem__(index)

    ending = Ending(clips, EMBED)
    config = make_config(method={"online_updates": 1}, max_steps=3, checkpoint={"every": 1})
    with join_ranks() as ranks, pytest.raises(UserError, match="second step's data is gone"):
        train(config, tmp_path, ranks, data=both(ending))
    assert saved_steps(tmp_path) == [1]


@pytest.mark.parametrize("value", [0.0, float("nan")])
def test_clips_that_stand_still_or_are_not_finite_are_refused(
    make_config: MakeConfig, clips: CaptionedLatents, data: TrainingData, ranks: Ranks, tmp_path: Path, value: float
) -> None:
    clips.latents.fill_(value)
    with pytest.raises(UserError, match=r"not finite or do not move.*avd data inspect"):
        train(make_config(), tmp_path, ranks, data=data)
