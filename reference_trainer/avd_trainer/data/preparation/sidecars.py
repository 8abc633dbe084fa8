"""What lies beside a video: its caption and its licence. They can change while the video stays the same."""

from __future__ import annotations

import json
from pathlib import Path
from typing import NamedTuple

from avd_trainer.data.decoding import caption_of

LICENSE_FILES = ("LICENSE", "LICENSE.txt")


class Sidecars(NamedTuple):
    """What the files beside a video say.

    Attributes:
        caption: That of the text file, or else the video's name.
        licence: See :func:`licence_of`.
    """

    caption: str
    licence: str | None


def read_sidecars(path: Path) -> Sidecars:
    """Read what lies beside a video.

    Raises:
        ValueError, OSError: If it cannot be read; it says which file.
    """
    return Sidecars(caption_of(path), licence_of(path))


def licence_of(path: Path) -> str | None:
    """Licence of a video: ``license`` in ``NAME.json`` or ``NAME.info.json`` beside it (as yt-dlp writes it), or else
    the first line of a file ``LICENSE`` or ``LICENSE.txt`` in its folder; None if there is neither.

    Raises:
        ValueError: If a file that is named as JSON is none.
    """
    for beside in (path.with_suffix(".json"), path.with_suffix(".info.json")):
        if beside.is_file():
            try:
                said = json.loads(_text(beside))
            except ValueError as error:
                raise ValueError(f"the file {beside.name} beside it is no JSON: {error}") from error
            if isinstance(said, dict) and said.get("license"):
                return str(said["license"])
    for name in LICENSE_FILES:
        if (file := path.parent / name).is_file():
            words = _text(file).strip().splitlines()
            if words:
                return words[0].strip()
    return None


def _text(path: Path) -> str:
    """In UTF-8, or else in Latin-1, as which any bytes can be read."""
    content = path.read_bytes()
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError:
        return content.decode("latin-1")
