"""What a study takes over from another one."""

import shutil
from pathlib import Path

import pytest

from avd_trainer.runtime.errors import UserError
from avd_trainer.runtime.files import read_json, write_json
from avd_trainer.studies.definition import Study, load_study
from avd_trainer.studies.reuse import reuse
from avd_trainer.studies.runner import claim_study, run_study
from small_study import FILES, write_study

# The same run by another name, and one of other values.
OTHER = """
    # What another study has.
    baseline: matching
    variants: [matching, avd]
    evaluation: {captions: 4, noises: 2, batch_size: 3, renderings: 3}"""
NAMES = {**dict.fromkeys(FILES), "study": OTHER, "matching": FILES["dmd"], "avd": FILES["avd"].replace("0.5", "0.25")}
NAMES["avd"] = NAMES["avd"].replace("extends: dmd", "extends: matching")


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("done")
    assert run_study(load_study(write_study(folder / "small"), variants=["dmd", "avd"]), folder / "results", [1])
    return folder / "results"


@pytest.fixture
def study(tmp_path: Path) -> Study:
    return load_study(write_study(tmp_path / "other", **NAMES))


def test_the_same_values_are_copied_and_others_are_not(study: Study, done: Path, tmp_path: Path) -> None:
    copied = reuse(study, tmp_path / "mine", done, [1, 2])
    assert [str(unit) for unit in copied] == ["reference-4", "controls-4", "matching-1"]
    mine, theirs = (read_json(path) for path in (tmp_path / "mine/units/matching-1.json", done / "units/dmd-1.json"))
    assert mine == theirs | {"variant": "matching", "reused_from": "small/dmd-1"}
    assert (tmp_path / "mine/units/matching-1/run/student/config.json").exists()


def test_state_that_another_run_goes_on_from_stays_where_it_is(study: Study, done: Path, tmp_path: Path) -> None:
    earlier = Path(shutil.copytree(done, tmp_path / "earlier"))
    state = Path("run/checkpoints/step-00000002")
    (earlier / "units/dmd-1" / state).mkdir(parents=True)
    reuse(study, tmp_path / "mine", earlier, [1])
    assert (tmp_path / "mine/units/matching-1/run/student").is_dir()
    assert not list((tmp_path / "mine").rglob("checkpoints"))


def test_a_student_is_copied_only_where_the_one_that_it_started_from_was_the_same(done: Path, tmp_path: Path) -> None:
    earlier = tmp_path / "earlier"
    shutil.copytree(done, earlier)
    saved, units = read_json(earlier / "study.json"), earlier / "units"
    for name, start in (("on", "avd"), ("further", "on")):
        saved["variants"][name] = saved["variants"]["dmd"] | {"student_weights": f"variant:{start}"}
        shutil.copytree(units / "dmd-1", units / f"{name}-1")
        shutil.copy(units / "dmd-1.json", units / f"{name}-1.json")
    write_json(earlier / "study.json", saved)
    listed = OTHER.replace("[matching, avd]", "[matching, avd, again, last]")
    again, last = ("# Goes on.\nextends: matching\nstudent_weights: variant:" + start for start in ("avd", "again"))
    for output, avd, copied in (
        ("other", NAMES["avd"], ["matching-1"]),
        ("same", NAMES["avd"].replace("0.25", "0.5"), ["matching-1", "avd-1", "again-1", "last-1"]),
    ):
        files = NAMES | {"study": listed, "avd": avd, "again": again, "last": last}
        study = load_study(write_study(tmp_path / f"study-{output}", **files))
        assert [str(unit) for unit in reuse(study, tmp_path / output, earlier, [1])][2:] == copied


def test_an_option_that_came_later_and_is_not_used_makes_no_difference(
    study: Study, done: Path, tmp_path: Path
) -> None:
    earlier = tmp_path / "earlier"
    shutil.copytree(done, earlier)
    saved = read_json(earlier / "study.json")
    for variant in saved["variants"].values():
        del variant["data"]["wrong_captions"]
    write_json(earlier / "study.json", saved)
    assert "matching-1" in [str(unit) for unit in reuse(study, tmp_path / "mine", earlier, [1])]


def test_it_is_what_the_study_itself_would_find(study: Study, done: Path, tmp_path: Path) -> None:
    assert run_study(load_study(study.source, variants=["matching"]), tmp_path / "own", [1])
    own, theirs = (read_json(path) for path in (tmp_path / "own/units/matching-1.json", done / "units/dmd-1.json"))
    assert own["noises"] == theirs["noises"]


def test_what_is_there_stays(study: Study, done: Path, tmp_path: Path) -> None:
    reuse(study, tmp_path / "mine", done, [1])
    before = (tmp_path / "mine/units/matching-1.json").stat().st_mtime_ns
    assert reuse(study, tmp_path / "mine", done, [1]) == []
    assert (tmp_path / "mine/units/matching-1.json").stat().st_mtime_ns == before


def test_what_was_measured_otherwise_is_measured_anew(study: Study, done: Path, tmp_path: Path) -> None:
    other = load_study(study.source, ["evaluation.noises=3"], variants=["matching"])
    mine, there = tmp_path / "mine", read_json(done / "units/dmd-1.json")
    claim_study(other, mine)
    (mine / "units/matching-1/run.part").mkdir(parents=True)  # of a call that was killed
    assert [str(unit) for unit in reuse(other, mine, done, [1])] == ["matching-1"]
    assert not (mine / "units/matching-1.json").exists()
    assert {path.name for path in (mine / "units/matching-1").iterdir()} >= {"run", "reused_from.json"}
    assert reuse(other, mine, done, [1]) == []

    student = mine / "units/matching-1/run/student"
    before = {path.name: path.stat().st_mtime_ns for path in student.iterdir()}
    assert run_study(other, mine, [1])
    assert {path.name: path.stat().st_mtime_ns for path in student.iterdir()} == before
    results = read_json(mine / "units/matching-1.json")
    assert results["noises"][:2] == there["noises"]
    assert len(results["noises"]) == 3
    for clock in ("seconds", "cpu_seconds"):
        assert results[clock]["train"] == there[clock]["train"]
        assert results[clock].keys() == {"train", "sample", "measure", "all"}
    assert results["training"] == there["training"]
    assert results["reused_from"] == "small/dmd-1"
    assert results["training_environment"] == there["environment"]


def test_what_was_measured_otherwise_still_says_which_run_it_went_on_from(
    study: Study, done: Path, tmp_path: Path
) -> None:
    earlier = Path(shutil.copytree(done, tmp_path / "earlier"))
    results, beginning = read_json(earlier / "units/dmd-1.json"), {"unit": "short-1", "steps": 1}
    results["seconds"]["train_rest"] = results["seconds"].pop("train")
    write_json(earlier / "units/dmd-1.json", results | {"beginning": beginning})
    reuse(load_study(study.source, ["evaluation.noises=3"]), tmp_path / "mine", earlier, [1])
    said = read_json(tmp_path / "mine/units/matching-1/reused_from.json")
    assert said["beginning"] == beginning
    assert said["seconds"] == {"train_rest": results["seconds"]["train_rest"]}


def test_a_run_that_has_begun_here_stays(study: Study, done: Path, tmp_path: Path) -> None:
    other = load_study(study.source, ["evaluation.noises=3"])
    claim_study(other, tmp_path / "mine")
    begun = tmp_path / "mine/units/matching-1/run"
    begun.mkdir(parents=True)
    assert reuse(other, tmp_path / "mine", done, [1]) == []
    assert not list(begun.iterdir())


def test_what_is_not_known_of_an_earlier_training_is_left_out(study: Study, done: Path, tmp_path: Path) -> None:
    earlier = Path(shutil.copytree(done, tmp_path / "earlier"))
    results = read_json(earlier / "units/dmd-1.json")
    write_json(earlier / "units/dmd-1.json", {key: each for key, each in results.items() if key != "cpu_seconds"})
    other = load_study(study.source, ["evaluation.noises=3"], variants=["matching"])
    reuse(other, tmp_path / "mine", earlier, [1])
    assert read_json(tmp_path / "mine/units/matching-1/reused_from.json").keys() == {
        "reused_from",
        "seconds",
        "training_environment",
    }


def test_a_student_that_diverged_has_nothing_to_measure_anew(study: Study, done: Path, tmp_path: Path) -> None:
    earlier = Path(shutil.copytree(done, tmp_path / "earlier"))
    results = read_json(earlier / "units/dmd-1.json")
    write_json(
        earlier / "units/dmd-1.json", {key: results[key] for key in ("variant", "seed", "seconds")} | {"failed": "x"}
    )
    other = load_study(study.source, ["evaluation.noises=3"])
    assert [str(unit) for unit in reuse(other, tmp_path / "mine", earlier, [1])] == ["matching-1"]
    assert read_json(tmp_path / "mine/units/matching-1.json")["failed"] == "x"


WITH_TEACHER = {
    "study": OTHER.replace("[matching, avd]", "[sampled, matching, avd]"),
    "sampled": FILES["teacher"].replace("of: dmd", "of: matching"),
}


@pytest.fixture(scope="module")
def sampled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sampled")
    assert run_study(load_study(write_study(folder / "small"), variants=["teacher"]), folder / "results", [1])
    return folder / "results"


def test_a_teacher_that_is_sampled_in_the_same_way_is_copied(sampled: Path, tmp_path: Path) -> None:
    """Its run may be another one: nothing of that is trained."""
    files = NAMES | WITH_TEACHER | {"matching": FILES["dmd"].replace("max_steps: 2", "max_steps: 3")}
    study = load_study(write_study(tmp_path / "other", **files))
    copied = reuse(study, tmp_path / "mine", sampled, [1, 2])
    assert [str(unit) for unit in copied] == ["reference-4", "controls-4", "sampled-1"]
    mine, theirs = (
        read_json(path) for path in (tmp_path / "mine/units/sampled-1.json", sampled / "units/teacher-1.json")
    )
    assert mine == theirs | {"variant": "sampled", "reused_from": "small/teacher-1"}


@pytest.mark.parametrize(
    ("file", "old", "new"),
    [
        ("sampled", "steps: 2", "steps: 3"),
        ("matching", "online_updates: 1", "online_updates: 1, guidance_scale: 9"),
        ("matching", "online_updates: 1", "online_updates: 1, sampling_shift: 9"),
        ("study", "noises: 2", "noises: 3"),
        ("all", "clips: 8", "clips: 8, seed: 9"),
    ],
)
def test_another_teacher_is_not(sampled: Path, tmp_path: Path, file: str, old: str, new: str) -> None:
    files = NAMES | WITH_TEACHER
    changed = {name: text.replace(old, new) for name, text in files.items() if text and file in (name, "all")}
    assert changed != {name: files[name] for name in changed}
    study = load_study(write_study(tmp_path / "other", **files | changed))
    assert "sampled" not in {unit.variant for unit in reuse(study, tmp_path / "mine", sampled, [1])}


def test_what_is_no_study_is_refused(study: Study, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="there is no study"):
        reuse(study, tmp_path / "mine", tmp_path, [1])
