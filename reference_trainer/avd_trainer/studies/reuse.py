"""Takes over from another study what was trained and measured with the same values."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from avd_trainer.config.differences import differences
from avd_trainer.runtime.errors import UserError
from avd_trainer.runtime.files import read_json
from avd_trainer.studies.definition import CONTROLS, REFERENCE, Study, Unit, named_start
from avd_trainer.studies.runner import SAVED, UNITS, claim_study, do_once, result_file
from avd_trainer.training.config import TrainConfig
from avd_trainer.training.folder import CHECKPOINTS, LOCK

REUSED = "reused_from"
"""Key of a unit's results: the study and the unit that they were taken from."""


def reuse(study: Study, folder: Path, other: Path, seeds: Sequence[int]) -> list[Unit]:
    """Copy what another study has done of this one: students of the same values and seed, and what they measure.

    A student depends on its values, those of the student that it starts from, and its seed only, and so do its noises,
    so that it would be the same here to the last digit on the same machine. Names of variants need not agree.

    Args:
        study: The one that is to be done.
        folder: Its folder; what is done there is left alone.
        other: Folder of another study, done or not.
        seeds: Of training.

    Returns:
        The units that were copied.

    Raises:
        UserError: If ``other`` is no study, or measures otherwise; otherwise as :func:`claim_study`.
    """
    if not (other / SAVED).exists():
        raise UserError(f"--reuse {other}: there is no study. Name the --output of one.")
    saved, values = read_json(other / SAVED), study.values()
    measuring = ("evaluation", "measures_version")
    if differing := differences({key: saved[key] for key in measuring}, {key: values[key] for key in measuring}, ()):
        raise UserError(
            f"--reuse {other}: it measures otherwise:\n" + "\n".join(differing) + "\nLeave it out, or run with the "
            "values there."
        )
    study = claim_study(study, folder)
    mine, theirs = study.values()["variants"], saved["variants"]
    same = {
        name: next((each for each in theirs if _are_same(mine, name, theirs, each)), None)
        for name, variant in study.variants.items()
        if isinstance(variant, TrainConfig) and name in study.worked_on
    }
    if any(same.values()):  # and so are the real clips, which all variants share
        same |= {name: name for name in (REFERENCE, CONTROLS)}
    return [
        unit
        for unit in study.units(seeds)
        if (source := same.get(unit.variant))
        and _copy(folder, unit, other, unit._replace(variant=source), saved["study"])
    ]


Variants = Mapping[str, Mapping[str, Any]]
"""Values of a study's variants, by name."""


def _are_same(mine: Variants, name: str, theirs: Variants, other: str) -> bool:
    """Whether two variants have the same values by whatever name, and so have those that they start from."""
    start, its = (named_start(of[each].get("student_weights")) for of, each in ((mine, name), (theirs, other)))
    # By `differences`, to which an option that came later and is not used makes none.
    if start is None or its is None:
        return not differences(theirs[other], mine[name])
    return not differences(theirs[other], mine[name], ("student_weights",)) and _are_same(mine, start, theirs, its)


def _copy(folder: Path, unit: Unit, other: Path, source: Unit, name: str) -> bool:
    """Copy a unit, if it is done there; unless somebody has done it here, or is at it."""
    if not result_file(other, source).exists():
        return False

    def copy(own: Path) -> dict[str, Any]:
        left = shutil.ignore_patterns(LOCK, CHECKPOINTS)  # whose state another run there goes on from
        shutil.copytree(other / UNITS / str(source), own, dirs_exist_ok=True, ignore=left)
        results: dict[str, Any] = read_json(result_file(other, source))
        return results | {"variant": unit.variant, REUSED: f"{name}/{source}"}

    return do_once(folder, unit, copy)
