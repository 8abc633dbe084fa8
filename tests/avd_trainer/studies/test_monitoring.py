"""What the monitor says of students, held against what their pixels show."""

from pathlib import Path
from typing import Any

import pytest
import torch

from avd_trainer.runtime.files import write_json
from avd_trainer.studies.monitoring import judge_samples, monitor_table, read_findings, true_kinds

REAL = {"temporal_frequency": 0.09, "saturation": 0.24}
CONTROLS = {
    "frozen": {"temporal_frequency": 0.0, "saturation": 0.24},
    "shuffled": {"temporal_frequency": 0.18, "saturation": 0.24},
    "saturated": {"temporal_frequency": 0.09, "saturation": 0.30},
}


def values(temporal_frequency: float = 0.09, saturation: float = 0.24) -> dict[str, float]:
    return {"temporal_frequency": temporal_frequency, "saturation": saturation}


@pytest.mark.parametrize(
    ("clips", "kinds"),
    [
        (values(), []),
        (values(temporal_frequency=0.05), []),
        (values(temporal_frequency=0.04), ["frozen"]),
        (values(temporal_frequency=0.14), ["jitter"]),
        (values(saturation=0.28), ["oversaturated"]),
        (values(saturation=0.20), ["washed_out"]),
        (values(saturation=0.26), []),
        (values(0.01, 0.30), ["frozen", "oversaturated"]),
    ],
)
def test_a_student_has_what_lies_beyond_half_the_way_to_the_control(clips: dict[str, float], kinds: list[str]) -> None:
    assert true_kinds(clips, REAL, CONTROLS) == kinds


def test_samples_are_judged_in_latents() -> None:
    real = torch.randn(8, 4, 5, 4, 4, generator=torch.Generator().manual_seed(0))
    assert judge_samples(real, real) == []
    assert judge_samples(1.3 * real, real) == ["oversaturated"]
    assert judge_samples(real[:, :, :1].expand_as(real) + 0.01 * real, real) == ["frozen"]
    assert judge_samples(0.5 * real, real) == ["frozen", "washed_out"]


def test_of_what_was_found_while_training_what_clips_can_show_counts_once(tmp_path: Path) -> None:
    found = [{"kind": kind} for kind in ("oversaturated", "weights_switch", "frozen", "oversaturated")]
    write_json(tmp_path / "findings.json", {"samples_judged": True, "findings": found})
    assert read_findings(tmp_path / "findings.json") == ["frozen", "oversaturated"]


def test_who_judged_no_samples_said_nothing_of_them(tmp_path: Path) -> None:
    assert read_findings(tmp_path / "none.json") is None
    for judged, said in ((False, None), (True, [])):
        write_json(tmp_path / "findings.json", {"samples_judged": judged, "findings": [{"kind": "regression_silent"}]})
        assert read_findings(tmp_path / "findings.json") == said


def test_the_table_counts_what_was_said_and_what_was_right() -> None:
    def unit(clips: dict[str, float], **monitor: list[str]) -> dict[str, Any]:
        return {"values": clips, "monitor": monitor}

    variants = {
        "teacher": {"seeds": {"1": unit(values(), of_samples=[])}},
        "dmd": {
            "seeds": {
                "1": unit(values(saturation=0.29), while_training=["oversaturated"], of_samples=["oversaturated"]),
                "2": unit(values(saturation=0.29), while_training=["oversaturated", "frozen"], of_samples=[]),
                "3": {"failed": "diverged"},
            }
        },
        "avd": {  # of the first nobody looked while it was trained
            "seeds": {
                "1": unit(values(), of_samples=[]),
                "2": unit(values(saturation=0.29), while_training=["oversaturated"], of_samples=[]),
            }
        },
        "none": {"seeds": {"1": {"failed": "diverged"}}},
    }
    assert monitor_table(variants, REAL, CONTROLS)[2:] == [
        "| teacher |  | nothing | nothing |  | 1 of 1 |",
        "| dmd | frozen 1, oversaturated 2 | oversaturated 1 | oversaturated 2 | 1 of 2 | 1 of 2 |",
        "| avd | oversaturated 1 | nothing | oversaturated 1 | 1 of 1 | 1 of 2 |",
    ]
    assert monitor_table({"none": variants["none"]}, REAL, CONTROLS) == []
