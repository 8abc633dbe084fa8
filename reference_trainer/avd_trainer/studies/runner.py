"""Runs a study: any number of processes share its units, and what is done is never done again."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

from avd_trainer.config.differences import differences
from avd_trainer.runtime.errors import UserError
from avd_trainer.runtime.files import claim_folder, read_json, write_json
from avd_trainer.runtime.processes import SECONDS_BETWEEN_LOOKS, FailedProcessError, run_processes
from avd_trainer.runtime.progress import ProgressBar
from avd_trainer.runtime.ranks import join_ranks
from avd_trainer.runtime.signals import StopSignals
from avd_trainer.studies.budget import share_budget, students
from avd_trainer.studies.definition import COSTS, Cost, Study, Unit
from avd_trainer.studies.units import StoppedError, Workplace
from avd_trainer.training.config import TrainConfig
from avd_trainer.training.folder import LOCK, FolderInUseError, locked

SAVED = "study.json"
OVERRIDES = "overrides"
"""Key of ``study.json``: ``--set`` of the latest call, for the command that would do it again; values are compared."""
UNITS = "units"
LOGS = "logs"


def run_study(study: Study, folder: Path, seeds: Sequence[int], *, jobs: int = 1) -> bool:
    """Do what is left to do of a study, beside others who do the same.

    Leaves in ``folder``: ``study.json`` (all values that results depend on), and for each unit ``units/UNIT.json`` (its
    measures) and ``units/UNIT`` (its run, without checkpoints). Several of these calls may share a folder, also on
    several machines, if their file system has locks.

    Args:
        study: What is compared.
        folder: Empty, or that of the same study; variants and seeds may be added.
        seeds: Of training.
        jobs: Processes. With 1 this one does the work; more of them print to ``logs``.

    Returns:
        Whether all is done; False where a signal asked it to stop.

    Raises:
        FailedProcessError: If a process failed and units are left.
        UserError: If ``folder`` holds something else or was made with other values.
    """
    study = claim_study(study, folder)
    if jobs == 1:
        return _work(study, folder, seeds)
    left = _missing(study, folder, seeds)
    if not left:
        return True
    (folder / LOGS).mkdir(exist_ok=True)
    number = min(jobs, len(left))
    own = [folder / LOGS / f"{socket.gethostname()}-{os.getpid()}-{place}.txt" for place in range(number)]
    total = len(study.units(seeds))
    with ProgressBar(study.name, total, start=total - len(left)) as bar:
        ended = run_processes(
            dict.fromkeys(own, partial(_work, study, folder, seeds)),
            preload="avd_trainer.studies.units",
            on_look=lambda: bar.reach(total - len(_missing(study, folder, seeds))),
        )
    missing = _missing(study, folder, seeds)
    if ended.failed and missing and ended.signal is None:
        raise FailedProcessError(
            f"{len(ended.failed)} of {number} processes failed; {ended.failed[0]} says why. Mend it and run the same "
            "command again: what is done stays."
        )
    return not missing


def claim_study(study: Study, folder: Path) -> Study:
    """Take a new folder, or that of the same study, to which variants may be added.

    Returns:
        The study as it is done there: where students share a budget, with as many steps as that comes to.

    Raises:
        UserError: If it cannot be written to, or holds something else, or was made with other values.
    """
    claim_folder(folder)
    with locked(folder, wait=True):
        saved: dict[str, Any] = {}
        if (folder / SAVED).exists():
            saved = read_json(folder / SAVED)
        elif {path.name for path in folder.iterdir()} - {LOCK}:
            raise UserError(f"{folder} holds something that is no study. Choose a new --output.")
        study = _share_budget(study, folder, saved.get(COSTS, {}))
        values = study.values()
        if saved:
            shared = {name: saved["variants"][name] for name in study.variants if name in saved["variants"]}
            own = values | {"variants": {name: values["variants"][name] for name in shared}}
            if differing := differences(saved | {"variants": shared}, own, (OVERRIDES, COSTS)):
                raise UserError(
                    f"{folder} holds results of other values:\n" + "\n".join(differing) + "\n"
                    "Choose a new --output for these, or run with the values there to go on."
                )
            for key in ("variants", COSTS):
                if key in values:
                    values[key] = saved.get(key, {}) | values[key]
        write_json(folder / SAVED, values | {OVERRIDES: study.overrides})
    return study


def _share_budget(study: Study, folder: Path, saved: Mapping[str, Mapping[str, float]]) -> Study:
    if study.config.budget_of is None:
        return study
    timed = "seconds" in study.config.budgets
    found = {name: Cost(**values) for name, values in saved.items()}
    known = {name: cost for name, cost in found.items() if not timed or cost.seconds is not None}
    unknown = len(students(study).keys() - known.keys()) if timed else 0
    with join_ranks() as ranks, ProgressBar("measuring what a step costs", unknown) as bar:
        place = Workplace(study, folder / UNITS, ranks)

        def measure(run: TrainConfig) -> float:
            bar.advance()
            return place.time_step(run)

        return share_budget(study, known, measure)


def result_file(folder: Path, unit: Unit) -> Path:
    """What a unit leaves in a study's folder when it is done."""
    return folder / UNITS / f"{unit}.json"


def _missing(study: Study, folder: Path, seeds: Sequence[int]) -> list[Unit]:
    return [unit for unit in study.units(seeds) if not result_file(folder, unit).exists()]


def _work(study: Study, folder: Path, seeds: Sequence[int]) -> bool:
    """Do units until none is left, also those that others began and left."""
    with StopSignals() as signals, join_ranks() as ranks:
        place = Workplace(study, folder / UNITS, ranks, lambda: signals.received is not None)
        while left := _missing(study, folder, seeds):
            try:
                if not any(_try(place, folder, unit) for unit in left):
                    time.sleep(SECONDS_BETWEEN_LOOKS)
            except StoppedError:
                return False
            if signals.received is not None:
                return False
        return True


def _try(place: Workplace, folder: Path, unit: Unit) -> bool:
    """Do a unit unless it waits for another one, is done meanwhile, or another process does it."""
    if not all(result_file(folder, needed).exists() for needed in place.study.needs(unit)):
        return False
    return do_once(folder, unit, lambda own: place.do(unit))


def do_once(folder: Path, unit: Unit, work: Callable[[Path], dict[str, Any]]) -> bool:
    """Do a unit and write its results, unless it is done or another process is at it; returns whether it was done here.

    ``work`` is given the unit's own folder, which is there and locked.
    """
    own = folder / UNITS / str(unit)
    own.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        try:
            stack.enter_context(locked(own))
        except FolderInUseError:
            return False
        if result_file(folder, unit).exists():
            return False
        write_json(result_file(folder, unit), work(own))
        return True
