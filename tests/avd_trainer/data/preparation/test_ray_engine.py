"""Under Ray everything comes out as on this machine alone."""

from __future__ import annotations

import gc
import os
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from avd_trainer.commands.data import data_app
from avd_trainer.data.preparation.journal import Journal
from avd_trainer.data.preparation.ray_engine import RayEngine
from avd_trainer.data.preparation.stage import Done, Failed
from avd_trainer.data.video_files import save_clip
from avd_trainer.runtime.errors import UserError
from toy_runs import ToyRun, files_of, toy_recipe
from toy_stages import RUNS, Latents

pytestmark = [
    # Ray does not wait for processes that it ends, nor close all files.
    pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]
SQUARE = {"sizes": [[8, 8], [8, 8]]}


@pytest.fixture(scope="module", autouse=True)
def begun_on_ray(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A Ray of this test: two cores, and two GPUs that are pretended. Where its stages note what they begin."""
    import ray

    runs = tmp_path_factory.mktemp("ray") / "runs"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
        patch.setenv(RUNS, str(runs))
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.delenv("RAY_ADDRESS", raising=False)
        ray.init(
            address="local",
            num_cpus=2,
            num_gpus=2,
            include_dashboard=False,
            object_store_memory=80 * 2**20,
            logging_level="ERROR",
            log_to_driver=False,
        )
        yield runs
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ResourceWarning)  # it does not wait for the processes that it started
            ray.shutdown()
            gc.collect()


def test_the_shards_are_those_of_the_local_engine(toy: ToyRun) -> None:
    toy.add(*(f"{letter}.mp4" for letter in "abcd"), "decoding-SIGSEGV.mp4", "contrast-raises.mp4")
    chosen = toy_recipe(framing=SQUARE, brightness={"keep": 0.5})
    here, there = toy._replace(output=toy.output / "here"), toy._replace(output=toy.output / "there")
    one = here.prepare(chosen, workers=2)
    other = there.prepare(chosen, workers=2, engine=RayEngine)
    assert other.selection == one.selection
    assert files_of(there.output / "data") == files_of(here.output / "data")
    assert there.prepare(chosen).unchanged  # each goes on where the other stopped


def test_what_goes_wrong_is_named_and_does_not_stop_the_rest(toy: ToyRun, caplog: pytest.LogCaptureFixture) -> None:
    hangs, borrows, crashes, orphans = (f"brightness-{what}.mp4" for what in ("hangs", "borrows", "SIGABRT", "orphans"))
    toy.add("plain.mp4", hangs, borrows, crashes, orphans)
    recipe = toy_recipe(memory_gb=0.4, brightness={"time_limit": 8})
    found = dict(toy(recipe, workers=3, engine=RayEngine))
    assert "Ray has 2 cores: as many processes work, in place of 3." in caplog.text
    failed = {row: outcome for row, outcome in found.items() if isinstance(outcome, Failed)}
    assert failed.keys() == {(f"{name}@500", "brightness") for name in (hangs, borrows, crashes)}
    for name, reason in [
        (hangs, "brightness did not end within 8 s"),
        (borrows, "GB of memory, 0.4 are allowed (memory_gb)"),
        (crashes, "brightness crashed with SIGABRT"),
    ]:
        assert reason in failed[f"{name}@500", "brightness"].reason
    # A file whose machine is lost is left as it is, for the next run.
    assert f"Left out {orphans}: a process lost its machine" in caplog.text
    assert (f"{orphans}@500", "brightness") not in found
    for name, starts in (("plain.mp4", (0, 500, 1000)), (hangs, (0, 1000)), (borrows, (0, 1000)), (crashes, (0, 1000))):
        for start in starts:
            assert isinstance(found[f"{name}@{start}", "contrast"], Done)


def test_stages_that_want_a_gpu_have_one_each(toy: ToyRun, begun_on_ray: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Latents, "gpu", True)
    begun_on_ray.unlink(missing_ok=True)
    toy.add(*(f"{number}-slow.mp4" for number in range(4)))
    toy.prepare(toy_recipe(framing=SQUARE), workers=2, gpus=2, engine=RayEngine)
    lines = begun_on_ray.read_text().splitlines()
    gpus = [line.partition(" on GPU ")[2] for line in lines if line.startswith("latents")]
    assert len(gpus) == 12
    assert set(gpus) == {"0", "1"}
    assert not [line for line in lines if "GPU" in line and not line.startswith(("latents", "decoding"))]


def test_a_process_that_cannot_start_is_no_endless_loop(toy: ToyRun, monkeypatch: pytest.MonkeyPatch) -> None:
    toy.add("plain.mp4")
    folder = toy.output.with_name("gone")
    folder.mkdir()
    monkeypatch.chdir(folder)
    monkeypatch.setattr(Path, "cwd", lambda: folder / "of another machine")
    with pytest.raises(UserError, match=r"lost its machine.*before it began to work"):
        toy(engine=RayEngine)
    with Journal(toy.output) as journal:
        assert not list(journal.files())


def test_the_command(tmp_path: Path) -> None:
    torch.manual_seed(0)
    (tmp_path / "raw").mkdir()
    frames = torch.rand(3, 1, 32, 80).repeat(1, 20, 1, 1)
    video = torch.stack([frames[:, index, :, index : index + 32] for index in range(20)], dim=1)
    save_clip(video, tmp_path / "raw" / "noise", 16.0, ["mp4"])
    for engine in ("local", "ray"):
        command = ["prepare", "--videos", str(tmp_path / "raw"), "--output", str(tmp_path / engine)]
        done = CliRunner().invoke(data_app, [*command, "--recipe", "tiny", "--workers", "1", "--engine", engine])
        assert done.exit_code == 0, done.output
    assert files_of(tmp_path / "ray" / "data") == files_of(tmp_path / "local" / "data")
