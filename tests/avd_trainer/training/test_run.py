"""What a run leaves behind is the same however often it was stopped, killed and taken up again."""

import copy
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from safetensors import safe_open

from avd_trainer.commands.app import app
from avd_trainer.data.batches import Batch, read_batches
from avd_trainer.data.examples import CaptionedExamples, Example
from avd_trainer.data.in_memory import CaptionedLatents, InMemoryData
from avd_trainer.data.shard_writing import ShardWriter
from avd_trainer.data.sources import TrainingData
from avd_trainer.runtime.errors import UserError
from avd_trainer.runtime.files import read_json
from avd_trainer.runtime.ranks import Ranks, join_ranks
from avd_trainer.training import trainer as trainer_module
from avd_trainer.training.checkpoint import list_checkpoints, read_state
from avd_trainer.training.config import TrainConfig
from avd_trainer.training.folder import is_beginning
from avd_trainer.training.run import train
from launches import Launch, on_ranks
from runs import EMBED, MakeConfig, both, curve, files, in_memory, outcome, saved_steps

STUDENT = "student/diffusion_pytorch_model.safetensors"


def run(config: TrainConfig, folder: Path, data: TrainingData) -> bool:
    with join_ranks() as ranks:
        return train(config, folder, ranks, data=data)


# --- Taking up


def test_the_same_command_goes_on(configure: MakeConfig, data: TrainingData, tmp_path: Path, ranks: Ranks) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert train(configure(), whole, ranks, data=data)
    for steps in (1, 3):
        assert train(configure(max_steps=steps), parts, ranks, data=data)
        assert [step["step"] for step in curve(parts)] == list(range(1, steps + 1))
    # What is no part of the method may change.
    changed = configure(checkpoint={"every": 1}, logging={"tensorboard": True}, max_skipped_steps=3)
    assert train(changed, parts, ranks, data=data)
    assert (parts / STUDENT).read_bytes() == (whole / STUDENT).read_bytes()
    assert curve(parts) == curve(whole)
    assert saved_steps(whole) == [2, 4]
    assert saved_steps(parts) == [3, 4]


def test_a_run_goes_on_from_one_that_is_its_beginning_as_if_it_had_begun_itself(
    configure: MakeConfig, clips: CaptionedLatents, tmp_path: Path, ranks: Ranks
) -> None:
    """Also what the monitors say, who speak in the steps between the halves of both."""
    clips.latents.mul_(0.1)  # beside these, the samples of an untrained student are wild
    data, whole, parts = both(in_memory(clips)), tmp_path / "whole", tmp_path / "parts"
    one_step = {"few_steps": [1000]}  # so that all samples are finished, and judged
    shorter = configure(one_step, max_steps=13)
    longer = configure(one_step, max_steps=31, monitor_grace=6, monitor_patience=1)
    assert is_beginning(shorter, longer)
    for config, folder in ((longer, whole), (shorter, parts), (longer, parts)):
        assert train(config, folder, ranks, data=data)
    assert outcome(parts) == outcome(whole)
    assert {finding["step"] for finding in read_json(parts / "findings.json")["findings"]} >= {10}


def test_a_finished_run_stays_as_it_is(configure: MakeConfig, data: TrainingData, tmp_path: Path, ranks: Ranks) -> None:
    for _ in range(2):
        assert train(configure(max_steps=1), tmp_path, ranks, data=data)
        assert saved_steps(tmp_path) == [1]
    before = files(tmp_path)
    assert train(configure(max_steps=1), tmp_path, ranks, data=data)
    assert files(tmp_path) == before
    # Neither pickles nor the archives in which torch keeps them.
    assert not [name for name, content in before.items() if content.startswith((b"\x80", b"PK"))]


# --- Killed


def run_and_die(config: TrainConfig, folder: Path, data: TrainingData, rank: int, operation: int) -> bool:
    """Run; a rank is killed before its ``operation``-th access to the run's files, counted from 1."""
    seen = 0

    def watch(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal seen
        if event in ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.scandir"):
            # What goes with its folder is named by the folder's descriptor.
            within = event in ("os.remove", "os.rmdir") and arguments[1] != -1
            if within or str(arguments[0]).startswith(str(folder)):
                seen += 1
                if seen == operation:
                    os.kill(os.getpid(), signal.SIGKILL)

    if os.environ["RANK"] == str(rank):
        sys.addaudithook(watch)
    return run(config, folder, data)


def assert_whole(checkpoints: Path) -> None:
    """What bears the name of a checkpoint is one."""
    for _, folder in list_checkpoints(checkpoints):
        assert "config" in read_state(folder)
        shards = list(folder.glob("*.safetensors"))
        assert len(shards) == read_state(folder)["ranks"]
        for path in shards:
            with safe_open(path, framework="pt"):
                pass


def test_kill_9_at_any_moment_loses_nothing(configure: MakeConfig, data: TrainingData, tmp_path: Path) -> None:
    config = configure(max_steps=6, checkpoint={"every": 1})
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    run(config, whole, data)
    draws = random.Random(0)
    statuses = []
    # The first while the folder is being claimed and the log begun.
    for moment in [3, 4, 6, *(draws.randrange(9, 45) for _ in range(30))]:
        with Launch(1, run_and_die, config, killed, data, 0, moment) as launch:
            statuses += launch.wait()
        assert_whole(killed / "checkpoints")
        if statuses[-1] != -signal.SIGKILL:
            break
    assert statuses[-1] == 0
    assert len(statuses) > 5
    assert outcome(killed) == outcome(whole)
    assert not list(killed.rglob("*.part"))


def test_kill_9_of_any_rank_loses_nothing(configure: MakeConfig, data: TrainingData, tmp_path: Path) -> None:
    config = configure(checkpoint={"every": 1})
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    assert on_ranks(2, run, config, whole, data) == [True, True]
    with Launch(2, run_and_die, config, killed, data, 0, 30) as launch:
        # The other does not wait for long, and says what is the matter.
        assert launch.wait() == [-signal.SIGKILL, 1]
        assert "Another rank of this run is gone" in launch.printed(1)
    assert_whole(killed / "checkpoints")
    with Launch(2, run, config, killed, data) as launch:
        time.sleep(0.8)
        launch.signal(signal.SIGKILL)
    assert_whole(killed / "checkpoints")
    assert on_ranks(2, run, config, killed, data) == [True, True]
    assert outcome(killed) == outcome(whole)


def command_line(config: list[str]) -> None:
    app(["train", "tiny", *config], standalone_mode=False)


def test_torchrun_trains_and_says_that_a_rank_is_dead(teacher_folder: Path, tmp_path: Path) -> None:
    settings = {"teacher": teacher_folder, "max_steps": 10, "batch_size": 2, "method.online_updates": 1}
    settings |= {"data.clips": 2, "checkpoint.every": 1, "logging.tensorboard": "false", "samples.every": "null"}
    options = [part for key, value in settings.items() for part in ("--set", f"{key}={value}")]
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "avd_trainer"]
    command = [*launcher, "train", "tiny", "--output", str(killed), *options]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    with subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True) as process:
        while not saved_steps(killed):
            assert process.poll() is None, process.stderr.read()
            time.sleep(0.01)
        workers = psutil.Process(process.pid).children()
        assert len(workers) == 2
        workers[1].kill()
        _, printed = process.communicate(timeout=60)
    assert process.returncode != 0
    assert "Signal 9 (SIGKILL)" in printed
    assert_whole(killed / "checkpoints")
    assert 0 < saved_steps(killed)[-1] < 10
    for folder in (killed, whole):
        on_ranks(2, command_line, ["--output", str(folder), *options])
    assert outcome(killed) == outcome(whole)


# --- Asked to stop


class Signalling(InMemoryData):
    """A rank that reads its ``count``-th sample gets a signal."""

    def __init__(self, clips: CaptionedLatents, number: signal.Signals, rank: int, count: int) -> None:
        super().__init__(clips, EMBED)
        self.number, self.rank, self.count = number, rank, count

    def __getitem__(self, index: int) -> Example:
        self.count -= 1
        if self.count == 0 and os.environ["RANK"] == str(self.rank):
            os.kill(os.getpid(), self.number)
        return super().__getitem__(index)


def run_stop_and_go_on(
    config: TrainConfig, stopped: Path, whole: Path, signalling: Signalling
) -> tuple[bool, list[int], bool, bool]:
    """Whether each of three runs was done, and what the first, which got a signal, had saved."""
    data = both(signalling)
    with join_ranks() as ranks:
        first = train(config, stopped, ranks, data=data)
        saved = saved_steps(stopped)
        ranks.barrier()
        return first, saved, train(config, stopped, ranks, data=data), train(config, whole, ranks, data=data)


@pytest.mark.parametrize(
    ("size", "number", "rank", "count"),
    [
        # The first rank has looked at all 11 samples before it trains, and takes 4 a step; with two ranks the other
        # has looked at one, and takes 2.
        (1, signal.SIGTERM, 0, 11 + 4 + 1),
        (2, signal.SIGUSR1, 1, 1 + 2 + 1),
    ],
)
def test_a_signal_to_any_rank_saves_the_step_in_work_and_ends_the_run(
    configure: MakeConfig,
    clips: CaptionedLatents,
    tmp_path: Path,
    size: int,
    number: signal.Signals,
    rank: int,
    count: int,
) -> None:
    config, signalling = configure(checkpoint={"every": 100}), Signalling(clips, number, rank, count)
    stopped, whole = tmp_path / "stopped", tmp_path / "whole"
    for result in on_ranks(size, run_stop_and_go_on, config, stopped, whole, signalling):
        assert result == (False, [2], True, True)
    assert outcome(stopped) == outcome(whole)


def test_a_signal_in_the_last_step_changes_nothing(
    configure: MakeConfig, clips: CaptionedLatents, tmp_path: Path
) -> None:
    config = configure(max_steps=1)
    assert on_ranks(1, run, config, tmp_path, both(Signalling(clips, signal.SIGTERM, 0, 11 + 1))) == [True]
    assert (tmp_path / STUDENT).exists()


# --- What the ranks have of their own


def run_and_list(config: TrainConfig, folder: Path, data: TrainingData) -> list[int]:
    """Run; returns the indices of the clips that this rank trained on."""
    clips, read = copy.copy(data.clips), []

    def listing(source: CaptionedExamples, batches: Iterable[list[int]], workers: int) -> Iterator[Batch]:
        def listed() -> Iterator[list[int]]:
            for indices in batches:
                read.extend(indices if source is clips else [])
                yield indices

        return read_batches(source, listed(), workers)

    trainer_module.read_batches = listing
    with join_ranks() as ranks:
        assert train(config, folder, ranks, data=data._replace(clips=clips))
    return read


def test_another_number_of_ranks_goes_on_in_the_middle_of_an_epoch(
    configure: MakeConfig, data: TrainingData, tmp_path: Path
) -> None:
    changing, whole = tmp_path / "changing", tmp_path / "whole"
    run(configure(max_steps=5), whole, data)
    read = [
        on_ranks(size, run_and_list, configure(max_steps=steps), changing, data)
        for size, steps in ((2, 2), (1, 3), (2, 5))
    ]
    assert [[len(indices) for indices in ranks] for ranks in read] == [[2, 2], [2], [2, 2]]
    # Two clips in each of five steps are an epoch of ten.
    assert sorted(index for ranks in read for indices in ranks for index in indices) == list(range(10))
    for step, expected in zip(curve(changing), curve(whole), strict=True):
        for name in ("loss", "online/loss", "gradient_norm", "regression/timesteps", "regression/means"):
            assert step[name] == pytest.approx(expected[name], rel=1e-3), name


class Drawing(InMemoryData):
    """Adds noise from the process's own generator, which the trainer itself never draws from."""

    def __getitem__(self, index: int) -> Example:
        sample = super().__getitem__(index)
        assert sample.latent is not None
        return sample._replace(latent=sample.latent + 0.1 * torch.randn_like(sample.latent))


def run_in_two_parts(config: TrainConfig, part: TrainConfig, folder: Path, data: TrainingData) -> None:
    with join_ranks() as ranks:
        train(config, folder / "whole", ranks, data=data)
        train(part, folder / "parts", ranks, data=data)
        torch.manual_seed(99)
        train(config, folder / "parts", ranks, data=data)


def test_each_rank_draws_on_from_where_it_stood(configure: MakeConfig, clips: CaptionedLatents, tmp_path: Path) -> None:
    on_ranks(2, run_in_two_parts, configure(), configure(max_steps=2), tmp_path, both(Drawing(clips, EMBED)))
    assert outcome(tmp_path / "parts") == outcome(tmp_path / "whole")
    # A rank reads its own: those of the first would not do, it has drawn more.
    generators = {"0.cpu": torch.empty(0), "1.cpu": torch.empty(0)}
    for path in (tmp_path / "whole" / "checkpoints" / "step-00000004").glob("*.safetensors"):
        with safe_open(path, framework="pt") as file:
            for name in generators:
                if f"rng/{name}" in file.keys():  # noqa: SIM118 (not iterable by itself)
                    generators[name] = file.get_tensor(f"rng/{name}")
    first, second = generators.values()
    assert len(first) == len(second) > 0
    assert not torch.equal(first, second)


# --- The data


@pytest.fixture
def shards(data: TrainingData, tmp_path: Path) -> Path:
    """Three files of four, four and two clips."""
    folder = tmp_path / "shards"
    with ShardWriter(folder, text_length=4, text_dim=6, rows_per_shard=4) as writer:
        for index in range(len(data.clips)):
            example = data.clips[index]
            writer.add(example.latent, example.text, example.caption, source=f"{index}.mp4")
        writer.set_unconditional(data.clips.unconditional()[:1], "")
    return folder


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


@pytest.mark.parametrize("damage", [Path.unlink, truncate])
def test_data_that_is_gone_or_cut_is_named_and_the_run_goes_on_when_it_is_back(
    configure: MakeConfig, shards: Path, tmp_path: Path, ranks: Ranks, damage: Callable[[Path], None]
) -> None:
    def go(folder: Path, **changes: Any) -> None:
        train(configure(data={"kind": "shards", "path": str(shards), "workers": 0}, **changes), folder, ranks)

    go(tmp_path / "run", max_steps=2)
    path = shards / "data-00001-of-00003.parquet"
    content = path.read_bytes()
    damage(path)
    before = files(tmp_path / "run")
    with pytest.raises(UserError, match=str(path)):
        go(tmp_path / "run")
    assert files(tmp_path / "run") == before | {"config.yaml": (tmp_path / "run" / "config.yaml").read_bytes()}
    path.write_bytes(content)
    go(tmp_path / "run")
    go(tmp_path / "whole")
    assert outcome(tmp_path / "run") == outcome(tmp_path / "whole")


def test_other_data_is_refused(configure: MakeConfig, shards: Path, tmp_path: Path, ranks: Ranks) -> None:
    def go(**changes: Any) -> None:
        train(configure(data={"kind": "shards", "path": str(shards), "workers": 0}, **changes), tmp_path / "run", ranks)

    go(max_steps=2)
    shutil.rmtree(shards)
    with ShardWriter(shards, text_length=4, text_dim=6, rows_per_shard=4) as writer:
        for index in range(11):
            writer.add(torch.randn(16, 3, 4, 4), torch.ones(2, 6), "", source=f"{index}.mp4")
        writer.set_unconditional(torch.zeros(1, 6), "")
    with pytest.raises(
        UserError, match=r"data-0000\d-of-00003\.parquet is not the file that the run to be resumed read"
    ):
        go()
