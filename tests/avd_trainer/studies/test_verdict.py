"""The verdict: what it says follows from the numbers behind it."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from scipy import stats

from avd_trainer.evaluation.controls import CONTROLS, Encoded
from avd_trainer.evaluation.measures import MEASURES, measure
from avd_trainer.evaluation.reference import Reference, Spread
from avd_trainer.studies.findings import GROUPS, Findings, measure_rows
from avd_trainer.studies.verdict import compare, render_verdict, summarize

SHARE, LOW, BOTH = "visible", "motion_distance", "spatial_frequency"
assert (MEASURES[SHARE].better, MEASURES[LOW].better, MEASURES[BOTH].better) == ("higher", "lower", "as real")


def findings(
    values: dict[str, tuple[float, float]], *, mean: float = 1.0, std: float = 0.01, scatter: float = 0.0
) -> Findings:
    """Of measures, the values of DMD and AVD; AVD's groups scatter around its value."""
    spreads = {name: Spread(mean, std, mean - 2 * std, mean + 2 * std) for name in values}
    dmd, avd = ({name: pair[place] for name, pair in values.items()} for place in range(2))
    groups = [{name: value + sign * scatter for name, value in avd.items()} for sign in (1, -1) * 4]
    return Findings(
        rows={"teacher": avd, "dmd": dmd, "avd": avd},
        groups={"dmd": [dmd] * 8, "avd": groups},
        reference=Reference(spreads, sets=20, clips=64, real=Encoded(torch.zeros(1), torch.zeros(1))),
        controls={"noise": dmd},
    )


@pytest.mark.parametrize(
    ("measure", "dmd", "avd", "outcome"),
    [
        (SHARE, 0.5, 0.8, "nearer to real"),
        (SHARE, 0.8, 0.5, "farther from real"),
        (SHARE, 0.8, 0.83, "no difference"),  # within four standard deviations of real clips
        (SHARE, 1.2, 1.5, "no difference"),  # more than real clips have is no fault
        (SHARE, 0.8, 1.5, "nearer to real"),
        (LOW, 3.0, 2.0, "nearer to real"),
        (LOW, 2.0, 3.0, "farther from real"),
        (LOW, 0.5, 0.1, "no difference"),
        (BOTH, 1.5, 1.1, "nearer to real"),
        (BOTH, 1.1, 0.8, "farther from real"),
        (BOTH, 1.2, 0.8, "no difference"),  # as far off, on the other side
    ],
)
def test_nearer_is_nearer_on_the_bad_side(measure: str, dmd: float, avd: float, outcome: str) -> None:
    (comparison,) = compare(findings({measure: (dmd, avd)}))
    assert comparison.outcome == outcome


def test_real_clips_that_never_vary_still_leave_one_percent() -> None:
    assert [compare(findings({SHARE: (0.5, avd)}, std=0.0))[0].outcome for avd in (0.509, 0.511)] == [
        "no difference",
        "nearer to real",
    ]


def test_what_captions_scatter_by_is_no_difference() -> None:
    """Half of Student's 95% interval of the mean of eight groups' gains."""
    calm, wild = (compare(findings({BOTH: (1.5, 1.3)}, scatter=scatter))[0] for scatter in (0.05, 0.3))
    assert (calm.outcome, wild.outcome) == ("nearer to real", "no difference")
    gains = [0.2 + sign * 0.3 for sign in (1, -1) * 4]
    interval = stats.t.interval(0.95, 7, loc=0.2, scale=stats.sem(gains))
    assert wild.limit == pytest.approx((interval[1] - interval[0]) / 2)
    assert wild.gain == pytest.approx(0.2)


def test_the_sentence_names_what_is_better_and_worse_and_how_little_it_proves() -> None:
    found = findings({SHARE: (0.5, 0.9), BOTH: (1.5, 1.2), LOW: (1.1, 4.0)})
    assert summarize(found) == (
        "AVD is nearer to the real clips than DMD alone in visible and spatial frequency, farther from them in motion "
        "distance, and no different in nothing. This is one seed, which proves nothing: docs/studies.md has the "
        "comparison over several."
    )
    rendered = render_verdict(found)
    assert rendered.startswith(summarize(found))
    assert (
        f"- motion distance, {MEASURES[LOW].title}: farther from real. AVD 4, DMD alone 1.1, Teacher 4; real clips "
        "1 ± 0.01." in rendered
    )
    assert "over 20 sets" in rendered
    assert "8 groups of captions" in rendered


def test_only_headline_measures_are_judged() -> None:
    assert not MEASURES["temporal_loss"].headline
    assert [each.measure.name for each in compare(findings({BOTH: (1.5, 1.2), "temporal_loss": (1.5, 1.2)}))] == [BOTH]


def test_findings_are_read_as_they_were_saved(tmp_path: Path) -> None:
    found = findings({SHARE: (0.5, 0.9)})
    found.save(tmp_path / "metrics.json", {"command": "avd demo"})
    assert next(iter(json.loads((tmp_path / "metrics.json").read_text()).items())) == ("command", "avd demo")
    again = Findings.load(tmp_path / "metrics.json", found.reference.real)
    assert again == found
    assert f"*{CONTROLS['noise'].title}*" in again.table


def test_without_groups_of_captions_only_the_spread_of_real_clips_counts() -> None:
    found = findings({BOTH: (1.5, 1.3)})
    alone = replace(found, groups={"dmd": [], "avd": []})
    assert compare(alone)[0].limit == found.reference.spreads[BOTH].margin
    assert "too few captions" in render_verdict(alone)


@pytest.mark.parametrize(("count", "groups"), [(32, 8), (35, 8), (6, 3), (5, 2), (3, 0), (2, 0)])
def test_students_are_measured_in_groups_of_different_captions(count: int, groups: int) -> None:
    """Each against the real clips of its own captions; clips of one caption are never in two groups."""
    draws = torch.Generator().manual_seed(0)

    def clips(number: int) -> Encoded:
        return Encoded(
            torch.randn(number, 2, 3, 2, 2, generator=draws), torch.rand(number, 3, 5, 8, 8, generator=draws)
        )

    captions = [f"caption {place % count}" for place in range(2 * count)]
    rows = {name: clips(2 * count) for name in ("teacher", "dmd", "avd")}
    real = clips(2 * count)
    reference = Reference({BOTH: Spread(1, 0, 1, 1)}, sets=3, clips=count, real=real)
    found = measure_rows(rows, captions, captions, reference, {"noise": rows["dmd"]}, of_shapes=False)
    assert GROUPS == 8
    assert list(found.rows) == ["teacher", "dmd", "avd"]
    assert list(found.controls) == ["noise"]
    assert found.controls["noise"] == found.rows["dmd"]
    for name in ("dmd", "avd"):
        assert len(found.groups[name]) == groups
        for number, group in enumerate(found.groups[name]):
            places = [place for place in range(2 * count) if place % count % groups == number]
            own = Encoded(real.latents[places], real.video[places])
            assert group == measure(rows[name].latents[places], rows[name].video[places], None, own)
