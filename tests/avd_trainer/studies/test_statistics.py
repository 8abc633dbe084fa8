"""Intervals over seeds: what they are of known numbers, and how often they hold the truth."""

import math

import numpy as np
import pytest
from scipy import stats

from avd_trainer.studies.statistics import LEAST_SEEDS, compare, estimate


def test_mean_and_standard_deviation() -> None:
    found = estimate([1.0, 2.0, 3.0, 4.0, 5.0, 9.0])
    assert found.mean == 4.0
    assert found.std == pytest.approx(math.sqrt(8.0))
    assert found.seeds == 6


def test_of_few_values_there_is_no_interval() -> None:
    assert estimate([1.0]) == (1.0, None, None, None, 1)
    few = estimate([0.1 * n for n in range(LEAST_SEEDS - 1)])
    assert (few.low, few.high) == (None, None)
    assert estimate([0.1 * n for n in range(LEAST_SEEDS)]).low is not None


@pytest.mark.parametrize("values", [[], [1.0, math.nan], [math.inf] * 8])
def test_only_finite_values_are_taken(values: list[float]) -> None:
    with pytest.raises(ValueError, match="at least one value is expected, all finite"):
        estimate(values)


def test_of_many_values_it_is_students_interval() -> None:
    values = np.random.default_rng(1).normal(3.0, 2.0, 400)
    low, high = stats.t.interval(0.95, 399, values.mean(), values.std(ddof=1) / 20)
    found = estimate(values.tolist())
    assert found.low == pytest.approx(low, abs=0.02)
    assert found.high == pytest.approx(high, abs=0.02)


def test_values_that_are_all_the_same_have_a_point() -> None:
    assert estimate([0.25] * 8) == (0.25, 0.0, 0.25, 0.25, 8)


def test_moved_and_scaled_values_have_a_moved_and_scaled_interval() -> None:
    values = [1.0, 4.0, 2.0, 8.0, 5.0, 7.0, 1.5, 3.0]
    one, other = estimate(values), estimate([10 + 3 * value for value in values])
    assert one.low is not None
    assert one.high is not None
    assert other.low == pytest.approx(10 + 3 * one.low)
    assert other.high == pytest.approx(10 + 3 * one.high)


@pytest.mark.parametrize("seeds", [6, 8])
@pytest.mark.parametrize("name", ["normal", "uniform", "laplace"])
def test_intervals_hold_the_truth_in_about_95_of_100_cases(name: str, seeds: int) -> None:
    draws = np.random.default_rng(2)
    trials, held = 400, 0
    for _ in range(trials):
        found = estimate(getattr(draws, name)(size=seeds).tolist())
        assert found.low is not None
        assert found.high is not None
        truth = 0.5 if name == "uniform" else 0.0
        held += found.low <= truth <= found.high
    # Three standard deviations of the count; the usual percentile interval holds it in 89 to 91 of 100 only.
    assert held / trials > 0.95 - 3 * math.sqrt(0.95 * 0.05 / trials)
    assert held / trials < 1.0


def test_what_a_seed_does_to_both_cancels() -> None:
    seeds = range(8)
    of_seed = np.random.default_rng(3).normal(0, 1, 8)
    baseline = {seed: 5.0 + of_seed[seed] for seed in seeds}
    closer = {seed: 4.5 + of_seed[seed] for seed in seeds}
    found = compare(closer, baseline, distance=abs)
    assert found is not None
    assert found.mean == pytest.approx(-0.5)
    assert (found.low, found.high) == pytest.approx((-0.5, -0.5))
    unpaired = compare(closer, dict(zip(seeds, reversed(baseline.values()), strict=True)), distance=abs)
    assert unpaired is not None
    assert unpaired.low is not None
    assert unpaired.high is not None
    assert unpaired.low < 0 < unpaired.high


def test_farther_is_by_the_measures_own_distance() -> None:
    found = compare(dict.fromkeys(range(8), 1.2), dict.fromkeys(range(8), 0.9), lambda value: abs(value - 1))
    assert found is not None
    assert (found.mean, found.low) == pytest.approx((0.1, 0.1))


def test_only_shared_seeds_are_compared() -> None:
    found = compare({1: 1.0, 2: 2.0, 3: 50.0}, {2: 1.0, 1: 3.0, 9: 50.0}, distance=abs)
    assert found is not None
    assert (found.mean, found.seeds) == (-0.5, 2)
    assert compare({1: 1.0}, {2: 1.0}, distance=abs) is None
