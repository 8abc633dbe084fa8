"""Students that cost the same: as many forward equivalents, and once more, where it is asked for, as many seconds.

A study whose ``budget_of`` names a variant gives all students what that one's own ``max_steps`` cost. Each variant is
then trained twice: for as many steps as come to the same number of forward equivalents, under its own name, and for as
many as take the same time, as ``NAME-seconds``. Seconds are measured once, where the study begins, and kept in
``study.json`` with the steps that follow from them. Each student's step is timed between two measurements of the step
that the budget is of, and only their ratio counts: on a machine that others use, too, seconds drift by a quarter. What
goes on from another student comes on top of what that one did: it keeps its own steps, and only says what they cost.
What is sampled for the monitors alone, of methods whose training makes no samples, costs nothing here: it is no part of
the method.

A run of another length has phases of another length: each keeps the share of the run that it has of its file's own
``max_steps``. So the mean cost of a step hardly depends on their number. Where a method has no phases, the two runs of
a variant differ in their number of steps alone: the shorter one is trained first, and the longer one goes on from it
(:attr:`avd_trainer.studies.definition.Study.beginnings`). For that the monitors begin at the same step in both.
"""

from __future__ import annotations

import time
from bisect import bisect_right
from collections.abc import Callable, Mapping
from dataclasses import replace
from statistics import fmean, median

import torch

from avd_trainer.data.sources import TrainingData
from avd_trainer.methods.base import Turn, forward_equivalents
from avd_trainer.planning.plan import make_plan
from avd_trainer.runtime.ranks import Ranks
from avd_trainer.studies.definition import SECONDS, Cost, Study, Variant, start_of
from avd_trainer.training.config import TrainConfig
from avd_trainer.training.trainer import Trainer

MB = 2**20
LOOKS = 20
"""Steps that are timed of each kind that a run has, spread evenly over those of that kind."""


def share_budget(study: Study, known: Mapping[str, Cost]) -> Study:
    """A study in which each student may cost the same, in forwards and in seconds; one without ``budget_of`` as it is.

    Args:
        study: As it was loaded.
        known: Costs that were found before, by variant. Where a budget is in seconds, what is to last as long is there
            as soon as the seconds of both are known.
    """
    of = study.config.budget_of
    if of is None or study.costs:
        return study
    own = students(study)
    budget = _forwards(own[of], own[of].max_steps)
    runs = {name: run if start_of(run) is not None else _for_forwards(run, budget) for name, run in own.items()}
    costs = {name: known[name] if name in known else _cost(run) for name, run in runs.items()}
    variants: dict[str, Variant] = {}
    for name, variant in study.variants.items():
        variants[name] = runs.get(name, variant)
        if name not in own or name == of or start_of(own[name]) is not None:  # of the budget itself both runs are one
            continue
        whole, step = costs[of].seconds, costs[name].seconds
        if "seconds" in study.config.budgets and whole is not None and step is not None:
            as_long = _lasting(own[name], round(own[of].max_steps * whole / step))
            variants[name + SECONDS] = _judged_like(runs[name], as_long)
    worked_on = {each for name in study.worked_on for each in (name, name + SECONDS) if each in variants}
    return replace(study, variants=variants, worked_on=worked_on, costs=costs)


def students(study: Study) -> dict[str, TrainConfig]:
    """The runs of a study that train a student, by variant."""
    return {
        name: variant
        for name, variant in study.variants.items()
        if isinstance(variant, TrainConfig) and study.is_measured(name)
    }


def untimed(study: Study) -> list[str]:
    """The students of which it is not known how long a step takes, where a budget is in seconds; its own one first."""
    timed = "seconds" in study.config.budgets
    names = [name for name, cost in study.costs.items() if timed and cost.seconds is None]
    return sorted(names, key=lambda name: name != study.config.budget_of)


def time_step(
    config: TrainConfig, data: TrainingData, ranks: Ranks, on_look: Callable[[], None] = lambda: None
) -> float:
    """Seconds of a step, the mean over the run.

    Steps of each kind, that is with the same turns, are timed by themselves and count as often as the run has them: a
    phase may cost several times another. The first step of a kind, which is slower, is left out.

    On the CPU seconds are those of the processor, which other processes lengthen only where they share its caches. A
    GPU has no such clock: there a kind's seconds are the median of its steps, for what else the machine does lengthens
    single ones.

    Args:
        config: The run; any ``student_weights`` cost the same, so it starts from the teacher.
        data: What it reads.
        ranks: The one process that computes.
        on_look: Called before each step that is timed.
    """
    own = {"student_weights": None, "method": config.method.unwatched()}
    trainer = Trainer(config.model_copy(update=own), data, ranks)
    kinds: dict[tuple[Turn, ...], list[int]] = {}
    for step in range(1, config.max_steps + 1):
        kinds.setdefault(tuple(trainer.method.turns(step)), []).append(step)
    middle = median if ranks.device.type == "cuda" else fmean
    whole = 0.0
    for steps in kinds.values():
        seconds = []
        for look in range(LOOKS + 1):
            on_look()
            seconds.append(_time(trainer, steps[(len(steps) - 1) * look // LOOKS], ranks.device))
        whole += len(steps) * middle(seconds[1:])
    return whole / config.max_steps


def _time(trainer: Trainer, step: int, device: torch.device) -> float:
    """Seconds of this step, without those of opening the data at it."""
    trainer.step = step - 1
    steps = trainer.run()
    start = _now(device)
    next(steps)
    return _now(device) - start


def _now(device: torch.device) -> float:
    if device.type != "cuda":
        return time.process_time()
    torch.cuda.synchronize(device)
    return time.perf_counter()


def _cost(run: TrainConfig) -> Cost:
    """What a step costs, as far as it can be computed."""
    memory = max(phase.allocated for phase in make_plan(run).memory)
    return Cost(_forwards(run, run.max_steps) / run.max_steps, None, round(memory / MB, 1))


def _forwards(run: TrainConfig, steps: int) -> float:
    """Forward equivalents of a run, if it had so many steps."""
    return steps * run.batch_size * forward_equivalents(_lasting(run, steps).method.unwatched().calls(steps))


def _for_forwards(run: TrainConfig, budget: float) -> TrainConfig:
    """A run for the most steps that cost no more; at least one. A step's mean cost may depend on their number."""
    most = bisect_right(range(1, int(budget) + 2), budget, key=lambda steps: _forwards(run, steps))
    return _lasting(run, most)


def _judged_like(other: TrainConfig, run: TrainConfig) -> TrainConfig:
    """A run whose monitors judge when those of another one do, if samples are then judged for a quarter of it."""
    like_other = {"monitor_grace": other.grace, "monitor_patience": other.patience}
    return run.model_copy(update=like_other) if 4 * other.grace <= 3 * run.max_steps else run


def _lasting(run: TrainConfig, steps: int) -> TrainConfig:
    """The run with so many steps, at least one, of which its phases have the same shares."""
    steps = max(1, steps)
    return run.model_copy(update={"max_steps": steps, "method": run.method.scaled(steps / run.max_steps)})
