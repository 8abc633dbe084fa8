"""Values are chosen by the rule that docs/studies.md states."""

from typing import Any

from avd_trainer.evaluation.measures import ALL_MEASURES
from avd_trainer.studies.choices import choose

REAL = {"saturation_error": 0.0, "motion_distance": 0.0, "visible": 1.0, "kind": 1.0}


def variant(method: str, *, seeds: int = 3, failed: bool = False, **measures: float) -> dict[str, Any]:
    found = {name: {"mean": value} for name, value in (REAL | measures).items()}
    runs: dict[str, dict[str, Any]] = {str(100 + seed): {} for seed in range(seeds)}
    return {
        "values": {"method": {"kind": method}},
        "measures": found,
        "seeds": runs | ({"103": {"failed": "diverged"}} if failed else {}),
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
    (choice,) = choose(variants, REAL)  # of pcm there is one setting
    assert (choice.method, choice.chosen) == ("lcm", "fast")
    # Nothing is invisible in any of them, so that three measures are ranked.
    assert choice.ranks == {"slow": (1 + 3 + 2) / 3, "fast": (2 + 1 + 1) / 3, "faster": (3 + 2 + 3) / 3}


def test_of_those_that_are_near_the_nearer_in_saturation_is() -> None:
    variants = {
        "a": variant("dmd", saturation_error=0.02, motion_distance=0.01, kind=1.0),
        "b": variant("dmd", saturation_error=-0.01, motion_distance=0.02, kind=1.0),
    }
    (choice,) = choose(variants, REAL)
    assert choice.ranks == {"a": 1.5, "b": 1.5}
    assert choice.chosen == "b"


def test_a_setting_that_diverges_is_not_chosen_and_nothing_is_without_real_clips() -> None:
    variants = {
        "a": variant("dmd", saturation_error=0.01, failed=True),
        "b": variant("dmd", saturation_error=0.02),
        "c": variant("dmd", saturation_error=0.03),
    }
    (choice,) = choose(variants, REAL)
    assert (choice.chosen, choice.ranks.keys()) == ("b", {"b", "c"})
    assert choose(variants, {}) == []
