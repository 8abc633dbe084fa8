"""Why a clip is not in a data set: asked of what prepared it."""

from __future__ import annotations

from pathlib import Path

from avd_trainer.data.preparation.journal import Journal
from avd_trainer.data.preparation.prepare import RECIPE, SELECTION
from avd_trainer.data.preparation.recipe import load_recipe
from avd_trainer.data.preparation.selection import select
from avd_trainer.data.preparation.summary import LEFT_OUT, place_of
from avd_trainer.runtime.errors import UserError
from avd_trainer.runtime.files import read_json


def why_left_out(data: Path, clip: str) -> list[str]:
    """Which stage left out clips, and why, in words.

    Args:
        data: Folder of a data set that was prepared or encoded.
        clip: Path of a video below the folder of videos, or a clip's id.

    Returns:
        A sentence for each clip or file that was left out, in order; none if nothing is known of it, such as where the
        prepared folder is gone.
    """
    for folder in (data, data.parent):  # clips of several sizes have a folder each
        if (folder / SELECTION).is_file():
            return _by_journal(folder, clip)
        if (folder / LEFT_OUT).is_file():
            said = read_json(folder / LEFT_OUT)
            everything = {**said["files"], **said["clips"]}
            names = [name for name in everything if name == clip or name.startswith(f"{clip} at ")]
            return [_sentence(name, everything[name]) for name in names]
    return []


def _by_journal(folder: Path, clip: str) -> list[str]:
    prepared = read_json(folder / SELECTION).get("prepared")
    if prepared is None:
        return []
    try:
        with Journal(folder / prepared, write=False) as journal:
            selection = select(journal, load_recipe(folder / RECIPE), finished=True)
    except UserError:
        return []
    left_out = {path: (path, why) for path, why in selection.dropped_files.items()}
    left_out |= {id_: (selection.clips[id_].path, why) for id_, why in selection.dropped.items()}
    return [
        _sentence(place_of(selection.clips[id_]) if id_ in selection.clips else path, f"{why.stage}: {why.reason}")
        for id_, (path, why) in left_out.items()
        if clip in (id_, path)
    ]


def _sentence(name: str, why: str) -> str:
    return f"{name} was left out by {why}"
