"""Takes over from another study what was trained with the same values, with its measures if they are of one kind."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from avd_trainer.config.differences import differences
from avd_trainer.runtime.errors import UserError
from avd_trainer.runtime.files import read_json, write_json
from avd_trainer.studies.definition import (
    CONTROLS,
    REFERENCE,
    HalfRateVariant,
    Study,
    TeacherVariant,
    Unit,
    named_start,
)
from avd_trainer.studies.runner import SAVED, UNITS, claim_study, do_once, result_file
from avd_trainer.studies.units import BEGINNING, CLOCKS, REUSED, RUN, TRAINING_SECONDS
from avd_trainer.training.folder import CHECKPOINTS, LOCK


def reuse(study: Study, folder: Path, other: Path, seeds: Sequence[int]) -> list[Unit]:
    """Copy what another study has done of this one: students of the same values and seed, and what they measure.

    A student depends on its values, those of the student that it starts from, and its seed only, and so do its noises,
    so that it would be the same here to the last digit on the same machine. Names of variants need not agree. Where the
    other study measures otherwise, runs are copied without their measures, for :func:`run_study` to measure them. Of a
    teacher there are only measures, which depend on its weights, the data, how it is sampled, and the seed.

    Args:
        study: The one that is to be done.
        folder: Its folder; what is done there is left alone.
        other: Folder of another study, done or not.
        seeds: Of training.

    Returns:
        The units that were copied.

    Raises:
        UserError: If ``other`` is no study; otherwise, as StoppedError, as :func:`claim_study`.
    """
    if not (other / SAVED).exists():
        raise UserError(f"--reuse {other}: there is no study. Name the --output of one.")
    saved = read_json(other / SAVED)
    alike = measures_as(study, other)
    study = claim_study(study, folder)
    mine, theirs = study.values()["variants"], saved["variants"]
    never = (HalfRateVariant,) if alike else (HalfRateVariant, TeacherVariant)
    same = {
        name: next((each for each in theirs if _are_same(mine, name, theirs, each)), None)
        for name, variant in study.variants.items()
        if name in study.worked_on and not isinstance(variant, never)
    }
    if alike and any(same.values()):  # and so are the real clips, which all variants share
        same |= {name: name for name in (REFERENCE, CONTROLS)}
    return [
        unit
        for unit in study.units(seeds)
        if (source := same.get(unit.variant))
        and _copy(folder, unit, other, unit._replace(variant=source), saved["study"], measured=alike)
    ]


def measures_as(study: Study, other: Path) -> bool:
    """Whether the study in a folder measures as this one does, so that its values can stand beside this one's."""
    saved, values = read_json(other / SAVED), study.values()
    measuring = ("evaluation", "measures_version")
    return not differences({key: saved[key] for key in measuring}, {key: values[key] for key in measuring}, ())


Variants = Mapping[str, Mapping[str, Any]]
"""Values of a study's variants, by name."""
TEACHER_OF = "teacher_of"
"""Key of a teacher's values: the variant whose teacher it is."""


def _are_same(mine: Variants, name: str, theirs: Variants, other: str) -> bool:
    """Whether two variants have the same values by whatever name, and so have those that they start from."""
    if TEACHER_OF in mine[name]:
        return TEACHER_OF in theirs[other] and not differences(_of_teacher(theirs, other), _of_teacher(mine, name))
    start, its = (named_start(of[each].get("student_weights")) for of, each in ((mine, name), (theirs, other)))
    # By `differences`, to which an option that came later and is not used makes none.
    if start is None or its is None:
        return not differences(theirs[other], mine[name])
    return not differences(theirs[other], mine[name], ("student_weights",)) and _are_same(mine, start, theirs, its)


def _of_teacher(variants: Variants, name: str) -> dict[str, Any]:
    """What a teacher's samples depend on, and what they are held against."""
    run = variants[variants[name][TEACHER_OF]]
    return {
        "steps": variants[name]["steps"],
        "weights": run.get("teacher_digest"),
        "data": run["data"] | {"wrong_captions": None},  # which are the training clips' alone
        **{key: run["method"].get(key) for key in ("guidance_scale", "sampling_shift")},
    }


def _copy(folder: Path, unit: Unit, other: Path, source: Unit, name: str, *, measured: bool) -> bool:
    """Copy a unit, if it is done there; unless somebody has done it here, or is at it."""
    if not result_file(other, source).exists():
        return False
    results: dict[str, Any] = read_json(result_file(other, source))
    there, reused = other / UNITS / str(source), {REUSED: f"{name}/{source}"}
    left = shutil.ignore_patterns(LOCK, CHECKPOINTS)  # whose state another run there goes on from

    def copy(own: Path) -> dict[str, Any]:
        shutil.copytree(there, own, dirs_exist_ok=True, ignore=left)
        return results | {"variant": unit.variant} | reused

    def copy_run(own: Path) -> None:
        times = {
            clock: {key: each for key, each in results[clock].items() if key in TRAINING_SECONDS}
            for clock in CLOCKS
            if clock in results  # which an earlier version has not all written
        }
        said = {"training_environment": results.get("training_environment", results["environment"])}
        said |= {key: results[key] for key in (BEGINNING,) if key in results}  # to which `train_rest` belongs
        write_json(own / f"{REUSED}.json", reused | times | said)
        part = own / f"{RUN}.part"
        shutil.rmtree(part, ignore_errors=True)  # what a call that was killed has left
        shutil.copytree(there / RUN, part, ignore=left)
        part.rename(own / RUN)  # last, and all at once: a run that is there is whole

    # Neither a student that diverged nor an interpolator has values of its own.
    if measured or "noises" not in results:
        return do_once(folder, unit, copy)
    return do_once(folder, unit, copy_run, unless=RUN)
