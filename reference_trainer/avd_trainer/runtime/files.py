"""Output folders, and files that are never left half written."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any
from uuid import uuid4

from avd_trainer.runtime.errors import UserError


def claim_folder(folder: Path) -> None:
    """Make a folder and see that it can be written to. Several processes may do so at once.

    Raises:
        UserError: If it cannot.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / ".writable"  # always this one, so that what a killed process left goes with the next
        probe.touch()
        probe.unlink(missing_ok=True)  # another process may have been faster
    except OSError as error:
        raise UserError(f"--output {folder} cannot be written to: {error.strerror}. Choose another folder.") from error


def write_json(path: Path, value: Any) -> None:
    """Write a file that is either the old or the new one, never half."""
    write_text(path, json.dumps(value, indent=2) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write a file, in UTF-8, that is either the old or the new one, never half."""
    write_bytes(path, text.encode())


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file that is either the old or the new one, never half, and on the disk when this returns.

    Several processes, also of several machines, may write the same file at once: it becomes that of one of them.
    Folders are made if need be.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.{uuid4().hex}.part")
    try:
        with part.open("xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)  # the name, too
    finally:
        os.close(folder)


def read_json(path: Path) -> Any:
    """Read what :func:`write_json` wrote.

    Raises:
        UserError: If it cannot be read.
    """
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read: {error}. Restore it, or choose a new --output.") from error
