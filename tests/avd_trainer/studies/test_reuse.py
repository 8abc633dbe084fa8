"""What a study takes over from another one."""

import shutil
from pathlib import Path

import pytest

from avd_trainer.runtime.errors import UserError
from avd_trainer.runtime.files import read_json, write_json
from avd_trainer.studies.definition import Study, load_study
from avd_trainer.studies.reuse import reuse
from avd_trainer.studies.runner import run_study
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


def test_another_way_to_measure_is_refused(study: Study, done: Path, tmp_path: Path) -> None:
    other = load_study(study.source, ["evaluation.noises=3"])
    with pytest.raises(UserError, match=r"evaluation.noises: 2 there, 3 now"):
        reuse(other, tmp_path / "mine", done, [1])
    assert not (tmp_path / "mine").exists()


def test_what_is_no_study_is_refused(study: Study, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="there is no study"):
        reuse(study, tmp_path / "mine", tmp_path, [1])
