"""Whether the hypotheses of the study `methods` are read off its results as they are stated."""

import json
from pathlib import Path
from typing import Any

import pytest

from avd_trainer.studies.statistics import Estimate
from methods_hypotheses import Claim, Results, alarms, claims, costs, main, outcome, show
from methods_results import made_results


def found(content: dict[str, Any], number: int, text: str) -> Claim:
    return next(claim for claim in claims(Results(content)) if (claim.number, claim.text) == (number, text))


def in_both_budgets(name: str, values: dict[str, float]) -> dict[str, dict[str, float]]:
    """What `made_results` takes to give a variant these values."""
    key = name.replace("-", "_")
    return {key: values, f"{key}_seconds": values}


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [(-2, -1, "holds"), (-1, 0, "holds"), (-1, 1, "open"), (0, 1, "refuted"), (1, 2, "refuted"), (0, 0, "open")],
)
def test_an_interval_holds_or_refutes_what_it_excludes(low: float, high: float, expected: str) -> None:
    assert outcome(Estimate(0, 1, low, high, 6), 0, below=True) == expected
    assert outcome(Estimate(0, 1, -high, -low, 6), 0, below=False) == expected
    assert outcome(Estimate(0, 1, None, None, 5), 0, below=True) == "open"
    assert outcome(None, 0, below=True) == "no figure"


def test_both_budgets_have_to_say_it() -> None:
    text, worse = "lcm nearer than untrained: visible", {"visible": 0.3}
    assert found(made_results(untrained=worse), 1, text).outcome == "holds"
    one = found(made_results(untrained=worse, lcm={"visible": 0.1}), 1, text)
    assert (one.outcomes, one.outcome) == (["refuted", "holds"], "open")
    assert found(made_results(lcm=worse, lcm_seconds=worse), 1, text).outcome == "refuted"


def test_without_a_seed_nothing_is_said() -> None:
    content = made_results(untrained={"visible": 0.3})
    content["variants"]["lcm"]["seeds"]["3"] = {"failed": "diverged"}
    claim = found(content, 1, "lcm nearer than untrained: visible")
    assert (claim.figures[0], claim.outcomes, claim.outcome) == (None, ["no figure", "holds"], "open")
    content["variants"]["lcm-seconds"]["seeds"]["3"] = {"failed": "diverged"}
    assert found(content, 1, "lcm nearer than untrained: visible").outcome == "no figure"


def test_each_method_is_set_against_its_own_untrained_student() -> None:
    texts = {claim.text for claim in claims(Results(made_results())) if claim.number == 1}
    assert {f"{name} nearer than untrained-{own}: preserved" for name, own in (("pcm", "ode"), ("rcm", "scm"))} < texts


@pytest.mark.parametrize(("reached", "expected"), [(0.32, "holds"), (0.35, "refuted")])
def test_regression_may_come_a_tenth_nearer(reached: float, expected: str) -> None:
    """The untrained student is 0.2 away."""
    near = {"visible": reached - 0.001}
    content = made_results(untrained={"visible": 0.299}, regression=near, regression_seconds=near)
    assert found(content, 2, "regression no tenth nearer than untrained: visible").outcome == expected


def test_saturation_is_judged_by_its_side_and_margin() -> None:
    """Real clips are at 0.5 with a margin of four times 0.01."""
    content = made_results(lcm={"saturation_shift": 0.53}, lcm_seconds={"saturation_shift": 0.55}, dmd={})
    claim = found(content, 3, "lcm: saturation_shift below real clips' margin")
    assert (claim.bound, claim.outcomes) == (pytest.approx(0.54), ["holds", "refuted"])
    content = made_results(dmd={"saturation_shift": 0.53})
    assert found(content, 4, "dmd: saturation_shift above real clips' mean").outcome == "holds"


@pytest.mark.parametrize(
    ("number", "text", "side"),
    [
        (3, "pcm below dmd: spatial_frequency", "below"),
        (4, "dmd2 below teacher: variety", "below"),
        (4, "lcm above dmd: variety", "above"),
        (4, "rcm above dmd: variety", "above"),
        (4, "rcm below dmd: saturation_shift", "below"),
        (5, "dmd2-avd above dmd2: variety", "above"),
        (6, "data-forcing above dmd2: variety", "above"),
        (6, "data-forcing-0 below data-forcing: variety", "below"),
    ],
)
def test_a_student_on_the_claimed_side_holds_and_on_the_other_refutes(number: int, text: str, side: str) -> None:
    (name, *_), measure = text.split(), text.split(": ")[1]
    for value, on in ((0.3, "below"), (0.7, "above")):
        claim = found(made_results(**in_both_budgets(name, {measure: value})), number, text)
        assert claim.outcome == ("holds" if on == side else "refuted")


@pytest.mark.parametrize(
    ("number", "text"),
    [
        (1, "vpae nearer than untrained: preserved"),
        (5, "rcm-avd nearer than rcm: motion_distance"),
        (6, "data-forcing nearer than dmd2: saturation_error"),
        (6, "data-forcing nearer than data-forcing-0: saturation_error"),
    ],
)
def test_nearer_is_to_real_clips(number: int, text: str) -> None:
    """Which are at 0.5, as all students are that are not moved away, to a side that is no better."""
    (name, _, _, other), measure = text.split(":")[0].split(), text.split(": ")[1]
    far = {measure: 0.3 if measure == "preserved" else 0.9}
    for moved, expected in ((other, "holds"), (name, "refuted")):
        assert found(made_results(**in_both_budgets(moved, far)), number, text).outcome == expected


@pytest.mark.parametrize(("visible", "expected"), [(0.4985, "refuted"), (0.4995, "holds")])
def test_harm_is_a_hundredth_of_what_dmd_is_away(visible: float, expected: str) -> None:
    """That is 0.1, so 0.001."""
    harmed = {"visible": visible - 0.0001}
    content = made_results(dmd={"visible": 0.4}, pcm_avd=harmed, pcm_avd_seconds=harmed, pcm={"visible": 0.4999})
    content["variants"]["pcm-seconds"] = content["variants"]["pcm"]
    assert found(content, 5, "pcm-avd not farther than pcm: visible").outcome == expected


def test_what_the_monitor_says_is_counted_where_it_is_right_and_where_it_is_not() -> None:
    content = made_results(dmd={"saturation_shift": 0.9})
    for name, seed, said in (("dmd", "1", "oversaturated"), ("dmd", "2", "oversaturated"), ("lcm", "4", "frozen")):
        content["variants"][name]["seeds"][seed]["monitor"]["of_samples"] = [said]
    content["variants"]["dmd"]["seeds"]["2"]["values"]["saturation_shift"] = 0.5
    *_, line = alarms(Results(content))
    assert line == "of_samples: oversaturated said of 2 of 6 students of dmd, rightly of 1; false: lcm frozen 1"


def test_updates_at_equal_seconds_are_set_against_those_at_equal_forwards() -> None:
    content = made_results()
    for name, steps in (("lcm", 1083), ("lcm-seconds", 900), ("pcm", 1083), ("pcm-seconds", 1092)):
        content["variants"][name]["values"]["max_steps"] = steps
    lines = [*costs(Results(content), [])]
    assert "lcm: 1083 steps at equal forwards, 5.42 times those of dmd; fewer at equal seconds, 900: holds" in lines
    assert "pcm: 1083 steps at equal forwards, 5.42 times those of dmd; fewer at equal seconds, 1092: refuted" in lines


def test_a_claims_bound_is_shown() -> None:
    content = made_results(dmd={"visible": 0.4})
    row = show(found(content, 5, "pcm-avd not farther than pcm: visible"))
    assert row.startswith("| pcm-avd not farther than pcm: visible | < +0.0010 | +0.0000 [")
    assert "variety | > +0.0000 |" in show(found(content, 6, "data-forcing above dmd2: variety"))


def test_all_is_printed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "results.json"
    file.write_text(json.dumps(made_results()))
    main(file)
    printed = capsys.readouterr().out
    assert [f"**{number}**" in printed for number in range(1, 9)] == [True] * 8
    assert "claims of 1 to 5 whose sign the budget changes: none" in printed
