"""Students that may cost the same: how many steps that comes to, and that it stays so."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from avd_trainer.config.loading import load_config
from avd_trainer.data.sources import TrainingData
from avd_trainer.methods.base import Turn, forward_equivalents
from avd_trainer.runtime.errors import UserError
from avd_trainer.runtime.files import read_json
from avd_trainer.runtime.ranks import Ranks
from avd_trainer.studies import budget, units
from avd_trainer.studies.budget import share_budget, time_step
from avd_trainer.studies.definition import Cost, Study, load_study
from avd_trainer.studies.runner import claim_study, run_study
from avd_trainer.studies.summary import render, write_summary
from avd_trainer.training.config import TrainConfig
from runs import MakeConfig, MakeTrainer
from small_study import write_study

BUDGET = """
    # Students that cost the same.
    baseline: dmd
    budget_of: dmd
    variants: [teacher, dmd, avd, half-rate, interpolator]
    evaluation: {captions: 4, noises: 2, batch_size: 3, renderings: 3}"""
SECONDS = {"dmd": 2.0, "avd": 3.0, "vpae": 1.0}
FORWARDS = {"dmd": 0.5 + 3 + 2 + 1 + 3, "avd": 0.5 + 3 + 2 + 1 + 3 + 3}
"""Of an example in a step of two few steps and one online update, with guidance."""


@pytest.fixture
def name(tmp_path: Path) -> str:
    return write_study(tmp_path / "small", study=BUDGET)


def seconds(run: TrainConfig) -> float:
    return SECONDS[run.method.kind]


def shared(name: str, steps: int) -> Study:
    return share_budget(load_study(name, [f"max_steps={steps}"]), {}, seconds)


def test_steps_follow_from_forwards_and_from_seconds(name: str) -> None:
    study = shared(name, 20)
    steps = {each: run.max_steps for each, run in study.variants.items() if isinstance(run, TrainConfig)}
    assert steps == {
        "dmd": 20,
        "avd": int(20 * FORWARDS["dmd"] / FORWARDS["avd"]),
        "avd-seconds": 13,
        "interpolator": 20,
    }
    assert study.costs.keys() == {"dmd", "avd"}
    assert study.costs["avd"][:2] == (2 * FORWARDS["avd"], 3.0)  # of a batch of two
    assert study.costs["avd"].memory > 0
    assert Cost(**study.values()["costs"]["avd"]) == study.costs["avd"]
    run = study.run("avd")
    assert forward_equivalents(run.method.calls(1)) == FORWARDS["avd"]
    assert study.run("avd-seconds") == run.model_copy(update={"max_steps": 13})
    assert {unit.variant for unit in study.units([1])} >= {"dmd", "avd", "avd-seconds", "teacher", "half-rate"}


def test_a_budget_of_forwards_alone_measures_nothing(name: str, tmp_path: Path, timed: list[str]) -> None:
    only = write_study(tmp_path / "forwards", study=BUDGET + "\n    budgets: [forwards]")
    folder = tmp_path / "out"
    study = claim_study(load_study(only, ["max_steps=20"], ["dmd", "avd"]), folder)
    assert study.run("avd") == shared(name, 20).run("avd")
    assert not timed
    assert [each for each in study.order if each.endswith("-seconds")] == []
    assert {unit.variant for unit in study.units([1])}.isdisjoint({"avd-seconds"})
    again = claim_study(load_study(only, ["max_steps=20"], ["dmd", "avd"]), folder)
    assert again.variants == study.variants
    found = write_summary(study, folder, [1])
    assert (found["costs"]["avd"]["forwards"], found["costs"]["avd"]["seconds"]) == (2 * FORWARDS["avd"], None)
    spread = {"mean": 0.0, "std": 0.1, "low": 0.0, "high": 0.1}
    real = {"spreads": {"saturation_error": spread}, "sets": 3}
    assert f"| avd | {2 * FORWARDS['avd']:g} |  |" in render({**found, "reference": real})
    with pytest.raises(UserError, match="budgets must have forwards"):
        load_study(write_study(tmp_path / "forwards", study=BUDGET + "\n    budgets: [seconds]"))


def test_a_cost_that_changes_over_a_run_is_that_of_the_whole(tmp_path: Path) -> None:
    vpae = """
        # In two phases.
        extends: tiny/vpae
        data: {clips: 8}
        batch_size: 2
        method: {priming_steps: 4}"""
    study = BUDGET.replace("[teacher, dmd, avd, half-rate, interpolator]", "[dmd, vpae]")
    files = {"study": study, "vpae": vpae, **dict.fromkeys(("teacher", "avd", "half-rate", "interpolator"))}
    study = shared(write_study(tmp_path / "phases", **files), 40)
    run = study.run("vpae")
    primed = run.method.priming_steps
    cost = [steps * forward_equivalents(run.method.calls(steps)) for steps in (primed, run.max_steps)]
    assert cost[0] / primed > 12  # priming is the dearer phase
    assert cost[1] == pytest.approx(cost[0] + 12 * (run.max_steps - primed))
    assert cost[1] <= 40 * FORWARDS["dmd"] < cost[1] + 12
    assert (primed, study.run("vpae-seconds").method.priming_steps) == (round(run.max_steps / 10), 8)  # 4 of 40


@pytest.mark.parametrize(
    ("preset", "section", "wanted"),
    [("vpae", "priming_steps", 150), ("dcm", "detail", 150), ("rcm", "tangent_warmup", 30), ("dmd", "few_steps", None)],
)
def test_a_phase_keeps_its_share_of_the_run(preset: str, section: str, wanted: int | None) -> None:
    method = load_config(TrainConfig, "tiny", method=preset).method
    scaled = method.scaled(1.5)
    assert method.model_dump(exclude={section}) == scaled.model_dump(exclude={section})
    found = getattr(scaled, section)
    assert wanted is None or getattr(found, "after", found) == wanted


def test_one_step_is_the_least(name: str) -> None:
    assert shared(name, 1).run("avd").max_steps == 1


def test_without_a_budget_each_has_its_own_steps(tmp_path: Path) -> None:
    study = load_study(write_study(tmp_path / "small"))
    assert share_budget(study, {}, seconds) is study
    assert study.order == list(study.variants)


@pytest.fixture
def timed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Methods whose steps were timed."""
    asked: list[str] = []

    def look(_: object, run: TrainConfig) -> float:
        asked.append(run.method.kind)
        return SECONDS[run.method.kind] + len(asked)  # never the same again

    monkeypatch.setattr(units.Workplace, "time_step", look)
    return asked


def test_what_was_measured_once_stays(name: str, tmp_path: Path, timed: list[str]) -> None:
    folder = tmp_path / "out"
    first = claim_study(load_study(name, ["max_steps=20"], ["dmd"]), folder)
    assert (timed, list(first.variants)) == (["dmd"], ["dmd"])
    both = claim_study(load_study(name, ["max_steps=20"], ["avd"]), folder)
    assert timed == ["dmd", "avd"]
    saved = read_json(folder / "study.json")
    assert saved["costs"].keys() == {"dmd", "avd"}
    assert saved["costs"]["dmd"]["seconds"] == 3.0
    assert saved["variants"]["avd-seconds"]["max_steps"] == both.run("avd-seconds").max_steps == 12
    again = claim_study(load_study(name, ["max_steps=20"], ["dmd", "avd"]), folder)
    assert again.variants == both.variants
    assert read_json(folder / "study.json") == saved
    assert timed == ["dmd", "avd"]
    assert [unit.variant for unit in both.units([1])][2:] == ["avd", "avd-seconds"]  # dmd only says what it costs


def test_a_study_begun_by_forwards_goes_on_by_seconds_too(name: str, tmp_path: Path, timed: list[str]) -> None:
    folder = tmp_path / "out"
    (tmp_path / "forwards").mkdir()
    only = write_study(tmp_path / "forwards" / "small", study=BUDGET + "\n    budgets: [forwards]")
    first = claim_study(load_study(only, ["max_steps=20"], ["dmd", "avd"]), folder)
    both = claim_study(load_study(name, ["max_steps=20"], ["dmd", "avd"]), folder)
    assert timed == ["dmd", "avd"]
    assert {each: run for each, run in both.variants.items() if each != "avd-seconds"} == first.variants
    saved = read_json(folder / "study.json")["costs"]
    assert (saved["dmd"]["seconds"], saved["avd"]["seconds"]) == (3.0, 5.0)
    assert both.run("avd-seconds").max_steps == 12
    assert claim_study(load_study(only, ["max_steps=20"], ["dmd", "avd"]), folder).variants == first.variants
    assert timed == ["dmd", "avd"]


def test_the_table_says_what_a_step_costs(name: str, tmp_path: Path, timed: list[str]) -> None:
    folder = tmp_path / "out"
    study = claim_study(load_study(name, ["max_steps=20"], ["dmd", "avd"]), folder)
    found = write_summary(load_study(name, ["max_steps=20"], ["dmd", "avd"]), folder, [1, 2])
    assert list(found["variants"]) == ["dmd", "avd", "avd-seconds"]
    assert found["variants"]["avd-seconds"]["title"] == "With both terms. For as many seconds as dmd."
    assert found["command"].endswith("--variants dmd,avd --set max_steps=20")
    assert study.costs["avd"].forwards == found["costs"]["avd"]["forwards"]


def test_steps_of_each_kind_count_as_often_as_the_run_has_them(
    monkeypatch: pytest.MonkeyPatch, data: TrainingData, make_config: MakeConfig, ranks: Ranks
) -> None:
    clock = [0.0]

    class Stub:
        """Of every ten steps the tenth takes 5 seconds, of the rest those after step 80 take 3, and the others 1."""

        def __init__(self, *_: object) -> None:
            self.method, self.step, self.first = self, 0, True

        def turns(self, step: int) -> list[Turn]:
            return [Turn("student", part="watched" if step % 10 == 0 else "late" if step > 80 else "")]

        def run(self) -> Iterator[None]:
            clock[0] += 1000  # opening the data, which a run does once
            return self.steps()

        def steps(self) -> Iterator[None]:
            clock[0] += {"watched": 5, "late": 3, "": 1}[self.turns(self.step + 1)[0].part] + 50 * self.first
            self.first = False
            yield

    monkeypatch.setattr(budget, "Trainer", Stub)
    monkeypatch.setattr(budget.time, "perf_counter", lambda: clock[0])
    seconds = time_step(make_config("dmd", max_steps=100), data, ranks)
    assert seconds == pytest.approx((72 * 1 + 18 * 3 + 10 * 5) / 100)


def test_the_data_of_a_run_is_open_before_its_first_step(
    monkeypatch: pytest.MonkeyPatch, make_trainer: MakeTrainer
) -> None:
    trainer, opened = make_trainer("dmd"), []
    monkeypatch.setattr(trainer, "_streams", lambda: opened.append("data"))
    trainer.run()
    assert opened == ["data"]


def test_a_step_is_timed_all_over_the_run(data: TrainingData, make_config: MakeConfig, ranks: Ranks) -> None:
    assert 0 < time_step(make_config("dmd", max_steps=50), data, ranks) < 60


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"study": BUDGET.replace("budget_of: dmd", "budget_of: nobody")}, "has no variant 'nobody'"),
        ({"study": BUDGET.replace("budget_of: dmd", "budget_of: teacher")}, "budget_of must be a variant that trains"),
        (
            {"study": BUDGET + "\n    budgets: [forwards, forwards]"},
            "budgets must be named once each, got forwards, for",
        ),
        (
            {"study": BUDGET.replace("budget_of: dmd", "budgets: [forwards]")},
            "budgets are of budget_of, the variant that says what students may cost, got forwards alone",
        ),
        ({"study": BUDGET, "avd-seconds": "# Taken.\nextends: dmd"}, "avd-seconds cannot be the name of a variant"),
    ],
)
def test_what_does_not_fit_is_refused(tmp_path: Path, changes: dict[str, str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        load_study(write_study(tmp_path / "small", **changes))


def test_a_study_from_start_to_end(tmp_path: Path) -> None:
    again = """
        # Goes on from the student of dmd.
        extends: dmd
        max_steps: 1
        student_weights: variant:dmd"""
    study = BUDGET.replace("[teacher, dmd, avd, half-rate, interpolator]", "[dmd, avd, again]")
    files = {"study": study, "again": again, **dict.fromkeys(("teacher", "half-rate", "interpolator"))}
    small, folder = load_study(write_study(tmp_path / "small", **files)), tmp_path / "out"
    assert run_study(small, folder, [1])
    done = {file.stem for file in (folder / "units").glob("*.json")}
    assert done == {"reference-4", "controls-4", "dmd-1", "avd-1", "avd-seconds-1", "again-1"}
    run = folder / "units" / "again-1" / "run" / "config.yaml"
    assert "units/dmd-1/run/student" in run.read_text()
    found = write_summary(small, folder, [1])
    assert found["variants"]["dmd"]["seeds"]["1"]["monitor"].keys() == {"of_samples"}  # too short for more
    assert found["costs"].keys() == {"dmd", "avd"}
    table = (folder / "table.md").read_text()
    steps = [found["variants"][name]["values"]["max_steps"] for name in ("avd", "avd-seconds")]
    (line,) = [each for each in table.splitlines() if each.startswith(f"| avd | {2 * FORWARDS['avd']:g} | ")]
    assert line.endswith(f" | {steps[0]} | {steps[1]} |")
    judged = table.partition("## What the monitor says")[2]
    assert [name for name in ("dmd", "avd", "avd-seconds", "again") if f"\n| {name} | " in judged] == list(
        found["variants"]
    )
