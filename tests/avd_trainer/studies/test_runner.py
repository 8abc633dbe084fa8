"""Studies from start to end: shared, killed, gone on with, and never done twice."""

import json
import shutil
import signal
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from avd_core import NonFiniteError
from avd_trainer.data.sources import TrainingData
from avd_trainer.evaluation.controls import CONTROLS, REPEATED, Encoded
from avd_trainer.evaluation.measures import MEASURES
from avd_trainer.models.condition import Condition
from avd_trainer.runtime import processes
from avd_trainer.runtime.errors import UserError
from avd_trainer.runtime.files import read_json, write_json
from avd_trainer.runtime.processes import FailedProcessError
from avd_trainer.runtime.ranks import Ranks, join_ranks
from avd_trainer.studies import runner, sheet, units
from avd_trainer.studies.definition import REFERENCE, Study, Unit, load_study
from avd_trainer.studies.pictures import CELL, GAP
from avd_trainer.studies.runner import FailedUnitsError, run_study
from avd_trainer.studies.sheet import save_clips
from avd_trainer.studies.summary import write_summary
from avd_trainer.training.checkpoint import list_checkpoints
from avd_trainer.training.config import TrainConfig
from avd_trainer.training.folder import FolderInUseError
from launches import Launch
from small_study import FILES, write_study

SEEDS = [1, 2]
UNITS = {"reference-4", "controls-4", "interpolator-0"} | {
    f"{name}-{seed}" for name in ("teacher", "dmd", "avd", "half-rate") for seed in SEEDS
}


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Study:
    return load_study(write_study(tmp_path_factory.mktemp("studies") / "small"))


@pytest.fixture(scope="module")
def finished(study: Study, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A study that two processes did together."""
    folder = tmp_path_factory.mktemp("finished")
    with Launch(1, run_study, study, folder, SEEDS) as one, Launch(1, run_study, study, folder, SEEDS) as other:
        assert one.results() == other.results() == [True]
        printed = one.printed() + other.printed()
    # Nothing was done by both.
    for work in ("reference-4: 3/3", "interpolator-0: 2/2", "dmd-1: 2/2", "avd-2: 2/2", "teacher-1 samples: 4/4"):
        assert printed.count(work) == 1
    return folder


@pytest.fixture
def copy(finished: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "copy"))


def results(folder: Path) -> dict[str, Any]:
    return {file.stem: read_json(file) for file in (folder / "units").glob("*.json")}


def times(folder: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in (folder / "units").rglob("*") if path.name != ".lock"}


def test_every_unit_is_done(finished: Path) -> None:
    assert results(finished).keys() == UNITS


def test_clips_are_measured_for_each_noise(finished: Path) -> None:
    found = results(finished)
    for name in UNITS - {"reference-4", "controls-4", "interpolator-0"}:
        one, other = found[name]["noises"]
        assert one.keys() == other.keys() == MEASURES.keys()
        assert one != other
    assert found["reference-4"]["spreads"].keys() == MEASURES.keys()
    assert found["controls-4"]["controls"].keys() == CONTROLS.keys() - {REPEATED}
    assert "noises" not in found["interpolator-0"]


def test_seeds_and_variants_differ(finished: Path) -> None:
    found = {name: json.dumps(unit["noises"]) for name, unit in results(finished).items() if "noises" in unit}
    assert len(set(found.values())) == len(found)


def test_students_stay_and_checkpoints_go(finished: Path) -> None:
    run = finished / "units" / "dmd-1" / "run"
    assert (run / "student" / "config.json").exists()
    assert not list(finished.rglob("checkpoints"))


def test_of_a_finished_study_nothing_is_done_again(study: Study, finished: Path) -> None:
    before = times(finished)
    assert run_study(study, finished, SEEDS)
    assert run_study(study, finished, [2], jobs=2)
    assert times(finished) == before


def test_results_alone_are_enough_to_go_on_elsewhere(study: Study, finished: Path, tmp_path: Path) -> None:
    (tmp_path / "units").mkdir()
    for file in (finished / "study.json", *(finished / "units").glob("*.json")):
        shutil.copy(file, tmp_path / file.relative_to(finished))
    assert run_study(study, tmp_path, SEEDS)
    assert results(tmp_path) == results(finished)
    assert write_summary(study, tmp_path, SEEDS) == write_summary(study, finished, SEEDS)
    (tmp_path / "units" / "half-rate-1.json").unlink()
    with pytest.raises(FailedUnitsError, match=r"half-rate-1: UserError: interpolator-0 is done, but .*, which other"):
        run_study(study, tmp_path, SEEDS)
    assert not (tmp_path / "units" / "half-rate-1.json").exists()


def test_how_many_are_sampled_at_once_changes_no_sample(study: Study, finished: Path, tmp_path: Path) -> None:
    one = load_study(write_study(tmp_path / "small"), ["evaluation.batch_size=4"], ["dmd"])
    assert run_study(one, tmp_path / "other", [1])
    mine, theirs = (results(folder)["dmd-1"]["noises"][0] for folder in (tmp_path / "other", finished))
    assert mine == pytest.approx(theirs, rel=1e-3, abs=1e-4)


def wait_for(there: Callable[[], bool], seconds: float = 120.0) -> None:
    deadline = time.monotonic() + seconds
    while not there():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.fixture(scope="module")
def longer(tmp_path_factory: pytest.TempPathFactory) -> Study:
    return load_study(write_study(tmp_path_factory.mktemp("longer") / "small"), ["max_steps=4"], ["dmd"])


@pytest.fixture(scope="module")
def undisturbed(longer: Study, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("undisturbed")
    with Launch(1, run_study, longer, folder, [1]) as launch:
        assert launch.results() == [True]
    return folder


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_killed_study_goes_on(longer: Study, undisturbed: Path, tmp_path: Path, number: signal.Signals) -> None:
    with Launch(1, run_study, longer, tmp_path, [1]) as launch:
        wait_for(lambda: bool(list_checkpoints(tmp_path / "units" / "dmd-1" / "run" / "checkpoints")))
        launch.signal(number)
        assert launch.wait() == [-number if number == signal.SIGKILL else 0]
        assert number == signal.SIGKILL or launch.results() == [False]
    assert not (tmp_path / "units" / "dmd-1.json").exists()
    with Launch(1, run_study, longer, tmp_path, [1]) as launch:
        assert launch.results() == [True]
        assert "dmd-1: going on at step" in launch.printed()
    assert results(tmp_path)["dmd-1"]["noises"] == results(undisturbed)["dmd-1"]["noises"]


def test_a_unit_that_died_before_it_was_measured_is_not_trained_again(
    study: Study, copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = results(copy)
    (copy / "units" / "avd-1.json").unlink()
    monkeypatch.setattr(units, "train", None)
    assert run_study(study, copy, SEEDS)
    assert results(copy)["avd-1"]["noises"][0] == pytest.approx(before["avd-1"]["noises"][0], rel=1e-3, abs=1e-4)


@pytest.mark.parametrize(
    ("overrides", "key"),
    [
        ("max_steps=3", r"variants\.dmd\.max_steps: 2 there, 3 now"),
        ("evaluation.noises=1", r"evaluation\.noises: 2"),
    ],
)
def test_other_values_want_another_folder(finished: Path, tmp_path: Path, overrides: str, key: str) -> None:
    before = times(finished)
    other = load_study(write_study(tmp_path / "small"), [overrides])
    with pytest.raises(UserError, match=rf"(?s)holds results of other values:\n.*{key}.*Choose a new --output"):
        run_study(other, finished, SEEDS)
    assert times(finished) == before


def test_a_changed_file_wants_another_folder(finished: Path, tmp_path: Path) -> None:
    name = write_study(tmp_path / "small", teacher="# The teacher in three.\nteacher_of: dmd\nsteps: 3")
    with pytest.raises(UserError, match=r"variants\.teacher\.steps: 2 there, 3 now"):
        run_study(load_study(name), finished, SEEDS)


@pytest.mark.parametrize("method", ["dmd", "pcm"])
def test_a_teacher_without_steps_is_a_student_before_its_first_update(method: str, tmp_path: Path) -> None:
    still = f"""
        # A student whose weights stay.
        extends: tiny/{method}
        data: {{clips: 8}}
        max_steps: 1
        batch_size: 2
        method: {{student: {{optimizer: {{lr: 1.0e-30}}}}}}"""
    study = load_study(write_study(tmp_path / "small", dmd=still, teacher="# Untrained.\nteacher_of: dmd\nsteps: null"))
    assert run_study(study, tmp_path / "out", [1])
    untrained, student = (read_json(tmp_path / "out" / "units" / f"{name}-1.json") for name in ("teacher", "dmd"))
    assert untrained["noises"] == [pytest.approx(each, rel=1e-4) for each in student["noises"]]


def test_a_folder_of_something_else_is_left_alone(study: Study, tmp_path: Path) -> None:
    (tmp_path / "precious").touch()
    with pytest.raises(UserError, match="holds something that is no study"):
        run_study(study, tmp_path, SEEDS)


def test_variants_and_seeds_can_be_added(tmp_path: Path) -> None:
    name, folder = write_study(tmp_path / "small"), tmp_path / "out"
    assert run_study(load_study(name, variants=["teacher"]), folder, [1])
    assert run_study(load_study(name, variants=["dmd"]), folder, [1])
    assert {"teacher-1", "dmd-1"} <= results(folder).keys()
    found = write_summary(load_study(name), folder, [1, 5])
    assert list(found["variants"]) == ["teacher", "dmd"]
    assert "- dmd (1 of 2 seeds): Matching alone." in (folder / "table.md").read_text()


def test_several_jobs_print_to_files(copy: Path, study: Study) -> None:
    (copy / "units" / "teacher-2.json").unlink()
    (copy / "units" / "half-rate-1.json").unlink()
    before = results(copy)
    assert run_study(study, copy, SEEDS, jobs=2)
    assert results(copy).keys() - before.keys() == {"teacher-2", "half-rate-1"}
    assert len(list((copy / "logs").iterdir())) == 2


def test_a_process_that_fails_is_told(copy: Path, study: Study) -> None:
    (copy / "units" / "half-rate-1.json").unlink()
    (copy / "units" / "interpolator-0" / "run" / "interpolator" / "config.json").write_text("broken")
    with pytest.raises(UserError, match=r"1 of 1 processes failed; .*-0\.txt says why"):
        run_study(study, copy, SEEDS, jobs=2)
    (log,) = (copy / "logs").iterdir()
    assert "holds no LatentFrameInterpolator" in log.read_text()


def test_a_student_that_diverged_is_a_result(study: Study, copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def diverge(*_: object, **__: object) -> bool:
        raise NonFiniteError("10 steps in a row")

    for name in ("avd-1", "half-rate-1"):
        (copy / "units" / f"{name}.json").unlink()
    shutil.rmtree(copy / "units" / "avd-1")
    monkeypatch.setattr(units, "train", diverge)
    assert run_study(study, copy, SEEDS)
    assert results(copy)["avd-1"]["failed"] == "10 steps in a row"
    assert "avd-1 has diverged" in results(copy)["half-rate-1"]["failed"]
    found = write_summary(study, copy, SEEDS)
    assert found["variants"]["avd"]["measures"]["visible"]["seeds"] == 1
    table = (copy / "table.md").read_text()
    assert "- avd (2 of 2 seeds, 1 diverged)" in table
    assert "| avd (n = 1) |" in table


def test_where_a_seed_diverged_there_is_no_interval(study: Study, copy: Path) -> None:
    """The students that are left are the better ones."""
    seeds = list(range(1, 9))
    for name in ("dmd", "avd", "half-rate"):
        for seed in seeds[2:]:
            shutil.copy(copy / "units" / f"{name}-{1 + seed % 2}.json", copy / "units" / f"{name}-{seed}.json")
    write_json(copy / "units" / "avd-8.json", {"variant": "avd", "seed": 8, "failed": "10 steps in a row"})
    found = write_summary(study, copy, seeds)["variants"]
    dmd, avd, half_rate = (found[name]["measures"]["saturation"] for name in ("dmd", "avd", "half-rate"))
    assert dmd["low"] is not None
    assert (avd["low"], avd["high"], avd["seeds"]) == (None, None, 7)
    assert (avd["against_baseline"]["low"], avd["against_baseline"]["seeds"]) == (None, 7)
    assert half_rate["against_baseline"]["low"] is not None
    write_json(copy / "units" / "dmd-8.json", {"variant": "dmd", "seed": 8, "failed": "10 steps in a row"})
    found = write_summary(study, copy, seeds)["variants"]
    assert found["half-rate"]["measures"]["saturation"]["low"] is not None
    assert found["half-rate"]["measures"]["saturation"]["against_baseline"]["low"] is None


def test_the_command_in_the_results_would_do_them_again(finished: Path, study: Study, tmp_path: Path) -> None:
    assert write_summary(study, finished, SEEDS)["command"] == f"avd study {study.source} --output DIR --seeds 1,2"
    other = load_study("table2", ["max_steps=3", "evaluation.noises=2"], ["dmd", "dmd-tuned"])
    runner.claim_study(other, tmp_path)
    command = (
        "avd study table2 --output DIR --seeds 1,2 --variants dmd-tuned,dmd --set max_steps=3 --set evaluation.noises=2"
    )
    assert write_summary(other, tmp_path, SEEDS)["command"] == command
    # Tables are made again without naming values.
    again = load_study("table2", variants=["dmd", "dmd-tuned"])
    assert write_summary(again, tmp_path, SEEDS)["command"] == command


@pytest.mark.parametrize("finishes", [True, False])
def test_a_failed_process_is_a_failure_only_where_something_is_left(
    study: Study, copy: Path, monkeypatch: pytest.MonkeyPatch, finishes: bool
) -> None:
    lost = copy / "units" / "teacher-2.json"
    text = lost.read_text()
    lost.unlink()

    class FailingProcess:
        exitcode = 1

        def __init__(self, **_: object) -> None:
            pass

        def start(self) -> None:
            if finishes:  # as another process would have
                lost.write_text(text)

        def is_alive(self) -> bool:
            return False

    context = SimpleNamespace(Process=FailingProcess, set_forkserver_preload=lambda _: None)
    monkeypatch.setattr(processes, "get_context", lambda _: context)
    if finishes:
        assert run_study(study, copy, SEEDS, jobs=2)
    else:
        with pytest.raises(FailedProcessError):
            run_study(study, copy, SEEDS, jobs=2)


def test_a_run_whose_folder_is_in_use_is_told(study: Study, copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By somebody's `avd train`: waiting for a unit of the study would be for ever."""

    def refuse(*_: object, **__: object) -> bool:
        raise FolderInUseError("Another process is training")

    (copy / "units" / "avd-1.json").unlink()
    shutil.rmtree(copy / "units" / "avd-1" / "run")
    monkeypatch.setattr(units, "train", refuse)
    with pytest.raises(FailedUnitsError, match=r"\n  avd-1: FolderInUseError: Another process is training\n"):
        run_study(study, copy, SEEDS)


def test_a_unit_that_fails_holds_up_no_other(
    study: Study, copy: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    before = results(copy)
    for name in ("dmd-1", "avd-1", "half-rate-1", "teacher-2"):
        (copy / "units" / f"{name}.json").unlink()
    shutil.rmtree(copy / "units" / "avd-1" / "run")
    tried: list[str] = []
    sample = units.Workplace._sample

    def fail(*_: object, description: str, **__: object) -> bool:
        tried.append(description)
        raise RuntimeError("no memory")

    def broken(place: units.Workplace, unit: Unit, *rest: Any) -> Tensor:
        if unit.variant == "dmd":
            raise KeyError("lost")
        return sample(place, unit, *rest)

    monkeypatch.setattr(units, "train", fail)
    monkeypatch.setattr(units.Workplace, "_sample", broken)
    with pytest.raises(FailedUnitsError) as raised:
        run_study(study, copy, SEEDS)
    told = str(raised.value).splitlines()
    assert told[1:-1] == ["  dmd-1: KeyError: 'lost'", "  avd-1: RuntimeError: no memory"]
    assert "All others are done" in told[0]
    assert tried == ["avd-1"]  # once
    assert before.keys() - results(copy).keys() == {"dmd-1", "avd-1", "half-rate-1"}  # the last waits for avd-1
    assert "avd-1 failed: no memory" in caplog.text
    assert "Traceback" in caplog.text
    monkeypatch.undo()
    assert run_study(study, copy, SEEDS)
    assert before.keys() == results(copy).keys()


def test_what_another_process_did_meanwhile_has_not_failed(
    study: Study, copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = results(copy)
    lost, waiting = (copy / "units" / f"{name}-1.json" for name in ("avd", "half-rate"))
    lost.unlink()
    waiting.unlink()

    def do(_: object, unit: Unit) -> dict[str, Any]:
        if unit.variant == "avd":
            write_json(lost, before["avd-1"])
            raise RuntimeError("no memory")
        return {"variant": unit.variant}

    monkeypatch.setattr(units.Workplace, "do", do)
    assert run_study(study, copy, SEEDS)
    assert read_json(waiting) == {"variant": "half-rate"}


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit])
def test_who_is_interrupted_stops(
    study: Study, copy: Path, monkeypatch: pytest.MonkeyPatch, error: type[BaseException]
) -> None:
    (copy / "units" / "teacher-2.json").unlink()

    def interrupt(*_: object) -> None:
        raise error

    monkeypatch.setattr(units.Workplace, "do", interrupt)
    with pytest.raises(error):
        run_study(study, copy, SEEDS)


def test_measuring_real_clips_stops_on_request(study: Study, tmp_path: Path, ranks: Ranks) -> None:
    asked: list[None] = []

    def stopping() -> bool:
        asked.append(None)
        return True

    with pytest.raises(units.StoppedError):
        units.Workplace(study, tmp_path, ranks, stopping).do(Unit(REFERENCE, 4))
    assert len(asked) == 1


def test_a_run_has_the_captions_that_its_variant_says(
    tmp_path: Path, ranks: Ranks, monkeypatch: pytest.MonkeyPatch
) -> None:
    wrong = """
        # Wrong captions.
        extends: dmd
        data: {wrong_captions: 0.5}"""
    of_three = FILES["study"].replace("avd,", "avd, wrong,")
    study = load_study(write_study(tmp_path / "small", study=of_three, wrong=wrong), variants=["dmd", "wrong"])
    read = {}

    def look(config: TrainConfig, *_: object, data: TrainingData, **__: object) -> bool:
        read[str(config.data)] = [data.clips[index].caption for index in range(8)]
        return False

    monkeypatch.setattr(units, "train", look)
    place = units.Workplace(study, tmp_path / "units", ranks)
    for name in ("dmd", "wrong"):
        with pytest.raises(units.StoppedError):
            place.do(Unit(name, 1))
    right, wrong_ones = read.values()
    assert [a == b for a, b in zip(right, wrong_ones, strict=True)] == [False] * 4 + [True] * 4


def test_in_a_seed_all_variants_have_the_same_noises(
    study: Study, tmp_path: Path, ranks: Ranks, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Tensor] = []

    def sample(noise: Tensor, streams: Sequence[torch.Generator], condition: Condition) -> Tensor:
        further = [torch.randn(noise.shape[1:], generator=stream) for stream in streams]
        seen.append(torch.stack([noise, torch.stack(further)]))
        return noise

    monkeypatch.setattr(units.Workplace, "_student", lambda *_: sample)
    monkeypatch.setattr(units.Workplace, "_teacher", lambda *_: sample)
    place = units.Workplace(study, tmp_path, ranks)

    def noises(variant: str, seed: int, noise: int) -> Tensor:
        seen.clear()
        place._sample(Unit(variant, seed), noise, [range(3), range(3, 4)], lambda: None)
        return torch.cat(seen, dim=1)

    first = noises("dmd", 1, 0)
    for variant in ("teacher", "avd", "half-rate"):
        assert torch.equal(noises(variant, 1, 0), first)
    clips = torch.cat([first, noises("dmd", 1, 1), noises("dmd", 2, 0)], dim=1).flatten(0, 1).flatten(1)
    assert len(clips.unique(dim=0)) == len(clips)  # none twice: of captions, of noises, of seeds, of what follows


def test_the_sheet_shows_what_was_measured(study: Study, copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shown: dict[str, Tensor] = {}

    def look(videos: Mapping[str, Tensor], captions: Sequence[str], *_: object) -> None:
        shown.update(videos)
        assert len(captions) == 2

    monkeypatch.setattr(sheet, "save_sheet", look)
    assert save_clips(study, copy, SEEDS, 2)
    assert list(shown) == ["real clips", "teacher", "dmd", "avd", "half-rate"]  # as in the tables
    with join_ranks() as ranks:
        place = units.Workplace(study, copy / "units", ranks)
        assert torch.equal(shown.pop("real clips"), place._real.video[:2])
        for name, clips in shown.items():
            samples = place._sample(Unit(name, SEEDS[0]), 0, [range(4)], lambda: None)
            assert place._codec.decode(samples)[:2] == pytest.approx(clips, abs=1e-5)
            own = place._measure(Encoded(samples, place._codec.decode(samples)), place._real.video[:, :, 0])
            assert own == pytest.approx(results(copy)[f"{name}-1"]["noises"][0], rel=1e-4)


def test_the_sheet_leaves_out_what_has_no_clips(study: Study, copy: Path) -> None:
    for name in ("avd-1", "half-rate-1"):
        (copy / "units" / f"{name}.json").unlink()
    failed = copy / "units" / "dmd-1.json"
    write_json(failed, {"variant": "dmd", "seed": 1, "failed": "NaN"})
    assert save_clips(study, copy, SEEDS, 1)
    with Image.open(copy / "clips.png") as picture:
        small = picture.height
    failed.unlink()
    (copy / "units" / "teacher-1.json").unlink()
    (copy / "clips.png").unlink()
    assert not save_clips(study, copy, SEEDS, 1)
    assert not (copy / "clips.png").exists()
    assert save_clips(study, copy, [2], 1)
    with Image.open(copy / "clips.png") as picture:
        assert picture.height == small + 3 * (CELL + 2 + GAP)  # dmd, avd and half-rate


def test_the_summary_is_made_again_from_the_units(study: Study, copy: Path) -> None:
    found = write_summary(study, copy, SEEDS)
    for name in ("results.json", "table.md", "figure.png"):
        (copy / name).unlink()
    assert write_summary(study, copy, SEEDS) == found == read_json(copy / "results.json")
    assert (copy / "table.md").read_text()
    assert (copy / "figure.png").stat().st_size > 10_000


def test_the_summary_says_everything(study: Study, finished: Path) -> None:
    found = write_summary(study, finished, SEEDS)
    dmd, avd = (found["variants"][name] for name in ("dmd", "avd"))
    unit = results(finished)["avd-2"]
    assert avd["seeds"]["2"]["noises"] == unit["noises"]
    assert avd["seeds"]["2"]["seconds"] == unit["seconds"]
    assert unit["cpu_seconds"].keys() == unit["seconds"].keys() == {"train", "sample", "measure", "all"}
    assert avd["seeds"]["2"]["training"] == unit["training"]
    assert unit["training"]["means"].keys() >= {"motion/loss", "matching/gradient_norm"}
    assert unit["training"]["findings"] == []
    assert "training" not in results(finished)["teacher-1"]
    assert avd["values"]["method"]["kind"] == "avd"
    of_seeds = {
        name: [found["variants"][name]["seeds"][seed]["values"]["saturation"] for seed in "12"]
        for name in ("dmd", "avd")
    }
    assert of_seeds["avd"][1] == pytest.approx(sum(noise["saturation"] for noise in unit["noises"]) / 2)
    assert avd["measures"]["saturation"]["mean"] == pytest.approx(sum(of_seeds["avd"]) / 2)
    real = found["reference"]["spreads"]["saturation"]["mean"]
    farther = [abs(a - real) - abs(b - real) for a, b in zip(of_seeds["avd"], of_seeds["dmd"], strict=True)]
    assert avd["measures"]["saturation"]["against_baseline"]["mean"] == pytest.approx(sum(farther) / 2)
    assert "against_baseline" not in dmd["measures"]["saturation"]
    assert "interpolator" not in (finished / "table.md").read_text().split("## ")[1]


def test_tables_are_made_against_any_variant(study: Study, copy: Path) -> None:
    found = write_summary(study, copy, SEEDS)
    other = write_summary(load_study(study.source, baseline="avd"), copy, SEEDS)
    assert (found["baseline"], other["baseline"]) == ("dmd", "avd")
    assert other["command"] == f"{found['command']} --baseline avd"
    there, back = found["variants"]["avd"]["measures"], other["variants"]["dmd"]["measures"]
    for name, measure in there.items():
        assert back[name]["against_baseline"]["mean"] == pytest.approx(-measure["against_baseline"]["mean"])
    with pytest.raises(UserError, match="has no variant 'adv'"):
        load_study(study.source, baseline="adv")


def test_a_variant_may_be_compared_with_one_of_its_own(study: Study, copy: Path, tmp_path: Path) -> None:
    paired = FILES["study"] + "\n        against: {half-rate: avd}"
    other = load_study(write_study(tmp_path / "small", study=paired))
    for name in ("teacher", "dmd", "avd", "half-rate"):  # enough for intervals
        for seed in range(3, 9):
            shutil.copy(copy / "units" / f"{name}-{2 - seed % 2}.json", copy / "units" / f"{name}-{seed}.json")
    write_json(copy / "units" / "dmd-8.json", {"variant": "dmd", "seed": 8, "failed": "10 steps in a row"})
    found = write_summary(other, copy, range(1, 9))
    assert {name: each["against"] for name, each in found["variants"].items()} == {
        "teacher": "dmd",
        "dmd": None,
        "avd": "dmd",
        "half-rate": "avd",
        "interpolator": "dmd",
    }
    assert found["baseline"] == "dmd"
    mean = {name: found["variants"][name]["seeds"]["1"]["values"]["jerk"] for name in ("avd", "half-rate")}
    real = found["reference"]["spreads"]["jerk"]["mean"]
    one = write_summary(other, copy, [1])["variants"]["half-rate"]["measures"]["jerk"]["against_baseline"]
    assert one["mean"] == pytest.approx(abs(mean["half-rate"] - real) - abs(mean["avd"] - real))
    # A student of dmd that diverged is of no concern to what is compared with avd.
    avd, half_rate = (found["variants"][name]["measures"]["jerk"]["against_baseline"] for name in ("avd", "half-rate"))
    assert (avd["low"], avd["seeds"], half_rate["seeds"]) == (None, 7, 8)
    assert half_rate["low"] is not None
    write_summary(other, copy, range(1, 9))
    section = (copy / "table.md").read_text().partition("## How much farther from real")[2].partition("\n## ")[0]
    than = [line.split(" | ")[:2] for line in section.splitlines() if line.startswith("| ")]
    assert than[2:] == [["| teacher", "dmd"], ["| avd", "dmd"], ["| half-rate", "avd"]]


def test_the_summary_of_nothing_says_so(study: Study, tmp_path: Path) -> None:
    runner.claim_study(study, tmp_path)
    found = write_summary(study, tmp_path, SEEDS)
    assert found["reference"] is None
    assert "Real clips are not measured yet" in (tmp_path / "table.md").read_text()
    other = load_study("table2")
    with pytest.raises(UserError, match="holds results of study small, not of table2"):
        write_summary(other, tmp_path, SEEDS)
