import io
import types
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from rich.console import Console

from avd_trainer.runtime import progress
from avd_trainer.runtime.progress import ProgressBar, peak_memory


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time in seconds, for a test to set."""
    now = [1000.0]
    monkeypatch.setattr(progress, "time", types.SimpleNamespace(monotonic=lambda: now[0]))
    monkeypatch.setattr(progress, "peak_memory", lambda: 2_340_000_000)
    return now


def show(monkeypatch: pytest.MonkeyPatch, *, terminal: bool = False, width: int = 120) -> io.StringIO:
    output = io.StringIO()
    monkeypatch.setattr(progress, "console", Console(file=output, force_terminal=terminal, width=width))
    return output


def work(bar: ProgressBar, now: list[float], seconds: Sequence[float]) -> None:
    with bar:
        for number, duration in enumerate(seconds, start=1):
            now[0] += duration
            bar.advance({"loss": 1 / number})


def test_what_others_do_is_shown_as_it_is_seen(monkeypatch: pytest.MonkeyPatch, clock: list[float]) -> None:
    shown = show(monkeypatch)
    with ProgressBar("both", 8, start=2) as bar:
        for done in (2, 5, 4, 8):  # steps that are logged anew are not undone here
            clock[0] += 12
            bar.reach(done, {"dmd": done})
    assert shown.getvalue().splitlines() == [
        "both: 5/8, 24 s left dmd 5 (0.125/s, peak 2.3 GB)",
        "both: 8/8, 0 s left dmd 8 (0.125/s, peak 2.3 GB)",
    ]


def test_elsewhere_there_are_plain_lines(monkeypatch: pytest.MonkeyPatch, clock: list[float]) -> None:
    shown = show(monkeypatch)
    work(ProgressBar("train", 4, samples=8), clock, [2, 2, 8, 4])
    assert shown.getvalue().splitlines() == [
        "train: 3/4, 4 s left loss 0.333 (2 samples/s, peak 2.3 GB)",
        "train: 4/4, 0 s left loss 0.25 (2 samples/s, peak 2.3 GB)",
    ]


def test_without_samples_the_throughput_is_in_calls(monkeypatch: pytest.MonkeyPatch, clock: list[float]) -> None:
    shown = show(monkeypatch)
    work(ProgressBar("clips", 2), clock, [0.25, 0.25])
    assert shown.getvalue() == "clips: 2/2, 0 s left loss 0.5 (4/s, peak 2.3 GB)\n"


def test_a_resumed_run_reckons_with_its_own_steps_alone(monkeypatch: pytest.MonkeyPatch, clock: list[float]) -> None:
    shown = show(monkeypatch)
    work(ProgressBar("train", 1000, start=900), clock, [60])
    assert shown.getvalue().startswith("train: 901/1000, 1:39:00 left")


def test_throughput_is_that_of_the_last_calls_and_time_left_that_of_all(
    monkeypatch: pytest.MonkeyPatch, clock: list[float]
) -> None:
    shown = show(monkeypatch)
    work(ProgressBar("train", 50), clock, [9.0] * 20 + [2.0] * 20)
    assert shown.getvalue().splitlines()[-1].startswith("train: 40/50, 55 s left")
    assert "(0.5/s" in shown.getvalue().splitlines()[-1]


def test_a_terminal_shows_a_bar_with_values_below(monkeypatch: pytest.MonkeyPatch, clock: list[float]) -> None:
    shown = show(monkeypatch, terminal=True, width=80)
    work(ProgressBar("train", 4000, start=3997, samples=4), clock, [2, 2, 2])
    *_, bar, values = shown.getvalue().replace("\x1b[?25h", "").splitlines()
    assert "4000/4000" in bar
    assert "0 s left, 2 samples/s, peak 2.3 GB" in bar
    assert values == "loss 0.333"
    assert "\x1b[" in shown.getvalue()


@pytest.mark.parametrize("terminal", [True, False])
def test_a_quiet_one_shows_nothing(monkeypatch: pytest.MonkeyPatch, clock: list[float], terminal: bool) -> None:
    shown = show(monkeypatch, terminal=terminal)
    work(ProgressBar("train", 2, quiet=True), clock, [20, 20])
    assert shown.getvalue() == ""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's /proc")
def test_memory_is_the_most_that_the_process_held_in_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: False)
    lines = Path("/proc/self/status").read_text().splitlines()
    held = 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))
    assert 0.95 * held < peak_memory() < 50 * held  # whoever started this process may have held more


@pytest.mark.gpu
def test_memory_is_what_tensors_took_on_the_gpu() -> None:
    torch.cuda.reset_peak_memory_stats()
    before = peak_memory()
    torch.empty(2**28, dtype=torch.uint8, device="cuda")
    assert 2**28 <= peak_memory() - before < 2**28 + 2**22
