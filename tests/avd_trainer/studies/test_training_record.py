"""What results keep of a run's log."""

import json
import math
from pathlib import Path
from typing import Any

import pytest

from avd_trainer.runtime.files import write_json
from avd_trainer.studies.training_record import read_training


def write(folder: Path, *steps: dict[str, Any]) -> Path:
    lines = [json.dumps({"step": number, **step}) for number, step in enumerate(steps, 1)]
    (folder / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    return folder


def test_means_are_of_the_steps_that_have_a_metric(tmp_path: Path) -> None:
    priming = [{"matching/loss": float(step)} for step in range(30)]
    judged = [{"adversarial/share": step / 100, "regression/weights": [1.0, 2.0]} for step in range(50)]
    means = read_training(write(tmp_path, *priming, *judged))["means"]
    assert means == {
        "matching/loss": {"all": pytest.approx(14.5), "last": pytest.approx(19.5)},  # of steps 10 to 29
        "adversarial/share": {"all": pytest.approx(0.245), "last": pytest.approx(0.395)},
    }


def test_what_is_not_finite_is_left_out(tmp_path: Path) -> None:
    steps = [{"balance/gradient_ratio": None, "loss": None}, {"balance/gradient_ratio": 1.0}, {"loss": math.inf}]
    assert read_training(write(tmp_path, *steps))["means"] == {"balance/gradient_ratio": {"all": 1.0, "last": 1.0}}


def test_findings_that_no_clip_shows_are_kept_once(tmp_path: Path) -> None:
    write(tmp_path, {"loss": 1.0})
    assert read_training(tmp_path)["findings"] is None
    kinds = ("oversaturated", "discriminator_won", "weights_switch", "discriminator_won", "discriminator_blind")
    # Also where no samples were judged.
    write_json(tmp_path / "findings.json", {"samples_judged": False, "findings": [{"kind": kind} for kind in kinds]})
    assert read_training(tmp_path)["findings"] == ["discriminator_won", "weights_switch", "discriminator_blind"]
