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
    assert cells(table, "`lcm`", "forwards")[0].startswith("**+0.200 [" if counts else "+0.200 [")
    assert cells(table, "`lcm`", "seconds")[0].startswith("**") == counts


def test_where_there_is_one_budget_it_counts() -> None:
    table = tables(made_results(data_forcing_avd={"visible": 0.3}))["terms"]
    assert cells(table, "`data-forcing`", "forwards")[0].startswith("**+0.200 [")


def test_a_student_that_diverged_is_shown_so() -> None:
    content = made_results()
    content["variants"]["lcm"]["seeds"]["3"] = {"failed": "diverged", "values": None}
    made = tables(content)
    assert set(cells(made["forwards"], "`lcm`")) == set(cells(made["terms"], "`lcm`", "forwards")) == {"diverged"}
    assert "diverged" not in cells(made["terms"], "`lcm`", "seconds")


def test_fewer_seeds_have_no_intervals() -> None:
    content = made_results(lcm_avd={"visible": 0.3}, lcm_avd_seconds={"visible": 0.3})
    for variant in content["variants"].values():
        del variant["seeds"]["6"]
    made = tables(content)
    assert cells(made["forwards"], "`lcm-avd`")[0] == "0.300"
    assert cells(made["terms"], "`lcm`", "forwards")[0] == "+0.200"


def test_all_is_printed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "results.json"
    file.write_text(json.dumps(made_results()))
    main(file)
    printed = capsys.readouterr().out
    assert [f"**{name}**" in printed for name in ("forwards", "seconds", "terms", "costs", "monitor")] == [True] * 5
