"""What a run's log says of the deviations that its adaptive weight judged."""

import json
import math
from pathlib import Path
from typing import Any

import pytest

from avd_trainer.studies.deviations import _deviations, read_deviations, save_deviations


def write(folder: Path, *steps: dict[str, Any]) -> Path:
    path = folder / "metrics.jsonl"
    lines = [{f"regression/{name}": values for name, values in step.items()} | {"loss": 1.0} for step in steps]
    path.write_text("".join(json.dumps({"step": number, **line}) + "\n" for number, line in enumerate(lines, 1)))
    return path


def test_losses_are_compared_with_their_means(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        {"timesteps": [1000.0, 522.0], "sample_losses": [3.0, 1.0], "means": [2.0, 1.5]},
        {"timesteps": [522.0, 522.0], "sample_losses": [1.5, 2.5], "means": [1.5, 1.5]},
    )
    found = read_deviations(path)
    assert list(found) == ["1000", "522"]
    assert found["1000"] == [1.0] * 5
    assert found["522"] == pytest.approx([-0.45, -0.25, 0.0, 0.5, 0.9])  # of -0.5, 0 and 1, interpolated


def test_what_is_judged_and_its_unit_count_where_the_log_has_them(tmp_path: Path) -> None:
    step = {"timesteps": [900.0], "sample_losses": [3.0], "means": [0.5]}
    assert read_deviations(write(tmp_path, step | {"judged": [1.0]}))["900"] == [0.5] * 5
    assert read_deviations(write(tmp_path, step | {"judged": [1.0], "deviations": [0.3]}))["900"] == [0.3] * 5


def test_a_loss_that_was_not_finite_is_left_out(tmp_path: Path) -> None:
    path = write(tmp_path, {"timesteps": [900.0, 900.0], "sample_losses": [math.nan, 3.0], "means": [2.0, 2.0]})
    assert read_deviations(path)["900"] == [1.0] * 5


def test_a_run_without_a_regression_has_none(tmp_path: Path) -> None:
    assert read_deviations(write(tmp_path, {}, {})) == {}


def test_the_figure_has_a_panel_for_each_variant_with_a_regression(tmp_path: Path) -> None:
    without = {"seeds": {"1": {"deviations": {}}, "2": {}}, "values": {"method": {"kind": "dmd"}}}
    deviations = {"1000": [-1.0, -0.5, 0.0, 0.5, 1.0], "900": [-0.2, -0.1, 0.0, 0.1, 0.2]}
    with_ = {
        "seeds": {"1": {"deviations": deviations}, "2": {"deviations": deviations}, "3": {"failed": "diverged"}},
        "values": {"method": {"regression": {"sharpness": 3.0}}},
    }
    save_deviations(tmp_path / "no.png", {"variants": {"dmd": without}})
    assert not (tmp_path / "no.png").exists()
    on_top = with_ | {"values": {"method": {"kind": "dmd", "avd": with_["values"]["method"]}}}
    save_deviations(tmp_path / "yes.png", {"variants": {"dmd": without, "avd": with_, "dmd-avd": on_top}})
    assert (tmp_path / "yes.png").stat().st_size > 5_000


def test_a_step_that_one_seed_never_drew_is_that_of_the_others() -> None:
    units = [{"deviations": {"522": [0.0] * 5}}, {"deviations": {"1000": [1.0] * 5, "522": [2.0] * 5}}]
    found = _deviations({"seeds": dict(enumerate(units))})
    assert found == {"1000": [1.0] * 5, "522": [1.0] * 5}
    assert list(found) == ["1000", "522"]
