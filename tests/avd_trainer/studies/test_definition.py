"""What a study's folder says, and what is refused before any work."""

import re
from pathlib import Path

import pytest

from avd_trainer.config.differences import differences
from avd_trainer.config.loading import read_values
from avd_trainer.evaluation.measures import VERSION
from avd_trainer.methods.distillation import DistillationConfig
from avd_trainer.models.weights import open_weights
from avd_trainer.runtime.errors import UserError
from avd_trainer.studies.catalog import find_study, list_studies
from avd_trainer.studies.definition import (
    HalfRateVariant,
    Study,
    TeacherVariant,
    Unit,
    load_study,
    parse_seeds,
)
from avd_trainer.training.config import TrainConfig
from small_study import FILES, write_study

PAGE = (Path(__file__).parents[3] / "docs" / "studies.md").read_text()


@pytest.fixture
def study(tmp_path: Path) -> Study:
    return load_study(write_study(tmp_path / "small"))


def test_variants_are_read_in_the_order_of_the_study(study: Study) -> None:
    assert study.name == "small"
    assert study.title == "Two steps of everything."
    assert study.titles["dmd"] == "Matching alone."
    kinds = [TeacherVariant, TrainConfig, TrainConfig, HalfRateVariant, TrainConfig]
    assert [(name, type(variant)) for name, variant in study.variants.items()] == list(
        zip(["teacher", "dmd", "avd", "half-rate", "interpolator"], kinds, strict=True)
    )


def test_a_variant_has_the_values_of_the_one_that_it_extends(study: Study) -> None:
    avd = study.run("avd")
    assert (avd.method.kind, avd.max_steps, avd.few_steps) == ("avd", 2, (1000.0, 500.0))
    assert avd.method.guidance_scale == study.run("dmd").method.guidance_scale
    assert study.run("half-rate") is avd
    assert study.run("teacher") is study.run("dmd")


def test_runs_go_on_unseen(study: Study) -> None:
    assert study.run("dmd").samples.every is None
    assert not study.run("dmd").logging.tensorboard


def test_units_come_seed_by_seed_behind_what_is_done_once(study: Study) -> None:
    units = list(map(str, study.units([1, 2])))
    assert units[:3] == ["reference-4", "controls-4", "interpolator-0"]
    assert units[3:] == [f"{name}-{seed}" for seed in (1, 2) for name in ("teacher", "dmd", "avd", "half-rate")]
    assert study.needs(Unit("half-rate", 2)) == [Unit("avd", 2), Unit("interpolator", 0)]
    assert study.needs(Unit("avd", 2)) == study.needs(Unit("teacher", 2)) == []


def test_a_variant_brings_what_it_refers_to(tmp_path: Path) -> None:
    name = write_study(tmp_path / "small")
    assert list(load_study(name, variants=["half-rate"]).variants) == ["avd", "half-rate", "interpolator"]
    assert list(load_study(name, variants=["avd"]).variants) == ["avd"]


def test_a_run_may_start_from_the_student_of_another_one(tmp_path: Path) -> None:
    avd = "# Goes on.\nextends: dmd\nmax_steps: 1\nstudent_weights: variant:dmd"
    again = "# Goes on, too.\nextends: avd\nbatch_size: 4"
    listed = FILES["study"].replace("half-rate,", "again,")
    files = {"study": listed, "avd": avd, "again": again, "half-rate": None}
    study = load_study(write_study(tmp_path / "small", **files), variants=["again"])
    assert list(study.variants) == ["dmd", "again"]
    assert study.needs(Unit("again", 2)) == [Unit("dmd", 2)]
    wrong = avd.replace("variant:dmd", "variant:interpolator")
    with pytest.raises(UserError, match="student_weights must be of a variant that trains a student, got interpolator"):
        load_study(write_study(tmp_path / "wrong", avd=wrong))


def test_a_teacher_brings_the_values_of_its_run_and_no_work(tmp_path: Path) -> None:
    study = load_study(write_study(tmp_path / "small"), variants=["teacher"])
    assert list(study.variants) == ["teacher", "dmd"]
    assert "dmd" in study.values()["variants"]
    assert [unit.variant for unit in study.units([1])] == ["reference", "controls", "teacher"]


def test_files_for_others_to_extend_are_no_variants(tmp_path: Path) -> None:
    name = write_study(tmp_path / "small", _shared="extends: dmd\nmax_steps: 9", avd="# As shared.\nextends: _shared")
    study = load_study(name)
    assert "_shared" not in study.variants
    assert study.run("avd").max_steps == 9


def test_values_say_which_weights_and_measures(tmp_path: Path) -> None:
    values = load_study(write_study(tmp_path / "small")).values()
    with open_weights("bundled:tiny") as weights:
        digest = weights.digest()
    assert values["measures_version"] == VERSION
    of_runs = {name: each.get("teacher_digest") for name, each in values["variants"].items()}
    assert of_runs == {"teacher": None, "dmd": digest, "avd": digest, "half-rate": None, "interpolator": None}


def test_values_are_chosen_on_other_captions_and_seeds_than_results() -> None:
    tuning, table2 = load_study("tuning"), load_study("table2")
    assert set(parse_seeds(tuning.config.seeds)).isdisjoint(parse_seeds(table2.config.seeds))
    assert tuning.config.evaluation.caption_seed != table2.config.evaluation.caption_seed


def test_rates_of_all_methods_are_chosen_in_the_same_way_before_they_are_compared() -> None:
    tuning, methods = load_study("methods-tuning"), load_study("methods")
    assert set(parse_seeds(tuning.config.seeds)).isdisjoint(parse_seeds(methods.config.seeds))
    assert tuning.config.evaluation.caption_seed != methods.config.evaluation.caption_seed
    assert tuning.config.choose
    rates: dict[str, dict[float, str]] = {}
    for name in tuning.variants:
        method = tuning.run(name).method
        assert isinstance(method, DistillationConfig)
        rates.setdefault(method.kind, {})[method.student.optimizer.lr] = name
    assert rates.keys() == {methods.run(name).method.kind for name in methods.variants} - {"avd"}
    for kind, settings in rates.items():
        assert settings.keys() >= {5e-5, 1e-4, 2e-4}, kind
        # What is chosen is a value of the study's own run, which differs in nothing else.
        alone = methods.run(kind.replace("_", "-"))
        assert isinstance(alone.method, DistillationConfig)
        tuned = tuning.run(settings[alone.method.student.optimizer.lr])
        if kind == "data_forcing":
            tuned = tuned.model_copy(update={"student_weights": alone.student_weights})
        assert tuned == alone


@pytest.mark.parametrize("name", list_studies())
def test_no_study_hangs_on_what_a_preset_says_of_the_regression(name: str) -> None:
    """A preset may come to judge by something else; what a study's titles say must stay true."""
    study = load_study(name)
    folder = find_study(name)
    runs = {each: run for each, run in study.variants.items() if isinstance(run, TrainConfig)}
    for variant in [each for each, run in runs.items() if run.method.kind == "avd"]:
        texts, file = [], variant
        while "/" not in file:
            texts.append((folder / f"{file}.yaml").read_text())
            file = str(read_values(folder / f"{file}.yaml")["extends"])
        written = "".join(texts)
        assert "regression: null" in written or ("judged:" in written and "deviation:" in written), variant


STUDY_OF_TWO = """
    # Two of them.
    baseline: avd
    variants: [avd, more, teacher, dmd, half-rate, interpolator]"""


def test_variants_whose_captions_are_wrong_are_judged_by_the_same_clips(tmp_path: Path) -> None:
    right, wrong = "# One.\nextends: dmd", "# Other.\nextends: dmd\ndata: {wrong_captions: 0.5}"
    for one, other in ((right, wrong), (wrong, right)):  # whichever comes first
        study = write_study(tmp_path / "small", study=STUDY_OF_TWO, avd=one, more=other)
        assert load_study(study, variants=["avd", "more"]).data.wrong_captions is None


def test_overrides_are_of_the_runs_or_of_the_evaluation(tmp_path: Path) -> None:
    study = load_study(write_study(tmp_path / "small"), ["max_steps=7", "evaluation.noises=9"])
    assert {study.run(name).max_steps for name in study.variants} == {7}
    assert study.config.evaluation.noises == 9
    with pytest.raises(UserError, match=r"(?s)interpolator\.yaml.*method\.guidance_scale: there is no such field"):
        load_study(write_study(tmp_path / "small"), ["method.guidance_scale=2"])
    assert load_study(write_study(tmp_path / "small"), ["method.guidance_scale=2"], ["dmd"]).run("dmd")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"avd": None}, r"variants must name each file of the folder once"),
        ({"more": "# One more.\nextends: dmd"}, r"variants must name each file of the folder once: avd, dmd, .*more"),
        ({"avd": "extends: dmd"}, r"avd\.yaml: the first line must be a comment that says what the variant is"),
        (
            {"avd": "# Wrong.\nextends: dm"},
            r"extends 'dm', expected one of tiny/avd, .* file beside it",
        ),
        ({"dmd": "# Round.\nextends: avd"}, r"dmd\.yaml extends itself: avd -> dmd -> avd|dmd -> avd -> dmd"),
        ({"avd": "# Data.\nextends: dmd\ndata: {seed: 5}"}, r"avd\.yaml: data differs from that of the other variants"),
        ({"avd": "# Teacher.\nextends: dmd\nteacher: elsewhere"}, r"avd\.yaml: teacher differs from that of the other"),
        ({"teacher": "# Of nobody.\nteacher_of: nobody"}, r"has no variant 'nobody', which another one names"),
        ({"teacher": "# Wrong.\nteacher_of: interpolator"}, r"a variant that trains a student is expected"),
        ({"half-rate": "# Wrong.\nof: teacher"}, r"half-rate\.yaml: a variant that trains a student is expected"),
        ({"half-rate": "# Wrong.\nof: avd\nhalf_rate_steps: 3"}, r"half_rate_steps must be from 0 to 2"),
        (
            {"half-rate": "# Wrong.\nof: avd\ninterpolator: dmd"},
            r"interpolator must be a variant of method frame_",
        ),
        ({"half-rate": "# Wrong.\nof: avd\nrate: 2"}, r"rate: there is no such field"),
        ({"reference": "# Taken.\nextends: dmd"}, r"reference cannot be the name of a variant"),
        ({"study": "baseline: dmd\nseeds: 8..1\nvariants: [teacher]"}, r"seeds '8..1': expected a range"),
        ({"study": "baseline: nobody\nvariants: [teacher, dmd, avd, half-rate, interpolator]"}, r"no variant 'nobody'"),
        ({"avd": "# Videos.\nextends: dmd\ndata: {kind: videos, path: x}"}, r"there is no such field|must be shapes"),
    ],
)
def test_what_does_not_fit_is_refused(tmp_path: Path, changes: dict[str, str | None], message: str) -> None:
    with pytest.raises(UserError, match=message):
        load_study(write_study(tmp_path / "small", **changes))


def test_a_variant_is_compared_with_the_baseline_or_with_its_own(tmp_path: Path) -> None:
    paired = FILES["study"] + "\n        against: {half-rate: avd}"
    study = load_study(write_study(tmp_path / "small", study=paired))
    there = ["teacher", "dmd", "avd", "avd-seconds", "half-rate", "half-rate-seconds", "teacher-seconds"]
    found = {name: study.compared_with(name, there) for name in there}
    assert found == {
        "teacher": "dmd",
        "dmd": None,
        "avd": "dmd",
        "avd-seconds": "dmd",  # of which there is but one run
        "half-rate": "avd",
        "half-rate-seconds": "avd-seconds",
        "teacher-seconds": "dmd",
    }
    assert study.compared_with("avd-seconds", [*there, "dmd-seconds"]) == "dmd-seconds"
    assert study.compared_with("dmd-seconds", [*there, "dmd-seconds"]) is None
    asked = load_study(study.source, baseline="teacher")
    assert {asked.compared_with(name, ["teacher", "dmd", "half-rate"]) for name in ("dmd", "half-rate")} == {"teacher"}


@pytest.mark.parametrize(
    ("against", "message"),
    [
        ("{nobody: dmd}", "has no variant 'nobody'"),
        ("{avd: nobody}", "has no variant 'nobody'"),
        ("{avd: avd}", "against names two variants in each pair, .*got avd: avd"),
        ("{avd-seconds: dmd-seconds}", "without -seconds, which follows from it, got avd-seconds: dmd-seconds"),
        ("{avd: interpolator}", "against must name variants that make clips, got interpolator"),
    ],
)
def test_pairs_that_do_not_fit_are_refused(tmp_path: Path, against: str, message: str) -> None:
    paired = FILES["study"] + f"\n        against: {against}"
    with pytest.raises(UserError, match=message):
        load_study(write_study(tmp_path / "small", study=paired))


def test_unknown_names_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"'tabel2' is neither a study \(.*table2.*\) nor a folder with a study\.yaml"):
        find_study("tabel2")
    with pytest.raises(UserError, match=r"has no variant 'adv'. It has teacher, dmd, avd"):
        load_study(write_study(tmp_path / "small"), variants=["adv"])


@pytest.mark.parametrize(
    ("text", "seeds"), [("1..8", list(range(1, 9))), ("3", [3]), ("7,1,3", [1, 3, 7]), ("1..3,100", [1, 2, 3, 100])]
)
def test_seeds(text: str, seeds: list[int]) -> None:
    assert parse_seeds(text) == seeds


@pytest.mark.parametrize("text", ["", "a", "1..", "1-8", "3..1", "1,1", "1..3,2", "-1", "1...3"])
def test_wrong_seeds_are_refused(text: str) -> None:
    with pytest.raises(UserError, match=r"expected a range such as 1\.\.8, or a list such as 1,3,7, each seed once"):
        parse_seeds(text)


@pytest.mark.parametrize("name", list_studies())
def test_every_study_of_the_package_is_valid(name: str) -> None:
    study = load_study(name)
    assert study.title
    assert study.config.baseline in study.variants
    assert list(study.variants) == list(study.config.variants)
    for variant in study.variants:  # a variant that no other one is like
        same = [other for other in study.variants if study.variants[other] == study.variants[variant]]
        assert same == [variant]


def test_there_are_studies() -> None:
    assert {"table2", "tuning", "floors", "sharpness", "balance", "style"} <= list_studies().keys()


def test_avds_terms_are_the_same_on_top_of_every_method_but_for_the_weight_of_motion() -> None:
    files = {path.stem: read_values(path) for path in find_study("methods").glob("*-avd.yaml")}
    assert len(files) == 10
    weights = {values["extends"]: values["method"]["avd"]["motion"].pop("weight") for values in files.values()}
    terms = files["dmd-avd"]["method"]["avd"]
    for name, values in files.items():
        assert values == {"extends": name.removesuffix("-avd"), "method": {"avd": terms}}
    # The page's rule: 0.05 within three times of what the term's gradient is in dmd; else the weight that makes it so.
    rows = re.findall(r"^\| `(\w+|data-forcing)`[^|]*\| ([\d.]+) \| ([\d.]+) \|$", PAGE, re.MULTILINE)
    shares = {name: float(share) for name, share, weight in rows}
    assert {name: float(weight) for name, share, weight in rows} == weights
    for name, share in shares.items():
        times = share / shares["dmd"]
        assert weights[name] == (0.05 if 1 / 3 < times < 3 else float(f"{0.05 / times:.0e}")), name


def test_each_method_with_avds_terms_is_compared_with_itself_alone() -> None:
    study = load_study("methods")
    pairs = dict(study.config.against)
    assert (pairs.pop("data-forcing"), pairs.pop("data-forcing-0")) == ("dmd2", "data-forcing")
    assert pairs == {name: name.removesuffix("-avd") for name in study.variants if name.endswith("-avd")}
    assert study.compared_with("lcm-avd-seconds", study.order) == "lcm-seconds"
    assert load_study("vpae-i2v").compared_with("avd-half-rate", ()) == "avd-four-steps"


@pytest.mark.parametrize("name", ["vpae", "dmd", "csds-0", "csds-1", "head-light", "avd-four-steps"])
def test_image_to_video_differs_from_text_to_video_in_its_teacher_alone(name: str) -> None:
    text, image = (load_study(study).values()["variants"][name] for study in ("vpae", "vpae-i2v"))
    assert text["teacher"] != image["teacher"]
    assert differences(text, image, ignored=("teacher",)) == []


def test_the_control_of_data_forcing_differs_in_that_its_teacher_sees_no_clip() -> None:
    study = load_study("methods")
    run, control = study.run("data-forcing"), study.run("data-forcing-0")
    assert run.method.forcing == 0.5  # type: ignore[attr-defined]
    assert control == run.model_copy(update={"method": run.method.model_copy(update={"forcing": 0.0})})
    assert study.needs(Unit("data-forcing-0", 3)) == study.needs(Unit("data-forcing", 3)) == [Unit("dmd2", 3)]
