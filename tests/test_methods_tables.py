"""Whether the tables of docs/results.md hold all that was measured, and mark what counts."""

import json
import re
from pathlib import Path

import pytest

from avd_trainer.studies.definition import SECONDS
from methods_results import SEEDS, made_results
from methods_tables import main, tables


def cells(table: str, *first: str) -> list[str]:
    """The row that begins so, without its beginning."""
    (row,) = (row for row in (line[2:-2].split(" | ") for line in table.splitlines()) if (*row[: len(first)],) == first)
    return row[len(first) :]


def test_every_student_of_the_study_is_in_its_table() -> None:
    content = made_results()
    made = tables(content)
    named = {budget: re.findall("^\\| `(.+?)` ", made[budget], re.MULTILINE) for budget in ("forwards", "seconds")}
    own = named["forwards"] + [name + SECONDS for name in named["seconds"]]
    assert sorted(own) == sorted(content["variants"])
    assert sorted(re.findall("^\\| `(.+?)` ", made["costs"], re.MULTILINE)) == sorted(
        name for name in named["forwards"] if not name.startswith(("teacher", "untrained"))
    )


def test_a_mean_has_the_longer_side_of_its_interval() -> None:
    content = made_results()
    for seed, variety in zip(SEEDS, (0.1, 0.1, 0.1, 0.1, 0.1, 0.7), strict=True):
        content["variants"]["lcm"]["seeds"][str(seed)]["values"]["variety"] = variety
    assert re.fullmatch(r"0\.200 ± 0\.[2-5]\d\d", cells(tables(content)["forwards"], "`lcm`")[-1])


@pytest.mark.parametrize(("other", "counts"), [(0.3, True), (0.5, False), (0.7, False)])
def test_a_difference_counts_where_both_budgets_say_it(other: float, counts: bool) -> None:
    """Real clips are at 0.5, and so is `lcm`."""
    content = made_results(lcm_avd={"visible": 0.3}, lcm_avd_seconds={"visible": other})
    table = tables(content)["terms"]
    assert cells(table, "`lcm-avd`", "`lcm`", "forwards")[0].startswith("**+0.200 [" if counts else "+0.200 [")
    assert cells(table, "`lcm-avd`", "`lcm`", "seconds")[0].startswith("**") == counts


def test_where_there_is_one_budget_it_counts() -> None:
    table = tables(made_results(data_forcing_avd={"visible": 0.3}))["terms"]
    assert cells(table, "`data-forcing-avd`", "`data-forcing`", "forwards")[0].startswith("**+0.200 [")


def test_what_diverged_and_what_is_not_measured_are_told_apart() -> None:
    content = made_results()
    content["variants"]["lcm"]["seeds"]["3"] = {"failed": "diverged", "values": None}
    content["variants"]["scm"]["seeds"] = {}
    made = tables(content)
    assert set(cells(made["forwards"], "`lcm`")) == {"1 of 6 diverged"}
    assert set(cells(made["forwards"], "`scm`")) == {"not measured"}
    assert set(cells(made["terms"], "`lcm-avd`", "`lcm`", "forwards")) == {""}
    assert "" not in cells(made["terms"], "`lcm-avd`", "`lcm`", "seconds")


def test_fewer_seeds_have_no_intervals() -> None:
    content = made_results(lcm_avd={"visible": 0.3}, lcm_avd_seconds={"visible": 0.3})
    for variant in content["variants"].values():
        del variant["seeds"]["6"]
    made = tables(content)
    assert cells(made["forwards"], "`lcm-avd`")[0] == "0.300"
    assert cells(made["terms"], "`lcm-avd`", "`lcm`", "forwards")[0] == "+0.200"


def test_every_method_is_set_against_its_own_untrained_student_and_against_dmd() -> None:
    worse = {"visible": 0.3}
    made = tables(made_results(untrained_ode=worse, dmd=worse))
    assert cells(made["training"], "`pcm`", "`untrained-ode`", "forwards")[0].startswith("**-0.200 [")
    assert cells(made["training"], "`lcm`", "`untrained`", "forwards")[0].startswith("+0.000 [")
    assert cells(made["matching"], "`lcm`", "`dmd`", "seconds")[0].startswith("**-0.200 [")


def test_where_real_clips_scatter_little_a_decimal_more_is_shown() -> None:
    content = made_results(lcm={"color_error": 0.50042})
    content["reference"]["spreads"]["color_error"] = {"mean": 0.5, "std": 0.0002, "low": 0.4996, "high": 0.5004}
    made = tables(content)
    assert cells(made["forwards"], "`lcm`")[2].startswith("0.5005 ± 0.0000")
    assert cells(made["forwards"], "real clips ± the standard deviation of their sets")[2] == "0.5000 ± 0.0002"


def test_controls_and_costs_are_those_of_their_row() -> None:
    content = made_results()
    content["controls"]["controls"]["repeated"]["variety"] = 0.0
    content["costs"]["pcm"] = {"forwards": 48.0, "seconds": 0.25, "memory": 67.8}
    made = tables(content)
    assert cells(made["forwards"], "*one real clip for each caption*")[-1] == "0.000"
    assert cells(made["forwards"], "*white noise*")[-1] == "1.000"
    assert cells(made["costs"], "`pcm`") == ["48", "0.25", "68", "200", "200", ""]
    assert cells(made["costs"], "`dmd`") == ["260", "1.50", "80", "200", "", ""]


def test_what_goes_on_from_another_student_says_from_which() -> None:
    content = made_results()
    content["variants"]["data-forcing"]["values"] = {"max_steps": 100, "student_weights": "variant:dmd2"}
    assert cells(tables(content)["costs"], "`data-forcing`")[3:] == ["100", "", "`dmd2`, 200 updates"]


def test_intervals_that_exclude_0_are_counted_beside_those_of_chance() -> None:
    """Ten pairs, nine of them in two budgets, and fifteen measures: 285, of which 14 by chance."""
    moved = {"visible": 0.3, "preserved": 0.3, "variety": 0.3}
    content = made_results(lcm_avd=moved, lcm=dict.fromkeys(("motion_distance",), 0.9))
    table = tables(content)["terms"]
    assert cells(table, "`lcm-avd`", "`lcm`", "forwards")[-1] == "1, 3"
    assert cells(table, "`lcm-avd`", "`lcm`", "seconds")[-1] == "0, 0"
    assert table.splitlines()[-1] == "4 of 285 intervals exclude 0; if nothing differed, 14 would."


def test_the_monitors_bounds_are_said() -> None:
    """Half-way from real clips, at 0.5, to controls, at 1, or as far to the other side."""
    *_, last = tables(made_results())["monitor"].splitlines()
    assert last.startswith("Is so at the end: frozen: temporal_frequency above 0.750; ")
    assert last.endswith("oversaturated: saturation_shift above 0.750; washed_out: saturation_shift below 0.250.")


def test_all_is_printed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "results.json"
    file.write_text(json.dumps(made_results()))
    main(file)
    printed = capsys.readouterr().out
    assert [
        f"**{name}**" in printed
        for name in ("forwards", "seconds", "terms", "training", "matching", "costs", "monitor")
    ] == [True] * 7
