"""Output folders, and files that are never left half written."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from avd_trainer.runtime.errors import UserError


def claim_folder(folder: Path) -> None:
    """Make a folder and see that it can be written to.

    Raises:
        UserError: If it cannot.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / ".writable"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise UserError(f"--output {folder} cannot be written to: {error.strerror}. Choose another folder.") from error


def write_json(path: Path, value: Any) -> None:
    """Write a file that is either the old or the new one, never half."""
    write_text(path, json.dumps(value, indent=2) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write a file, in UTF-8, that is either the old or the new one, never half."""
    part = path.with_name(path.name + ".part")
    part.write_text(text, encoding="utf-8")
    os.replace(part, path)


def read_json(path: Path) -> Any:
    """Read what :func:`write_json` wrote.

    Raises:
        UserError: If it cannot be read.
    """
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read: {error}. Restore it, or choose a new --output.") from error
