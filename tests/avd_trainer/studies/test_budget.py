"""Students that may cost the same: how many steps that comes to, and that it stays so."""

import os
import shutil
import signal
from collections.abc import Callable, Collection, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from avd_trainer.config.loading import load_config
from avd_trainer.data.sources import TrainingData
from avd_trainer.methods.base import Turn, forward_equivalents
from avd_trainer.runtime.errors import UserError
from avd_trainer.runtime.files import read_json, write_json
from avd_trainer.runtime.ranks import Ranks, join_ranks
from avd_trainer.studies import budget, units
from avd_trainer.studies.budget import _judged_like, _lasting, share_budget, time_step
from avd_trainer.studies.definition import Cost, Study, Unit, load_study
from avd_trainer.studies.runner import claim_study, run_study
from avd_trainer.studies.summary import render, write_summary
from avd_trainer.studies.units import Workplace
from avd_trainer.training.checkpoint import list_checkpoints
from avd_trainer.training.config import TrainConfig
from runs import MakeConfig, MakeTrainer, curve, outcome
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


def timed_as(study: Study, measure: Callable[[TrainConfig], float]) -> Study:
    """A study of which it is known how long steps take."""
    costs = share_budget(study, {}).costs
    return share_budget(study, {name: costs[name]._replace(seconds=measure(study.run(name))) for name in costs})


def shared(name: str, steps: int) -> Study:
    return timed_as(load_study(name, [f"max_steps={steps}"]), seconds)


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
    # Its monitors judge when those of the other do, so that one may go on from the other.
    as_the_other = {"monitor_grace": run.grace, "monitor_patience": run.patience}
    assert study.run("avd-seconds") == run.model_copy(update={"max_steps": 13, **as_the_other})
    assert study.beginnings == {"avd": "avd-seconds"}  # 15 steps and 13
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
    assert study.beginnings == {}  # phases have other lengths from the start


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
    assert share_budget(study, {}) is study
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
    assert timed == ["dmd", "dmd", "avd", "dmd"]
    saved = read_json(folder / "study.json")
    assert saved["costs"].keys() == {"dmd", "avd"}
    assert saved["costs"]["dmd"]["seconds"] == 3.0
    assert saved["variants"]["avd-seconds"]["max_steps"] == both.run("avd-seconds").max_steps == 17
    again = claim_study(load_study(name, ["max_steps=20"], ["dmd", "avd"]), folder)
    assert again.variants == both.variants
    assert read_json(folder / "study.json") == saved
    assert timed == ["dmd", "dmd", "avd", "dmd"]
    assert [unit.variant for unit in both.units([1])][2:] == ["avd", "avd-seconds"]  # dmd only says what it costs


def test_a_study_begun_by_forwards_goes_on_by_seconds_too(name: str, tmp_path: Path, timed: list[str]) -> None:
    folder = tmp_path / "out"
    (tmp_path / "forwards").mkdir()
    only = write_study(tmp_path / "forwards" / "small", study=BUDGET + "\n    budgets: [forwards]")
    first = claim_study(load_study(only, ["max_steps=20"], ["dmd", "avd"]), folder)
    both = claim_study(load_study(name, ["max_steps=20"], ["dmd", "avd"]), folder)
    assert timed == ["dmd", "avd", "dmd"]
    assert {each: run for each, run in both.variants.items() if each != "avd-seconds"} == first.variants
    saved = read_json(folder / "study.json")["costs"]
    assert (saved["dmd"]["seconds"], saved["avd"]["seconds"]) == (3.0, 5.0 * 3 / 4)
    assert both.run("avd-seconds").max_steps == 16
    assert claim_study(load_study(only, ["max_steps=20"], ["dmd", "avd"]), folder).variants == first.variants
    assert timed == ["dmd", "avd", "dmd"]


def test_a_machine_that_becomes_slower_changes_no_budget(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    slower = iter((1.0, 1.25, 1.5, 3.0, 2.0, 1.0))

    def look(_: object, run: TrainConfig) -> float:
        return SECONDS[run.method.kind] * next(slower)

    monkeypatch.setattr(units.Workplace, "time_step", look)
    folder = tmp_path / "out"
    first = claim_study(load_study(name, ["max_steps=20"], ["avd"]), folder)
    assert {each: cost.seconds for each, cost in first.costs.items()} == {"dmd": 2.0, "avd": 3.0}
    variants = tmp_path / "small" / "vpae.yaml"
    variants.write_text((tmp_path / "small" / "avd.yaml").read_text(encoding="utf-8"), encoding="utf-8")
    study = (tmp_path / "small" / "study.yaml").read_text(encoding="utf-8").replace("avd,", "avd, vpae,")
    (tmp_path / "small" / "study.yaml").write_text(study, encoding="utf-8")
    later = claim_study(load_study(name, ["max_steps=20"], ["avd", "vpae"]), folder)
    assert later.costs["vpae"].seconds == 3.0
    assert next(slower, None) is None


def test_a_signal_ends_the_measuring_and_what_was_measured_stays(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []

    def look(place: Workplace, run: TrainConfig) -> float:
        asked.append(run.method.kind)
        if len(asked) == 2:
            os.kill(os.getpid(), signal.SIGTERM)
            place.check_stop()
        return 2.0 * len(asked)

    monkeypatch.setattr(units.Workplace, "time_step", look)
    folder, study = tmp_path / "out", load_study(name, ["max_steps=20"], ["dmd", "avd"])
    assert not run_study(study, folder, [1])
    saved = read_json(folder / "study.json")
    assert {each: cost["seconds"] for each, cost in saved["costs"].items()} == {"dmd": 2.0, "avd": None}
    assert saved["variants"].keys() == {"dmd", "avd"}
    assert not (folder / "units").exists()
    assert "| avd |" not in render(write_summary(study, folder, [1]))
    with pytest.raises(UserError, match=r"max_steps: .* there"):  # what was measured is of these values
        claim_study(load_study(name, ["max_steps=30"], ["dmd", "avd"]), folder)
    whole = claim_study(study, folder)
    assert asked == ["dmd", "avd", "dmd", "avd", "dmd"]
    assert whole.run("avd-seconds").max_steps == round(20 * 2 / 2)
    assert read_json(folder / "study.json")["costs"]["avd"]["seconds"] == 8.0 * 2 / ((6 + 10) / 2)


def test_a_signal_at_the_last_one_ends_the_study_too(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def look(*_: object) -> float:
        os.kill(os.getpid(), signal.SIGTERM)
        return 2.0

    monkeypatch.setattr(units.Workplace, "time_step", look)
    assert not run_study(load_study(name, ["max_steps=20"], ["dmd"]), tmp_path / "out", [1])
    assert read_json(tmp_path / "out" / "study.json")["costs"]["dmd"]["seconds"] == 2.0


def test_the_table_says_what_a_step_costs(name: str, tmp_path: Path, timed: list[str]) -> None:
    folder = tmp_path / "out"
    study = claim_study(load_study(name, ["max_steps=20"], ["dmd", "avd"]), folder)
    found = write_summary(load_study(name, ["max_steps=20"], ["dmd", "avd"]), folder, [1, 2])
    assert list(found["variants"]) == ["dmd", "avd", "avd-seconds"]
    assert found["variants"]["avd-seconds"]["title"] == "With both terms. For as many seconds as dmd."
    assert found["command"].endswith("--variants dmd,avd --set max_steps=20")
    assert study.costs["avd"].forwards == found["costs"]["avd"]["forwards"]


class FakeTrainer:
    """Of every ten steps the tenth takes 5 seconds, of the rest those after step 80 take 3, and the others 1."""

    clock = 0.0
    """What both clocks say."""
    slow: Collection[int] = ()
    """Steps that take 100 seconds more."""

    def __init__(self, config: TrainConfig, *_: object) -> None:
        assert config.student_weights is None
        self.method, self.step, self.first = self, 0, True

    def turns(self, step: int) -> list[Turn]:
        return [Turn("student", part="watched" if step % 10 == 0 else "late" if step > 80 else "")]

    def run(self) -> Iterator[None]:
        FakeTrainer.clock += 1000  # opening the data, which a run does once
        return self.steps()

    def steps(self) -> Iterator[None]:
        seconds = {"watched": 5, "late": 3, "": 1}[self.turns(self.step + 1)[0].part]
        FakeTrainer.clock += seconds + 50 * self.first + 100 * (self.step + 1 in self.slow)
        self.first = False
        yield


@pytest.fixture
def make_fake(monkeypatch: pytest.MonkeyPatch) -> Callable[..., type[FakeTrainer]]:
    def make(clock: str, slow: Collection[int] = ()) -> type[FakeTrainer]:
        monkeypatch.setattr(FakeTrainer, "clock", 0.0)
        monkeypatch.setattr(FakeTrainer, "slow", slow)
        monkeypatch.setattr(budget, "Trainer", FakeTrainer)
        for name in ("perf_counter", "process_time"):
            monkeypatch.setattr(budget.time, name, lambda name=name: FakeTrainer.clock if name == clock else 0.0)
        return FakeTrainer

    return make


def test_steps_of_each_kind_count_as_often_as_the_run_has_them(
    make_fake: Callable[..., type[FakeTrainer]], data: TrainingData, make_config: MakeConfig, ranks: Ranks
) -> None:
    make_fake("process_time")
    looks: list[None] = []
    run = make_config("dmd", max_steps=100, student_weights="variant:another")
    seconds = time_step(run, data, ranks, lambda: looks.append(None))
    assert seconds == pytest.approx((72 * 1 + 18 * 3 + 10 * 5) / 100)
    assert len(looks) == 3 * (budget.LOOKS + 1)


def test_on_a_gpu_steps_are_timed_by_the_clock_when_they_are_done(
    make_fake: Callable[..., type[FakeTrainer]],
    data: TrainingData,
    make_config: MakeConfig,
    ranks: Ranks,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    fake = make_fake("perf_counter", slow=[89])  # a single step of those that are looked at
    waits: list[float] = []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: waits.append(fake.clock))
    gpu = replace(ranks, device=torch.device("cuda"))
    seconds = time_step(make_config("dmd", max_steps=100), data, gpu)
    assert seconds == pytest.approx((72 * 1 + 18 * 3 + 10 * 5) / 100)
    assert len(waits) == 2 * 3 * (budget.LOOKS + 1)
    assert waits[1] - waits[0] == 1 + 50  # before a step and after it


def test_what_is_sampled_for_the_monitors_alone_is_not_charged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, data: TrainingData, make_config: MakeConfig, ranks: Ranks
) -> None:
    regression = """
        # Sampled for the monitors in every step.
        extends: tiny/regression
        data: {clips: 8}
        batch_size: 2
        method: {watch_every: 1}"""
    study = BUDGET.replace("[teacher, dmd, avd, half-rate, interpolator]", "[dmd, regression]")
    files = {"study": study, "regression": regression, **dict.fromkeys(("teacher", "avd", "half-rate", "interpolator"))}
    shared = share_budget(load_study(write_study(tmp_path / "watched", **files), ["max_steps=20"]), {})
    assert shared.run("regression").max_steps == 20 * FORWARDS["dmd"] // 3  # a forward and a backward pass
    assert shared.run("regression").method.watch_every == 1  # it is watched all the same

    timed: list[TrainConfig] = []

    class SeenTrainer(FakeTrainer):
        def __init__(self, config: TrainConfig, *rest: object) -> None:
            timed.append(config)
            super().__init__(config, *rest)

    monkeypatch.setattr(budget, "Trainer", SeenTrainer)
    time_step(make_config("regression", max_steps=9), data, ranks)
    assert [config.method.watch_every for config in timed] == [0]


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
    assert found["costs"].keys() == {"dmd", "avd", "again"}
    assert found["costs"]["again"]["seconds"] > 0
    assert found["variants"]["again"]["values"]["max_steps"] == 1  # its own
    assert {name: each["against"] for name, each in found["variants"].items()} == {
        "dmd": None,
        **dict.fromkeys(("avd", "avd-seconds", "again"), "dmd"),
    }
    table = (folder / "table.md").read_text()
    steps = [found["variants"][name]["values"]["max_steps"] for name in ("avd", "avd-seconds")]
    (line,) = [each for each in table.splitlines() if each.startswith(f"| avd | {2 * FORWARDS['avd']:g} | ")]
    assert line.endswith(f" | {steps[0]} | {steps[1]} |")
    assert not list(folder.rglob("checkpoints"))
    judged = table.partition("## What the monitor says")[2]
    assert [name for name in ("dmd", "avd", "avd-seconds", "again") if f"\n| {name} | " in judged] == list(
        found["variants"]
    )


# --- One run goes on from the other


EARLIER, LATER = Unit("avd", 1), Unit("avd-seconds", 1)


@pytest.fixture(scope="module")
def begun(tmp_path_factory: pytest.TempPathFactory) -> tuple[Study, Path]:
    """A study in which a step of avd takes two thirds of one of dmd, and its units: the shorter run is done."""
    folder = tmp_path_factory.mktemp("begun")
    whole = load_study(write_study(folder / "small", study=BUDGET), ["max_steps=4"])
    study = timed_as(whole, lambda run: {"dmd": 3.0, "avd": 2.0}[run.method.kind])
    assert [study.run(unit.variant).max_steps for unit in (EARLIER, LATER)] == [3, 6]
    with join_ranks() as ranks:
        Workplace(study, folder / "units", ranks).do(EARLIER)
    return study, folder / "units"


@pytest.fixture
def place(begun: tuple[Study, Path], tmp_path: Path, ranks: Ranks) -> Workplace:
    study, folder = begun
    return Workplace(study, Path(shutil.copytree(folder, tmp_path / "units")), ranks)


def states(place: Workplace) -> dict[str, list[int]]:
    """Steps that are saved, by unit."""
    found = {str(unit): list_checkpoints(place.run_folder(unit) / "checkpoints") for unit in (EARLIER, LATER)}
    return {unit: [step for step, _ in steps] for unit, steps in found.items() if steps}


def test_what_two_runs_have_in_common_is_trained_once(place: Workplace, tmp_path: Path, ranks: Ranks) -> None:
    assert place.study.needs(LATER) == [EARLIER]
    assert states(place) == {"avd-1": [2, 3]}
    alone = Workplace(place.study, Path(shutil.copytree(place.folder, tmp_path / "alone")), ranks)
    shutil.rmtree(alone.run_folder(EARLIER))  # as where results alone were copied
    rest, whole = place.do(LATER), alone.do(LATER)
    assert outcome(place.run_folder(LATER)) == outcome(alone.run_folder(LATER))
    assert rest.pop("beginning") == {"unit": "avd-1", "steps": 3}
    assert rest.pop("seconds").keys() == {"train_rest", "sample", "measure", "all"}
    assert whole.pop("seconds").keys() == {"train", "sample", "measure", "all"}
    assert rest.pop("cpu_seconds").keys() == {"train_rest", "sample", "measure", "all"}
    assert whole.pop("cpu_seconds").keys() == {"train", "sample", "measure", "all"}
    assert rest["training"]["means"].keys() >= {"loss"}
    assert rest == whole
    assert rest["deviations"]
    assert not [*place.folder.rglob("checkpoints"), *alone.folder.rglob("checkpoints")]


class KilledError(Exception):
    """In place of a kill."""


@pytest.mark.parametrize("during", ["pathlib.Path.rename", "avd_trainer.studies.units.train"])
def test_a_unit_that_is_killed_as_it_takes_over_goes_on(
    place: Workplace, monkeypatch: pytest.MonkeyPatch, during: str
) -> None:
    def kill(*_: object, **__: object) -> None:
        raise KilledError

    with monkeypatch.context() as patch:
        patch.setattr(during, kill)
        with pytest.raises(KilledError):
            place.do(LATER)
    assert list(states(place).values()) == [[2, 3]]
    assert place.do(LATER)["seconds"].keys() >= {"train_rest"}
    assert [step["step"] for step in curve(place.run_folder(LATER))] == [1, 2, 3, 4, 5, 6]
    assert states(place) == {}


def test_a_run_that_begins_itself_says_so_whatever_was_killed_before(
    place: Workplace, monkeypatch: pytest.MonkeyPatch, ranks: Ranks
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr("pathlib.Path.rename", lambda *_: pytest.fail("killed"))
        with pytest.raises(pytest.fail.Exception):
            place.do(LATER)
    alone = Workplace(replace(place.study, worked_on={"avd-seconds"}), place.folder, ranks)
    done = alone.do(LATER)
    assert "beginning" not in done
    assert "train" in done["seconds"]


def test_where_somebody_else_takes_the_beginning_first_a_run_begins_itself(
    place: Workplace, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken = place.run_folder(EARLIER) / "checkpoints"
    copy = shutil.copy

    def copy_too_late(source: Path, target: Path) -> None:
        copy(source, target)
        shutil.rmtree(taken)

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "copy", copy_too_late)
        done = place.do(LATER)
    assert "beginning" not in done
    assert "train" in done["seconds"]
    assert [step["step"] for step in curve(place.run_folder(LATER))] == [1, 2, 3, 4, 5, 6]


def test_monitors_judge_a_run_that_is_much_shorter_than_the_other() -> None:
    run = load_config(TrainConfig, "tiny", ["max_steps=400"])
    assert _judged_like(run, _lasting(run, 134)).grace == run.grace == 100
    assert _judged_like(run, _lasting(run, 133)).grace == 66


def test_state_goes_where_nothing_goes_on_from_it_any_more(place: Workplace) -> None:
    (place.run_folder(LATER) / "student").mkdir(parents=True)  # as where another process was faster
    place.do(EARLIER)
    assert states(place) == {}


def test_a_run_has_no_beginning_that_nobody_asked_for(place: Workplace) -> None:
    assert replace(place.study, worked_on={"avd-seconds"}).needs(LATER) == []


def test_where_the_beginning_has_diverged_so_has_the_rest(place: Workplace, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.rmtree(place.run_folder(EARLIER) / "student")  # which a run that diverged does not leave
    write_json(place.folder / f"{EARLIER}.json", {"failed": "NaN"})
    monkeypatch.setattr(units, "train", None)
    assert place.do(LATER)["failed"] == "avd-1 has diverged, and its steps are the first ones of this run."


def test_of_two_runs_of_one_length_the_second_trains_nothing(
    place: Workplace, ranks: Ranks, capsys: pytest.CaptureFixture[str]
) -> None:
    run = place.study.run("avd")
    both = replace(place.study, variants={**place.study.variants, "avd-seconds": run})
    other = Workplace(both, place.folder, ranks).do(LATER)
    assert other["beginning"] == {"unit": "avd-1", "steps": 3}
    assert "avd-seconds-1: all 3 steps are done already" in capsys.readouterr().out
    student = "student/diffusion_pytorch_model.safetensors"
    one, same = (place.run_folder(unit) / student for unit in (EARLIER, LATER))
    assert one.read_bytes() == same.read_bytes()
    assert states(place) == {}
