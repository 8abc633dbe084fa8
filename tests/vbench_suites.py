"""Suites of a few prompts, in the form of VBench and VBench-2.0."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

LONG = "A long story. " * 20
"""Of 280 characters, of which VBench-2.0 has 180 in a file's name."""


def write_suite(path: Path, *prompts: tuple[str, Sequence[str]]) -> Path:
    """A file of prompts with their dimensions."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps([{"prompt_en": prompt, "dimension": list(judges)} for prompt, judges in prompts]))
    return path


def write_vbench(path: Path) -> Path:
    """Two prompts that two dimensions judge, and one for flicker."""
    moving = ("subject_consistency", "dynamic_degree")
    return write_suite(
        path, ("a red circle moves left", moving), ("the blue square", moving), ("a still", ["temporal_flickering"])
    )


def write_vbench_2(path: Path) -> Path:
    """One prompt of a name that is too long, and one of two dimensions."""
    return write_suite(
        path,
        (LONG, ["Complex_Plot"]),
        ("a red circle", ["Instance_Preservation"]),
        ("a red circle", ["Diversity"]),
    )
