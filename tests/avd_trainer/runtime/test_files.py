"""Files that several processes write at once, and that a power cut may hit."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from avd_trainer.runtime.files import claim_folder, write_bytes, write_text


def test_two_processes_that_write_the_same_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As parts of a run do with the recipe: the second writes while the first is about to rename."""
    path, replace = tmp_path / "recipe.yaml", os.replace

    def meanwhile(source: Path, target: Path) -> None:
        monkeypatch.setattr(os, "replace", replace)
        write_text(path, "of the second")
        replace(source, target)

    monkeypatch.setattr(os, "replace", meanwhile)
    write_text(path, "of the first")
    assert path.read_text() == "of the first"
    assert list(tmp_path.iterdir()) == [path]


def test_two_processes_that_claim_the_same_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As parts of one job do: the second is done with it while the first looks whether it can write."""
    touch = Path.touch

    def meanwhile(probe: Path) -> None:
        touch(probe)
        monkeypatch.setattr(Path, "touch", touch)
        claim_folder(tmp_path)

    monkeypatch.setattr(Path, "touch", meanwhile)
    claim_folder(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_bytes_are_on_the_disk_before_they_have_their_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    steps: list[str] = []
    sync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda file: (steps.append("sync"), sync(file)))
    monkeypatch.setattr(os, "replace", lambda *names: (steps.append("replace"), replace(*names)))
    write_bytes(tmp_path / "new" / "file", b"content")
    assert steps == ["sync", "replace", "sync"]
    assert (tmp_path / "new" / "file").read_bytes() == b"content"


def test_what_cannot_be_written_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    with pytest.raises(OSError, match="directory"):
        write_text(tmp_path / "folder", "text")
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]
