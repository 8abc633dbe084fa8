"""Folders of pretended videos, rows, and models of random weights."""

from __future__ import annotations

from pathlib import Path

import pytest

from avd_trainer.data.preparation.stage import Row, Span
from tiny_image_models import save_clip_model, save_dino_model
from toy_runs import ToyRun
from toy_stages import RUNS


@pytest.fixture
def toy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ToyRun:
    monkeypatch.setenv(RUNS, str(tmp_path / "runs"))
    (tmp_path / "videos").mkdir()
    return ToyRun(tmp_path / "videos", tmp_path / "prepared", tmp_path / "runs")


@pytest.fixture
def row() -> Row:
    """A clip whose stages read nothing of other stages."""
    return Row("0" * 64 + "-0", Path("clip.mp4"), "0" * 64, Span(0, 5062), {})


@pytest.fixture(scope="session")
def clip_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_clip_model(tmp_path_factory.mktemp("clip"))


@pytest.fixture(scope="session")
def dino_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_dino_model(tmp_path_factory.mktemp("dino"))
