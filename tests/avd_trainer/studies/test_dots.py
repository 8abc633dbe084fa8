"""The figure of a study: what is shown of which variant, and that one that fails hides no other."""

from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from avd_trainer.evaluation.palette import COLORS
from avd_trainer.studies import dots
from avd_trainer.studies.dots import save_figure

RUN = {"method": {"kind": "dmd", "avd": None}}
WITH_TERMS = {"method": {"kind": "dmd", "avd": {"motion": {}}}}


def results(values: dict[str, list[float]], **kinds: Any) -> dict[str, Any]:
    """Of one measure, ``jerk``; real clips have 1 to 2."""

    def variant(name: str, own: list[float]) -> dict[str, Any]:
        found = {"mean": sum(own) / len(own), "low": min(own), "high": max(own)}
        seeds = {str(seed): {"values": {"jerk": value}} for seed, value in enumerate(own)}
        return {"measures": {"jerk": found}, "seeds": seeds, "values": kinds.get(name, RUN)}

    return {
        "title": "A study.",
        "variants": {name: variant(name, own) for name, own in values.items()},
        "reference": {"spreads": {"jerk": {"mean": 1.5, "low": 1.0, "high": 2.0}}},
        "controls": {"controls": {"noise": {"jerk": 50.0}, "frozen": {"jerk": 1.8}}},
    }


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    figures: list[Figure] = []
    monkeypatch.setattr(dots, "write_png", lambda figure, path: figures.append(figure))
    return figures


def markers(axis: Axes) -> dict[tuple[float, int], tuple[str, str]]:
    """Marker and colour, by value and row."""
    return {
        (line.get_xdata()[0], round(line.get_ydata()[0])): (line.get_marker(), line.get_color())  # type: ignore[index]
        for line in axis.get_lines()
        if line.get_marker() != "None"
    }


def test_each_seed_is_a_dot_in_the_row_of_its_variant(drawn: list[Figure]) -> None:
    one_of_each = {"alone": [1.1, 1.3], "with": [1.6], "teacher": [1.7], "half-rate": [1.9]}
    kinds = {"with": WITH_TERMS, "teacher": {"teacher_of": "alone", "steps": None}, "half-rate": {"of": "with"}}
    save_figure(Path("unused"), results(one_of_each, **kinds))
    axis = drawn[0].axes[0]
    found = markers(axis)
    assert {place: found[place] for place in ((1.1, 0), (1.3, 0), (1.6, 1), (1.7, 2), (1.9, 3))} == {
        (1.1, 0): ("o", COLORS["dmd"]),
        (1.3, 0): ("o", COLORS["dmd"]),
        (1.6, 1): ("o", COLORS["avd"]),
        (1.7, 2): ("o", COLORS["teacher"]),
        (1.9, 3): ("o", COLORS["avd"]),
    }
    assert [label.get_text() for label in axis.get_yticklabels()] == [*one_of_each, "noise", "frozen"]
    assert axis.yaxis_inverted()
    assert found[1.8, 5][0] == "x"
    assert [marker for (_, row), (marker, _) in found.items() if row == 4] == [">"]  # noise, far beyond
    plt.close("all")


def test_a_variant_that_fails_does_not_hide_how_others_differ(drawn: list[Figure]) -> None:
    values = {f"v{number}": [1.0 + 0.1 * number] for number in range(8)} | {"broken": [40.0], "still": [-30.0]}
    save_figure(Path("unused"), results(values))
    axis = drawn[0].axes[0]
    low, high = axis.get_xlim()
    assert 0.5 < low < 1.0
    assert 2.0 < high < 2.5  # real clips, too, are in sight
    found = markers(axis)
    assert found[high, 8][0] == ">"
    assert found[low, 9][0] == "<"
    plt.close("all")


def test_equal_values_and_nothing_at_all_can_be_drawn(tmp_path: Path) -> None:
    save_figure(tmp_path / "equal.png", {**results({"a": [1.0], "b": [1.0]}), "reference": None, "controls": None})
    save_figure(tmp_path / "none.png", {"title": "A study.", "variants": {}, "reference": None, "controls": None})
    assert (tmp_path / "equal.png").stat().st_size > 3_000
    assert (tmp_path / "none.png").stat().st_size > 1_000
