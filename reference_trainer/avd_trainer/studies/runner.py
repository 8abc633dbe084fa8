"""Runs a study: any number of processes share its units, and what is done is never done again."""

from __future__ import annotations

import logging
import os
import socket
import time
from collections.abc import Callable, Container, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

from avd_trainer.config.differences import differences
from avd_trainer.runtime.errors import UserError
from avd_trainer.runtime.files import claim_folder, read_json, write_json
from avd_trainer.runtime.processes import SECONDS_BETWEEN_LOOKS, FailedProcessError, run_processes
from avd_trainer.runtime.progress import ProgressBar
from avd_trainer.runtime.ranks import join_ranks
from avd_trainer.runtime.signals import StopSignals
from avd_trainer.studies.budget import share_budget, untimed
from avd_trainer.studies.definition import COSTS, Cost, Study, Unit
from avd_trainer.studies.units import StoppedError, Workplace
from avd_trainer.training.folder import LOCK, FolderInUseError, locked

SAVED = "study.json"
OVERRIDES = "overrides"
"""Key of ``study.json``: ``--set`` of the latest call, for the command that would do it again; values are compared."""
UNITS = "units"
LOGS = "logs"

logger = logging.getLogger(__name__)


class FailedUnitsError(UserError):
    """Units have failed; all that do not wait for them are done."""


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
        FailedUnitsError: If units failed, once all others are done.
        FailedProcessError: If one of several processes failed and units are left.
        UserError: If ``folder`` holds something else or was made with other values.
    """
    try:
        study = claim_study(study, folder)
    except StoppedError:
        return False
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
        StoppedError: If somebody asked to stop while it was measured what steps cost; what was measured stays.
    """
    claim_folder(folder)
    with locked(folder, wait=True):
        costs: Mapping[str, Any] = {}
        if (folder / SAVED).exists():
            costs = read_json(folder / SAVED).get(COSTS, {})
        elif {path.name for path in folder.iterdir()} - {LOCK}:
            raise UserError(f"{folder} holds something that is no study. Choose a new --output.")
        claimed = share_budget(study, {name: Cost(**values) for name, values in costs.items()})
        _save(claimed, folder)
        return _time_steps(study, claimed, folder) if untimed(claimed) else claimed


def _save(study: Study, folder: Path) -> None:
    """Write ``study.json``, with the variants that are there already; refuses other values than they have."""
    values = study.values()
    if (folder / SAVED).exists():
        saved = read_json(folder / SAVED)
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


def _time_steps(study: Study, claimed: Study, folder: Path) -> Study:
    """Measure how long a step of each student takes of which that is not known, and save each at once.

    The step that the budget is of is timed once more before and after each, and its first seconds are the scale of all.

    Args:
        study: As it was loaded.
        claimed: The same with what is known.
        folder: The study's.

    Returns:
        The study with all that is to last as long.
    """
    names = untimed(claimed)
    with (
        StopSignals() as signals,
        join_ranks() as ranks,
        ProgressBar("measuring what a step costs", len(names)) as bar,
    ):
        place = Workplace(claimed, folder / UNITS, ranks, lambda: signals.received is not None)
        of = study.config.budget_of
        assert of is not None, "without a budget nothing is timed"
        before = place.time_step(claimed.run(of))
        for name in names:
            if name == of:
                seconds = before
            else:
                scale = claimed.costs[of].seconds
                assert scale is not None, "the budget's own is the first"
                seconds = place.time_step(claimed.run(name))
                after = place.time_step(claimed.run(of))
                seconds, before = seconds * scale / fmean((before, after)), after
            cost = claimed.costs[name]._replace(seconds=round(seconds, 4))
            claimed = share_budget(study, {**claimed.costs, name: cost})
            _save(claimed, folder)
            bar.advance()
            place.check_stop()
    return claimed


def result_file(folder: Path, unit: Unit) -> Path:
    """What a unit leaves in a study's folder when it is done."""
    return folder / UNITS / f"{unit}.json"


def _is_done(folder: Path, unit: Unit) -> bool:
    return result_file(folder, unit).exists()


def _missing(study: Study, folder: Path, seeds: Sequence[int]) -> list[Unit]:
    return [unit for unit in study.units(seeds) if not _is_done(folder, unit)]


def _work(study: Study, folder: Path, seeds: Sequence[int]) -> bool:
    """Do units until none is left, also those that others began and left; one that fails is left alone then."""
    failed: dict[Unit, str] = {}
    with StopSignals() as signals, join_ranks() as ranks:
        place = Workplace(study, folder / UNITS, ranks, lambda: signals.received is not None)
        while True:
            failed = {unit: told for unit, told in failed.items() if not _is_done(folder, unit)}  # by another process
            left = [unit for unit in _missing(study, folder, seeds) if not _is_lost(study, unit, failed)]
            if not left:
                break
            try:
                if not any(_try(place, folder, unit, failed) for unit in left):
                    time.sleep(SECONDS_BETWEEN_LOOKS)
            except StoppedError:
                return False
            if signals.received is not None:
                return False
    if failed:
        told = "".join(f"  {unit}: {error}\n" for unit, error in failed.items())
        raise FailedUnitsError(
            f"Units failed, and what waits for them is left. All others are done.\n{told}"
            "Mend it and run the same command again: what is done stays."
        )
    return True


def _is_lost(study: Study, unit: Unit, failed: Container[Unit]) -> bool:
    """Whether a unit failed, or waits for one that did."""
    return unit in failed or any(_is_lost(study, needed, failed) for needed in study.needs(unit))


def _try(place: Workplace, folder: Path, unit: Unit, failed: dict[Unit, str]) -> bool:
    """Do a unit unless it waits for another one, is done meanwhile, or another process does it.

    Returns:
        Whether anything was done here; also where that failed, which is told and added to ``failed``.
    """
    if not all(_is_done(folder, needed) for needed in place.study.needs(unit)):
        return False
    try:
        return do_once(folder, unit, lambda own: place.do(unit))
    except StoppedError:
        raise
    except Exception as error:  # whatever it is, other units may have nothing to do with it
        logger.error("%s failed: %s", unit, error, exc_info=not isinstance(error, UserError))
        failed[unit] = f"{type(error).__name__}: {error}"  # not itself, which holds on to all that the unit had
        return True


def do_once(
    folder: Path, unit: Unit, work: Callable[[Path], dict[str, Any] | None], *, unless: str | None = None
) -> bool:
    """Do a unit and write its results, unless it is done or another process is at it; returns whether it was done here.

    Args:
        folder: The study's.
        unit: What is done.
        work: Given the unit's own folder, which is there and locked, returns its results; None where it does but a part
            of the unit, and the rest is left to do.
        unless: Nothing is done either where the unit's folder holds this.
    """
    own = folder / UNITS / str(unit)
    own.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        try:
            stack.enter_context(locked(own))
        except FolderInUseError:
            return False
        if _is_done(folder, unit) or (unless is not None and (own / unless).exists()):
            return False
        if (results := work(own)) is not None:
            write_json(result_file(folder, unit), results)
        return True
