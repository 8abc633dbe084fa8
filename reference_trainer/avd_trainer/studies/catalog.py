"""Which studies there are: a folder for each beside this file. Imports no PyTorch."""

from __future__ import annotations

from pathlib import Path

from avd_trainer.config.loading import first_sentence, nearest
from avd_trainer.runtime.errors import UserError

STUDY = "study.yaml"
"""The file of a study's folder that is about the study as a whole; the others are a variant each."""


def list_studies() -> dict[str, Path]:
    """The folders of the studies that come with the package, by name."""
    return {file.parent.name: file.parent for file in sorted(Path(__file__).parent.glob(f"*/{STUDY}"))}


def find_study(name: str) -> Path:
    """The folder of a study: one that comes with the package, or any other by its path.

    Raises:
        UserError: If there is none.
    """
    known = list_studies()
    folder = known.get(name, Path(name))
    if not (folder / STUDY).is_file():
        raise UserError(
            f"{name!r} is neither a study ({', '.join(known)}) nor a folder with a {STUDY}. Check the name or the path."
            + nearest(name, known)
        )
    return folder


def describe(file: Path) -> str:
    """The first sentence of the comment that a study's or a variant's file begins with."""
    return first_sentence(file.read_text())
