"""Students that cost the same: as many forward equivalents, and once more, where it is asked for, as many seconds.

A study whose ``budget_of`` names a variant gives all students what that one's own ``max_steps`` cost. Each variant is
then trained twice: for as many steps as come to the same number of forward equivalents, under its own name, and for as
many as take the same time, as ``NAME-seconds``. Seconds are measured once, where the study begins, and kept in
``study.json`` with the steps that follow from them.

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
from statistics import fmean

from avd_trainer.data.sources import TrainingData
from avd_trainer.methods.base import Turn, forward_equivalents
from avd_trainer.planning.plan import make_plan
from avd_trainer.runtime.ranks import Ranks
from avd_trainer.studies.definition import SECONDS, Cost, Study, Variant, start_of
from avd_trainer.training.config import TrainConfig
from avd_trainer.training.trainer import Trainer

MB = 2**20
LOOKS = 6
"""Steps that are timed of each kind that a run has, spread evenly over those of that kind."""


Measure = Callable[[TrainConfig], float]
"""From a run to the seconds that a step of it takes, the mean over the run."""


def share_budget(study: Study, known: Mapping[str, Cost], measure: Measure) -> Study:
    """A study in which each student may cost the same, in forwards and in seconds; one without ``budget_of`` as it is.

    Args:
        study: As it was loaded.
        known: Costs that were found before, by variant; with seconds where a budget is in seconds.
        measure: Times the others.
    """
    of = study.config.budget_of
    if of is None or study.costs:
        return study
    runs = students(study)
    budget = _forwards(runs[of], runs[of].max_steps)
    equal = {name: _for_forwards(run, budget) for name, run in runs.items()}
    timing = measure if "seconds" in study.config.budgets else None
    costs = {name: known[name] if name in known else _cost(run, timing) for name, run in equal.items()}
    as_long: dict[str, TrainConfig] = {}
    if timing is not None:
        steps = {name: runs[of].max_steps * _seconds(costs[of]) / _seconds(costs[name]) for name in runs}
        as_long = {name: _judged_like(equal[name], _lasting(run, round(steps[name]))) for name, run in runs.items()}
    variants: dict[str, Variant] = {}
    for name, variant in study.variants.items():
        variants[name] = equal.get(name, variant)
        if name in as_long and name != of:  # whose two runs are one
            variants[name + SECONDS] = as_long[name]
    worked_on = {each for name in study.worked_on for each in (name, name + SECONDS) if each in variants}
    return replace(study, variants=variants, worked_on=worked_on, costs=costs)


def students(study: Study) -> dict[str, TrainConfig]:
    """The runs of a study that train a student from the teacher, by variant.

    One that goes on from another student comes on top of what that one cost, so it has its own steps.
    """
    return {
        name: variant
        for name, variant in study.variants.items()
        if isinstance(variant, TrainConfig) and study.is_measured(name) and start_of(variant) is None
    }


def time_step(config: TrainConfig, data: TrainingData, ranks: Ranks) -> float:
    """Seconds of a step, the mean over the run.

    Steps of each kind, that is with the same turns, are timed by themselves and count as often as the run has them: a
    phase, or a step in which the student is sampled for the monitors, may cost several times another. The first step
    of a kind, which is slower, is left out.
    """
    trainer = Trainer(config, data, ranks)
    kinds: dict[tuple[Turn, ...], list[int]] = {}
    for step in range(1, config.max_steps + 1):
        kinds.setdefault(tuple(trainer.method.turns(step)), []).append(step)
    whole = 0.0
    for steps in kinds.values():
        looks = [steps[(len(steps) - 1) * look // LOOKS] for look in range(LOOKS + 1)]
        seconds = [_time(trainer, step) for step in looks]
        whole += len(steps) * fmean(seconds[1:])
    return whole / config.max_steps


def _time(trainer: Trainer, step: int) -> float:
    """Seconds of this step, without those of opening the data at it."""
    trainer.step = step - 1
    steps = trainer.run()
    start = time.perf_counter()
    next(steps)
    return time.perf_counter() - start


def _cost(run: TrainConfig, measure: Measure | None) -> Cost:
    memory = max(phase.allocated for phase in make_plan(run).memory)
    seconds = None if measure is None else round(measure(run), 4)
    return Cost(_forwards(run, run.max_steps) / run.max_steps, seconds, round(memory / MB, 1))


def _seconds(cost: Cost) -> float:
    assert cost.seconds is not None, "a budget in seconds was measured"
    return cost.seconds


def _forwards(run: TrainConfig, steps: int) -> float:
    """Forward equivalents of a run, if it had so many steps."""
    return steps * run.batch_size * forward_equivalents(_lasting(run, steps).method.calls(steps))


def _for_forwards(run: TrainConfig, budget: float) -> TrainConfig:
    """A run for the most steps that cost no more; at least one. A step's mean cost may depend on their number."""
    most = bisect_right(range(1, int(budget) + 2), budget, key=lambda steps: _forwards(run, steps))
    return _lasting(run, most)


def _judged_like(other: TrainConfig, run: TrainConfig) -> TrainConfig:
    """A run whose monitors begin to judge where those of another one do, if that leaves a quarter of it."""
    return run.model_copy(update={"monitor_grace": other.grace}) if 4 * other.grace <= 3 * run.max_steps else run


def _lasting(run: TrainConfig, steps: int) -> TrainConfig:
    """The run with so many steps, at least one, of which its phases have the same shares."""
    steps = max(1, steps)
    return run.model_copy(update={"max_steps": steps, "method": run.method.scaled(steps / run.max_steps)})
