"""Which methods there are: every file of this folder that names its PAPER, what it NEEDS, its FORWARDS, and how its
students are SAMPLED.

Listing them reads the files and imports none, so that the command line can say them at once. The contract tests hold
what a file says of itself against its configuration.
"""

from __future__ import annotations

import ast
import importlib
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from avd_trainer.methods.base import Method


class ListedMethod(NamedTuple):
    """A method as ``avd methods`` shows it.

    Attributes:
        kind: Its name, which is its file's.
        summary: What it does, in one line.
        paper: Where it is from.
        needs: What a run has to bring: ``teacher``, ``clips``, ``prompts``.
        forwards: Of transformers, for each example of an update, a backward pass counted as two, at the method's
            defaults; of each of its phases, and in each the mean over steps.
        sampled: In how many steps a student is sampled at the method's defaults, and how it goes from one to the next;
            "" where none is trained.
    """

    kind: str
    summary: str
    paper: str
    needs: tuple[str, ...]
    forwards: tuple[float, ...]
    sampled: str


@cache
def list_methods() -> tuple[ListedMethod, ...]:
    """All methods, by name."""
    found = (_read(path) for path in sorted(Path(__file__).parent.glob("*.py")))
    return tuple(method for method in found if method is not None)


def load_method(kind: str) -> type[Method]:
    """A method's class, by one of the names that :func:`list_methods` gives."""
    method: type[Method] = importlib.import_module(f"avd_trainer.methods.{kind}").METHOD
    return method


def _read(path: Path) -> ListedMethod | None:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    said = {
        target.id: node.value
        for node in tree.body
        if isinstance(node, ast.Assign)
        for target in node.targets
        if isinstance(target, ast.Name)
    }
    if "PAPER" not in said:
        return None
    paper, needs, forwards = (ast.literal_eval(said[name]) for name in ("PAPER", "NEEDS", "FORWARDS"))
    sampled = ast.literal_eval(said["SAMPLED"]) if "SAMPLED" in said else ""
    summary = (ast.get_docstring(tree) or "").partition("\n")[0]
    return ListedMethod(path.stem, summary, str(paper), tuple(needs), tuple(forwards), str(sampled))
