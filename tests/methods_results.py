"""Results of the study `methods` that were never measured, for what reads them."""

from typing import Any

from avd_trainer.evaluation.measures import MEASURES, OPEN_MEASURES
from avd_trainer.studies.definition import SECONDS, load_study

MADE = dict.fromkeys((*MEASURES, *OPEN_MEASURES), 0.5)
SEEDS = range(1, 7)
ONCE = ("teacher", "untrained", "dmd-seconds", "data-forcing")
"""How names begin that have one budget."""


def made_results(**changed: dict[str, float]) -> dict[str, Any]:
    """All students alike, but for values of those that are named (with _ for -), with a little of every seed."""
    spread = {"mean": 0.5, "std": 0.01, "low": 0.48, "high": 0.52}
    seeds = {
        name: {
            str(seed): {
                "values": {key: value + seed / 1e5 for key, value in {**MADE, **changed.get(_key(name), {})}.items()},
                "monitor": {"of_samples": []},
            }
            for seed in SEEDS
        }
        for name in load_study("methods").order
        if not (name.endswith(SECONDS) and name.startswith(ONCE))
    }
    controls = {
        control: dict.fromkeys(MADE, 1.0) for control in ("noise", "frozen", "shuffled", "saturated", "repeated")
    }
    return {
        "variants": {name: {"seeds": units, "values": {"max_steps": 200}} for name, units in seeds.items()},
        "reference": {"spreads": dict.fromkeys(MADE, spread)},
        "controls": {"controls": controls},
        "costs": {name: {"forwards": 260.0, "seconds": 1.5, "memory": 80.0} for name in seeds},
    }


def _key(name: str) -> str:
    return name.replace("-", "_")
