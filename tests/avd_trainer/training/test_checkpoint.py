import os
import resource
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor
from torch.distributed.tensor import Shard, distribute_tensor

from avd_core import AdaptiveRegressionLoss, CollapseFinding, LossMeanCache
from avd_trainer.data.sources import TrainingData
from avd_trainer.runtime.errors import UserError
from avd_trainer.runtime.ranks import Ranks, join_ranks
from avd_trainer.training import checkpoint
from avd_trainer.training.checkpoint import Checkpoints, latest_checkpoint, list_checkpoints, read_state, read_tensors
from avd_trainer.training.config import TrainConfig
from avd_trainer.training.trainer import Trainer
from launches import on_ranks
from runs import MakeConfig
from tensors import assert_same_state

Named = dict[str, dict[str, Tensor]]
MakeCheckpoints = Callable[..., Checkpoints]


@pytest.fixture
def make_checkpoints(tmp_path: Path, ranks: Ranks) -> MakeCheckpoints:
    return lambda **options: Checkpoints(tmp_path / "checkpoints", ranks, **options)


def tensors(value: float = 0.0) -> Named:
    return {"model": {"weight": torch.full((3, 4), value), "bias": torch.full((), value)}, "rng": {"0": torch.ones(2)}}


def save(checkpoints: Checkpoints, *steps: int) -> Path:
    for step in steps:
        checkpoints.save(step, tensors(step), {"step": step})
    checkpoints.wait()
    latest = latest_checkpoint(checkpoints.folder)
    assert latest is not None
    return latest


def read(folder: Path) -> float:
    """The value that all tensors of a checkpoint have."""
    found = tensors(torch.nan)
    read_tensors(folder, found)
    weight, bias = found["model"].values()
    assert torch.equal(weight, bias.expand(3, 4))
    assert torch.equal(found["rng"]["0"], torch.ones(2))
    assert read_state(folder)["step"] == bias
    return bias.item()


def steps(checkpoints: Checkpoints) -> list[int]:
    return [step for step, _ in list_checkpoints(checkpoints.folder)]


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """Nothing is written before this event is set."""
    opened = threading.Event()

    class Slow(checkpoint.HuggingFaceStorageWriter):
        def write_data(self, *args: Any) -> Any:
            opened.wait(20)
            return super().write_data(*args)

    monkeypatch.setattr(checkpoint, "HuggingFaceStorageWriter", Slow)
    yield opened
    opened.set()


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="counts this process's threads, as Linux lists them")
def test_no_threads_are_left(make_checkpoints: MakeCheckpoints) -> None:
    """Idle OpenMP threads beyond the number of cores slow every later step of the run."""

    def threads() -> set[str]:
        return set(os.listdir("/proc/self/task"))

    many = {"model": {f"weight {index}": torch.full((8,), float(index)) for index in range(2000)}}
    checkpoints = make_checkpoints()
    before, threads_before = threads(), torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        checkpoints.save(1, many, {"step": 1})
        checkpoints.wait()
        read_tensors(checkpoints.path(1), many)
    finally:
        torch.set_num_threads(threads_before)
    deadline = time.monotonic() + 10
    while threads() - before and time.monotonic() < deadline:
        time.sleep(0.01)  # the writing thread ends a moment later
    assert not threads() - before


def test_a_checkpoint_is_of_the_moment_of_the_call(make_checkpoints: MakeCheckpoints, gate: threading.Event) -> None:
    checkpoints = make_checkpoints()
    values, state = tensors(1.0), {"step": 1, "list": [1]}
    checkpoints.save(1, values, state)  # comes back although nothing is written yet
    for value in values["model"].values():
        value.fill_(2.0)
    state["step"], state["list"] = 2, [2]
    assert latest_checkpoint(checkpoints.folder) is None
    gate.set()
    checkpoints.wait()
    latest = latest_checkpoint(checkpoints.folder)
    assert latest == checkpoints.folder / "step-00000001"
    assert read(latest) == 1.0
    assert read_state(latest) == {"step": 1, "list": [1]}


def test_one_is_written_at_a_time(make_checkpoints: MakeCheckpoints, gate: threading.Event) -> None:
    checkpoints = make_checkpoints()
    checkpoints.save(1, tensors(1), {"step": 1})
    threading.Timer(0.2, gate.set).start()
    checkpoints.save(2, tensors(2), {"step": 2})
    assert steps(checkpoints)[0] == 1  # the second call waited for the first to be visible
    checkpoints.wait()
    assert steps(checkpoints) == [1, 2]


def test_a_torn_one_is_not_picked_up_and_goes(make_checkpoints: MakeCheckpoints) -> None:
    whole = save(make_checkpoints(), 1)
    torn = whole.with_name("step-00000002.part")
    shutil.copytree(whole, torn)
    (whole.parent / "step-3").mkdir()
    (whole.parent / "step-00000004x").mkdir()
    assert latest_checkpoint(whole.parent) == whole
    again = make_checkpoints()
    assert not torn.exists()
    assert steps(again) == [1]
    assert read(save(again, 2)) == 2.0


def test_there_is_none_in_a_folder_that_is_not_there(tmp_path: Path) -> None:
    assert latest_checkpoint(tmp_path / "nowhere") is None


@pytest.mark.parametrize(
    ("options", "kept"),
    [
        ({}, [4, 5]),
        ({"keep_latest": 1}, [5]),
        ({"keep_latest": 3}, [3, 4, 5]),
        ({"keep_latest": 1, "keep_every": 2}, [2, 4, 5]),
    ],
)
def test_the_newest_stay_and_those_of_chosen_steps(
    make_checkpoints: MakeCheckpoints, options: dict[str, int], kept: list[int]
) -> None:
    checkpoints = make_checkpoints(**options)
    save(checkpoints, 1, 2, 3, 4, 5)
    assert steps(checkpoints) == kept
    assert sorted(os.listdir(checkpoints.folder)) == [f"step-{step:08d}" for step in kept]
    assert [read(folder) for _, folder in list_checkpoints(checkpoints.folder)] == kept


def test_a_marked_one_stays_and_does_not_count(make_checkpoints: MakeCheckpoints) -> None:
    checkpoints = make_checkpoints()
    (save(checkpoints, 1) / "keep").touch()
    save(checkpoints, 2, 3, 4)
    assert steps(checkpoints) == [1, 3, 4]


def test_a_removal_that_is_cut_short_leaves_nothing_torn(
    make_checkpoints: MakeCheckpoints, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoints = make_checkpoints(keep_latest=1)
    first = save(checkpoints, 1)
    monkeypatch.setattr(shutil, "rmtree", lambda folder, **_: (folder / "state.json").unlink())
    save(checkpoints, 2)
    assert [folder.name for folder in checkpoints.folder.iterdir() if folder.name != "step-00000002"] == [
        f"{first.name}.part"
    ]
    assert steps(checkpoints) == [2]
    monkeypatch.undo()
    make_checkpoints()
    assert os.listdir(checkpoints.folder) == ["step-00000002"]


def test_nothing_is_pickled(make_checkpoints: MakeCheckpoints) -> None:
    files = [path for path in save(make_checkpoints(), 1).rglob("*") if path.is_file()]
    assert {path.suffix for path in files} == {".json", ".safetensors"}
    for path in files:
        assert not path.read_bytes().startswith((b"\x80", b"PK"))  # a pickle, or the archive in which torch keeps one
        if path.suffix == ".safetensors":
            with safe_open(path, framework="pt") as file:
                assert "model/weight" in file.keys()  # noqa: SIM118 (not iterable by itself)


# --- What cannot be written


def test_a_place_that_is_taken_is_named_and_the_earlier_one_stays(make_checkpoints: MakeCheckpoints) -> None:
    checkpoints = make_checkpoints()
    earlier = save(checkpoints, 1)
    (checkpoints.folder / "step-00000002.part").touch()
    with pytest.raises(UserError) as raised:
        checkpoints.save(2, tensors(2), {"step": 2})
    message = str(raised.value)
    assert f"Checkpoint {checkpoints.folder}/step-00000002 could not be written" in message
    assert f"{earlier} is whole. Free space or mend the permissions" in message
    assert "run the same command again" in message
    assert read(earlier) == 1.0


def test_the_first_one_of_a_run_has_no_earlier_one(make_checkpoints: MakeCheckpoints) -> None:
    checkpoints = make_checkpoints()
    checkpoints.folder.write_text("a file")
    with pytest.raises(UserError, match="There is no earlier one"):
        checkpoints.save(1, tensors(), {"step": 1})
    assert checkpoints.folder.read_text() == "a file"


def save_where_a_file_is(folder: Path) -> str:
    with join_ranks() as ranks:
        checkpoints = Checkpoints(folder, ranks)
        if ranks.first:
            folder.write_text("a file")
        ranks.barrier()
        with pytest.raises(UserError) as raised:
            checkpoints.save(1, tensors(), {"step": 1})
    return str(raised.value)


def test_what_only_the_first_rank_finds_out_ends_all(tmp_path: Path) -> None:
    first, second = on_ranks(2, save_where_a_file_is, tmp_path / "checkpoints")
    assert "Not a directory" in first
    assert "step-00000001 could not be written: another rank failed" in second


def fill_the_disk(folder: Path, size: int) -> list[str]:
    """The errors of saving a checkpoint that has no room, and whether it was known without asking."""
    errors = []
    with join_ranks() as ranks:
        checkpoints = Checkpoints(folder, ranks)
        save(checkpoints, 1)
        # Files cannot grow beyond this; Python ignores the signal and gets an error, as from a full disk.
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
        big = {"big": {"tensor": torch.zeros(4096)}} if ranks.rank == size - 1 else {}
        for act in (lambda: checkpoints.save(2, tensors(2) | big, {"step": 2}), checkpoints.wait):
            try:
                act()
            except UserError as error:
                errors.append(f"{checkpoints.failed()}: {error}")
    return errors


@pytest.mark.parametrize("size", [1, 2])
def test_a_full_disk_is_told_by_all_ranks_and_the_earlier_one_stays(tmp_path: Path, size: int) -> None:
    """With two ranks only the last one's part does not fit."""
    folder = tmp_path / "checkpoints"
    for errors in on_ranks(size, fill_the_disk, folder, size):
        (error,) = errors
        assert error.startswith(f"True: Checkpoint {folder}/step-00000002 could not be written: ")
        assert "File too large" in error
        assert f"{folder}/step-00000001 is whole. Free space" in error
    assert os.listdir(folder) == ["step-00000001"]
    with join_ranks():
        assert read(folder / "step-00000001") == 1.0


# --- What cannot be read


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-10])


@pytest.mark.parametrize(
    ("pattern", "damage", "message"),
    [
        ("state.json", cut, r"state\.json: "),
        ("state.json", Path.unlink, r"state\.json: .*No such file"),
        ("*.safetensors", cut, r"shard-00001-model-00001-of-00001\.safetensors: "),
        ("*.safetensors", lambda path: path.write_bytes(b""), r"shard-00001-model-00001-of-00001\.safetensors: "),
        (
            "*.safetensors",
            Path.unlink,
            r"its files \(\) hold 0 of the 12 numbers of model/weight; another file is missing",
        ),
    ],
)
def test_damage_is_named(
    make_checkpoints: MakeCheckpoints, pattern: str, damage: Callable[[Path], None], message: str
) -> None:
    folder = save(make_checkpoints(), 1)
    (path,) = folder.glob(pattern)
    damage(path)
    with pytest.raises(UserError, match=rf"Checkpoint {folder} cannot be read: .*{message}") as raised:
        read(folder)
    assert "Move this folder away to go on from the checkpoint before it." in str(raised.value)


def save_sharded(folder: Path) -> None:
    """``[6, 2]``, of which each of three ranks writes two rows."""
    with join_ranks() as ranks:
        tensor = distribute_tensor(torch.ones(6, 2), ranks.mesh, [Shard(0)])
        checkpoints = Checkpoints(folder, ranks)
        checkpoints.save(1, {"model": {"weight": tensor}}, {})
        checkpoints.wait()


def test_what_a_missing_file_leaves_out_is_noticed(tmp_path: Path, ranks: Ranks) -> None:
    """Of whichever rank: what lies between two others has no end that would be missing."""
    on_ranks(3, save_sharded, tmp_path)
    weight = torch.zeros(6, 2)
    read_tensors(tmp_path / "step-00000001", {"model": {"weight": weight}})
    assert weight.all()
    for path in (tmp_path / "step-00000001").glob("*.safetensors"):
        torn = tmp_path / path.stem
        shutil.copytree(path.parent, torn, ignore=shutil.ignore_patterns(path.name))
        with pytest.raises(UserError, match=rf"Checkpoint {torn} cannot be read: .* hold 8 of the 12 .*; another file"):
            read_tensors(torn, {"model": {"weight": weight}})


@pytest.mark.parametrize("wanted", [{"weight": (3, 5)}, {"weights": (3, 4)}, {"weight": (4, 3)}])
def test_tensors_of_another_name_or_shape_are_refused(
    make_checkpoints: MakeCheckpoints, wanted: dict[str, tuple[int, ...]]
) -> None:
    folder = save(make_checkpoints(), 1)
    with pytest.raises(UserError, match="model/weight"):
        read_tensors(folder, {"model": {name: torch.zeros(shape) for name, shape in wanted.items()}})


def test_one_from_before_spreads_were_kept_goes_on_with_its_means(make_checkpoints: MakeCheckpoints) -> None:
    cache = LossMeanCache((1000, 900))
    for loss in (1.0, 3.0):
        cache(torch.tensor([900]), torch.tensor([loss]))
    old = {f"cache.{name}": cache.get_buffer(name).clone() for name in ("timesteps", "means", "seen", "pending")}
    checkpoints = make_checkpoints()
    checkpoints.save(1, {"method": old}, {})
    checkpoints.wait()
    module = AdaptiveRegressionLoss(LossMeanCache((1000, 900)))
    module.cache(torch.tensor([900, 900]), torch.tensor([5.0, 9.0]))
    read_tensors(checkpoints.path(1), {"method": module.state_dict()})
    assert module.cache.means.tolist() == cache.means.tolist()
    assert module.cache.spreads.tolist() == [0, 0]


# --- All that a run consists of, on any number of ranks


@pytest.fixture
def config(make_config: MakeConfig) -> TrainConfig:
    return make_config(
        method={"online_updates": 1, "online": {"lora": {"rank": 2}}},
        batch_size=4,
        max_steps=1,
        parallel={"activation_checkpointing": False},
    )


def whole_state(trainer: Trainer) -> dict[str, Any]:
    """All tensors, put together from their shards, and the rest."""
    state: dict[str, Any] = trainer.state()
    for owner, named in trainer.state_tensors().items():
        for name, value in named.items():
            state[f"{owner}/{name}"] = (value.full_tensor() if hasattr(value, "full_tensor") else value).clone()
    return state


def load_and_save(
    config: TrainConfig, data: TrainingData, reads: list[Path], writes: Path | None
) -> list[dict[str, Any]]:
    """The states that a trainer has after reading each of some checkpoints; the last is of what it trained itself."""
    states = []
    with join_ranks() as ranks:
        for folder in reads:
            trainer = Trainer(config, data, ranks)
            read_tensors(folder, trainer.state_tensors())
            trainer.load_state(read_state(folder))
            states.append(whole_state(trainer))
        if writes is not None:
            trainer = Trainer(config, data, ranks)
            list(trainer.run())
            # As if more had happened than in so short a run.
            for role, skipped in (("student", 3), ("online", 4)):
                trainer.callbacks[role].callbacks["guard"].skipped = skipped  # type: ignore[attr-defined]
            if trainer.monitor is not None:
                trainer.monitor.findings.append(CollapseFinding(2, "frozen", 0.1, 0.2, "It stands still."))
            checkpoints = Checkpoints(writes, ranks)
            checkpoints.save(trainer.step, trainer.state_tensors(), trainer.state())
            checkpoints.wait()
            states.append(whole_state(trainer))
    return states


def test_what_some_ranks_saved_any_number_reads(config: TrainConfig, data: TrainingData, tmp_path: Path) -> None:
    folders = {size: tmp_path / str(size) / "step-00000001" for size in (1, 2, 4)}
    (of_2,) = on_ranks(2, load_and_save, config, data, [], folders[2].parent)[0]
    of_2_by_4, of_4 = on_ranks(4, load_and_save, config, data, [folders[2]], folders[4].parent)[0]
    of_2_by_1, of_1 = load_and_save(config, data, [folders[2]], folders[1].parent)
    of_1_by_2, of_4_by_2 = on_ranks(2, load_and_save, config, data, [folders[1], folders[4]], None)[0]
    assert {size: len(list(folder.glob("*.safetensors"))) for size, folder in folders.items()} == {1: 1, 2: 2, 4: 4}
    assert {name.split("/")[0] for name in of_1} == {
        "student", "online", "ema", "student_optimizer", "online_optimizer", "method", "step", "callbacks",
    }  # fmt: skip
    for saved, *found in ((of_1, of_1_by_2), (of_2, of_2_by_1, of_2_by_4), (of_4, of_4_by_2)):
        for state in found:
            assert_same_state(dict(sorted(state.items())), dict(sorted(saved.items())))
