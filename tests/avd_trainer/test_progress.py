import io

import pytest
from rich.console import Console

from avd_trainer import progress
from avd_trainer.progress import ProgressBar


def draw(terminal: bool, monkeypatch: pytest.MonkeyPatch) -> str:
    output = io.StringIO()
    monkeypatch.setattr(progress, "console", Console(file=output, force_terminal=terminal, width=120))
    with ProgressBar("train", 3) as bar:
        for loss in (0.5, 0.25, 0.125):
            bar.advance({"loss": loss})
    return output.getvalue()


def test_a_terminal_shows_a_bar_with_values(monkeypatch: pytest.MonkeyPatch) -> None:
    shown = draw(True, monkeypatch)
    assert "3/3" in shown
    assert "loss 0.125" in shown
    assert "\x1b[" in shown


def test_elsewhere_there_are_plain_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    shown = draw(False, monkeypatch)
    assert shown.splitlines()[-1] == "train: 3/3, 0 s left loss 0.125"
    assert "\x1b[" not in shown
