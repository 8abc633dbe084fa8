"""Writes the medians of a benchmark run, as ratios, with what they were measured on."""

import json
from pathlib import Path

import pytest

from avd_trainer.runtime.environment import environment
from test_losses import DEVICE, LOSSES

RESULTS = Path(__file__).parent / "results" / f"losses-{'gpu' if DEVICE.type == 'cuda' else 'cpu'}.json"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--losses-results", type=Path, default=RESULTS, help="File for the figures of test_losses.py.")


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    session = getattr(config, "_benchmarksession", None)
    benchmarks = [b for b in session.benchmarks if (b.params or {}).get("name") in LOSSES] if session else []
    medians = {b.params["name"]: b.stats.median for b in benchmarks}
    if len(medians) < len(LOSSES):  # a part of a run is no result
        return
    rows = {
        name: {"median_ms": round(1000 * median, 3), "ratio_to_mse_loss": round(median / medians["mse_loss"], 2)}
        for name, median in medians.items()
    }
    for name, row in rows.items():
        terminalreporter.write_line(f"{name:30} {row['median_ms']:8.2f} ms  {row['ratio_to_mse_loss']:6.2f} x mse_loss")
    results: Path = config.getoption("--losses-results")
    results.parent.mkdir(exist_ok=True)
    results.write_text(json.dumps({"command": "make bench", **environment(), "results": rows}, indent=2) + "\n")
