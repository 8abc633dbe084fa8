"""Values are chosen by the rule that docs/studies.md states."""

from typing import Any

import pytest

from avd_trainer.evaluation.measures import ALL_MEASURES
from avd_trainer.studies.choices import CHOICES, Choice, choose
from avd_trainer.studies.summary import _choices

SEEDS = [100, 101, 102]
REAL = {"saturation_error": 0.0, "motion_distance": 0.0, "visible": 1.0, "kind": 1.0}


def variant(method: str, *, seeds: int = 3, failed: bool = False, **measures: float) -> dict[str, Any]:
    runs: dict[str, dict[str, Any]] = {str(100 + seed): {"values": REAL | measures} for seed in range(seeds)}
    return {
        "values": {"method": {"kind": method}},
        "seeds": runs | ({"102": {"values": None, "failed": "diverged"}} if failed else {}),
    }


def test_these_are_headline_measures() -> None:
    assert all(ALL_MEASURES[name].headline for name in REAL)


def test_the_lowest_mean_rank_among_a_methods_own_is_chosen() -> None:
    variants = {
        "slow": variant("lcm", saturation_error=0.01, motion_distance=0.03, kind=0.9),
        "fast": variant("lcm", saturation_error=0.02, motion_distance=0.01, kind=0.99),
        "faster": variant("lcm", saturation_error=0.03, motion_distance=0.02, kind=0.8),
        "other": variant("pcm", motion_distance=0.0001),
    }
    (choice,) = choose(variants, REAL, SEEDS)  # of pcm there is one setting
    assert (choice.method, choice.chosen) == ("lcm", "fast")
    # Nothing is invisible in any of them, so that three measures are ranked.
    assert choice.ranks == {"slow": (1 + 3 + 2) / 3, "fast": (2 + 1 + 1) / 3, "faster": (3 + 2 + 3) / 3}


def test_of_those_that_are_near_the_nearer_in_saturation_is() -> None:
    variants = {
        "a": variant("dmd", saturation_error=0.02, motion_distance=0.01, kind=1.0),
        "b": variant("dmd", saturation_error=-0.01, motion_distance=0.02, kind=1.0),
    }
    (choice,) = choose(variants, REAL, SEEDS)
    assert choice.ranks == {"a": 1.5, "b": 1.5}
    assert choice.chosen == "b"


@pytest.mark.parametrize(("settings", "wins", "chosen"), [(6, 7, "b"), (6, 8, "a"), (3, 6, "b"), (3, 7, "a")])
def test_how_near_is_near_grows_with_the_number_of_settings(settings: int, wins: int, chosen: str) -> None:
    """Half a rank of six settings, a fifth of three; `a` is first in so many of ten measures, and `b` in the others."""
    measures = [name for name, each in ALL_MEASURES.items() if each.headline and name != "saturation_error"][:9]
    variants = {
        "a": variant("dmd", saturation_error=1.0, **{name: float(at >= wins) for at, name in enumerate(measures)}),
        "b": variant("dmd", saturation_error=0.0, **{name: float(at < wins) for at, name in enumerate(measures)}),
    }
    for place in range(2, settings):
        variants[f"{place}"] = variant("dmd", **dict.fromkeys([*measures, "saturation_error"], float(place)))
    (choice,) = choose(variants, dict.fromkeys([*measures, "saturation_error"], 0.0), SEEDS)
    assert choice.ranks["b"] - choice.ranks["a"] == pytest.approx((wins - (10 - wins)) / 10)
    assert choice.chosen == chosen


def test_settings_are_counted_before_those_that_diverged_are_dropped() -> None:
    variants = {
        "a": variant("dmd", failed=True),
        "b": variant("dmd", saturation_error=0.02),
        "c": variant("lcm", failed=True),
        "d": variant("lcm", failed=True),
    }
    one, none = choose(variants, REAL, SEEDS)
    assert one == Choice("dmd", "b", {"b": 1.0}, ["a"], SEEDS, complete=True)
    assert none == Choice("lcm", None, {}, ["c", "d"], [], complete=True)


def test_settings_of_unequal_seeds_are_ranked_over_those_that_all_have() -> None:
    """By the mean over all of its seeds b would be the farther one."""
    variants = {
        "a": variant("dmd", saturation_error=0.02, seeds=2),
        "b": variant("dmd", saturation_error=0.01),
        "later": variant("dmd", seeds=0),
    }
    variants["b"]["seeds"]["102"]["values"]["saturation_error"] = 1.0
    assert choose(variants, REAL, SEEDS) == [Choice("dmd", "b", {"a": 2.0, "b": 1.0}, [], SEEDS[:2], complete=False)]
    variants["a"]["seeds"] = {"102": variants["a"]["seeds"]["100"]}
    del variants["b"]["seeds"]["102"]
    assert choose(variants, REAL, SEEDS) == [Choice("dmd", None, {}, [], [], complete=False)]


def test_the_same_setting_for_equal_seconds_is_none_of_its_own() -> None:
    assert choose({"a": variant("dmd"), "a-seconds": variant("dmd")}, REAL, SEEDS) == []


def test_the_table_says_seeds_and_what_is_missing() -> None:
    variants = {"a": variant("dmd", seeds=2), "b": variant("dmd"), "c": variant("dmd", failed=True)}
    chosen = [choice._asdict() for choice in choose(variants, REAL, SEEDS)]
    assert _choices({CHOICES: chosen})[-1] == "| dmd | a | a 1.00, b 1.00 | c | 100, 101 (some are missing) |"


def test_a_setting_that_diverges_is_not_chosen_and_nothing_is_without_real_clips() -> None:
    variants = {
        "a": variant("dmd", saturation_error=0.01, failed=True),
        "b": variant("dmd", saturation_error=0.02),
        "c": variant("dmd", saturation_error=0.03),
    }
    (choice,) = choose(variants, REAL, SEEDS)
    assert (choice.chosen, choice.ranks.keys()) == ("b", {"b", "c"})
    assert choose(variants, {}, SEEDS) == []
