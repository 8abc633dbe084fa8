"""The benchmark of an update: what it writes while it runs, and that Wan2.1 made small is Wan2.1."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from typer import Typer
from typer.testing import CliRunner

import train_step
from avd_trainer.runtime.files import read_json
from small_wan import shrink


def test_a_report_stands_after_each_update(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    path = tmp_path / "results" / "update.json"

    def measure(*_: object, **__: object) -> Iterator[dict[str, Any]]:
        yield {"updates": 0}
        seen.append(read_json(path)["updates"])
        yield {"updates": 1}
        raise KeyboardInterrupt

    monkeypatch.setattr(train_step, "measure_update", measure)
    app = Typer()
    app.command()(train_step.main)
    assert CliRunner().invoke(app, ["--results", str(path)]).exit_code != 0
    assert [*seen, read_json(path)["updates"]] == [0, 1]
    assert list(path.parent.iterdir()) == [path]


def test_reports_of_a_small_wan_leave_out_the_update_that_warms_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train_step, "_matmul_flops_per_second", lambda _: 1e12)
    first, second = train_step.measure_update("wan2.1-1.3b", lora=True, size="16x16x5", small=True, updates=1)
    assert [first["updates"], second["updates"]] == [0, 1]
    assert [len(first["seconds_each"]), len(second["seconds_each"])] == [1, 1]
    assert first["seconds_each"] != second["seconds_each"]
    # One update of the student and five of the online model, on one clip each, in either.
    assert first["samples_run"]["online, with backward"] == second["samples_run"]["online, with backward"] == 5
    assert second["precision"] == "bfloat16"
    assert second["latent_shape"] == [16, 2, 2, 2]


def test_a_small_architecture_differs_in_its_size_alone() -> None:
    whole = {"num_attention_heads": 12, "ffn_dim": 8960, "num_layers": 30, "text_dim": 4096, "patch_size": [1, 2, 2]}
    small = shrink(whole)
    assert small.keys() == whole.keys()
    assert {key for key in whole if small[key] != whole[key]} == {"num_attention_heads", "ffn_dim", "num_layers"}
