"""The metrics of a run, step by step."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

Value = float | list[float]


class History:
    """Collects the metrics of each step and appends them to a JSONL file.

    Args:
        path: The file, one JSON object per step.
    """

    def __init__(self, path: Path) -> None:
        self.steps: list[dict[str, Value]] = []
        self._file = path.open("w", encoding="utf-8")

    def append(self, metrics: Mapping[str, Tensor]) -> dict[str, Value]:
        """Add a step; returns its metrics as numbers and lists."""
        step: dict[str, Value] = {"step": len(self.steps) + 1}
        step |= {name: value.tolist() for name, value in metrics.items()}
        self.steps.append(step)
        self._file.write(json.dumps({name: _finite(value) for name, value in step.items()}) + "\n")
        self._file.flush()
        return step

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def series(self, name: str) -> list[Value]:
        """The values of one metric over steps; empty if it was never recorded."""
        return [step[name] for step in self.steps if name in step]


def _finite(value: Value) -> Value | list[float | None] | None:
    """JSON has no NaN and no infinity: null stands for both."""
    if isinstance(value, list):
        return [number if math.isfinite(number) else None for number in value]
    return value if math.isfinite(value) else None
