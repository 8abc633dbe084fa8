"""Folders of pretended videos."""

from __future__ import annotations

from pathlib import Path

import pytest

from toy_runs import ToyRun
from toy_stages import RUNS


@pytest.fixture
def toy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ToyRun:
    monkeypatch.setenv(RUNS, str(tmp_path / "runs"))
    (tmp_path / "videos").mkdir()
    return ToyRun(tmp_path / "videos", tmp_path / "prepared", tmp_path / "runs")
