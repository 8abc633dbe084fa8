"""Captions and licences beside videos, in whatever encoding."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from avd_trainer.data.preparation.sidecars import Sidecars, licence_of, read_sidecars


def test_what_lies_beside_a_video(tmp_path: Path) -> None:
    video = tmp_path / "a_dog.mp4"
    assert read_sidecars(video) == Sidecars("a dog", None)
    video.with_suffix(".txt").write_text("A dog runs.\n")
    (tmp_path / "LICENSE").write_text("\nCC0 1.0\nand many words more\n")
    assert read_sidecars(video) == Sidecars("A dog runs.", "CC0 1.0")


def test_the_licence_that_is_nearest_counts(tmp_path: Path) -> None:
    video = tmp_path / "clip.mp4"
    (tmp_path / "LICENSE").write_text("CC0 1.0")
    video.with_suffix(".info.json").write_text(json.dumps({"license": "CC-BY 3.0", "title": "a dog"}))
    assert licence_of(video) == "CC-BY 3.0"
    video.with_suffix(".json").write_text(json.dumps({"license": "MIT"}))
    assert licence_of(video) == "MIT"
    video.with_suffix(".json").write_text("{")
    with pytest.raises(ValueError, match=r"clip\.json beside it is no JSON"):
        licence_of(video)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "latin-1"])
def test_encodings(tmp_path: Path, encoding: str) -> None:
    said = json.dumps({"license": "© Café"}, ensure_ascii=False)
    (tmp_path / "clip.json").write_text(said, encoding=encoding)
    assert licence_of(tmp_path / "clip.mp4") == "© Café"
