"""The blocks of docs/callbacks.md are run as they stand there, and do what the page says."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from avd_core import EMACallback

PAGE = (Path(__file__).parents[2] / "docs" / "callbacks.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)


@pytest.fixture(autouse=True)
def _own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def run(words: str) -> dict[str, Any]:
    """Run the one block that has these words; returns its names."""
    (code,) = (block for block in BLOCKS if words in block)
    scope: dict[str, Any] = {}
    exec(code, scope)
    return scope


def test_every_block_is_run() -> None:
    assert len(BLOCKS) == 7


def test_the_average_is_saved_and_taken_up() -> None:
    student = run("decay=0.99")["student"]
    saved, checkpoint = torch.load("student.pt"), torch.load("checkpoint.pt")
    assert torch.equal(checkpoint["student"]["weight"], student.weight)
    assert (saved["weight"] - student.weight).abs().max() > 1e-3
    again = EMACallback(student.parameters(), decay=0.99)
    again.load_state_dict(checkpoint["average"])
    with again.average_parameters():
        assert torch.equal(student.weight, saved["weight"])


def test_the_guard_skips_the_broken_step(capsys: pytest.CaptureFixture[str]) -> None:
    run("NonFiniteGuard(max_consecutive")
    printed = capsys.readouterr().out.strip()
    assert printed == "1 step skipped, all weights finite: True"
    assert printed in PAGE


def test_the_monitor_says_that_samples_freeze(capsys: pytest.CaptureFixture[str]) -> None:
    run("x_0[:, :, :1]")
    (line,) = capsys.readouterr().out.splitlines()
    said = re.search(r"`(Step \d+: the samples freeze: )\.\.\.`", PAGE)
    assert said is not None
    assert line.startswith(said[1])


def test_the_monitor_says_that_the_weight_is_a_switch(capsys: pytest.CaptureFixture[str]) -> None:
    run("regression_weight=")
    absolute, standardized = capsys.readouterr().out.splitlines()
    assert f"`{absolute}` and `{standardized}`" in PAGE


def test_the_monitor_says_that_a_discriminator_is_blind_or_has_won(capsys: pytest.CaptureFixture[str]) -> None:
    run("HingeLoss")
    healthy, blind, won = capsys.readouterr().out.splitlines()
    assert f"`{healthy}`, `{blind}` and `{won}`" in PAGE.replace("\n", " ")


def test_the_monitor_says_that_samples_blur(capsys: pytest.CaptureFixture[str]) -> None:
    run("SpectralStatistics.measure(real)")
    (line,) = capsys.readouterr().out.splitlines()
    said = re.search(r"`(Step \d+: the samples are blurred: )\.\.\.`", PAGE)
    assert said is not None
    assert line.startswith(said[1])


def test_several_are_saved_by_their_names() -> None:
    run("NamedCallbacks(")
    assert set(torch.load("callbacks.pt")) == {"average", "guard"}
