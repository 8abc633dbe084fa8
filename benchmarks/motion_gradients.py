"""How hard does the motion term pull beside each method's own loss? The weights of the study `methods` follow from it.

    .venv/bin/python benchmarks/motion_gradients.py

Begins the runs of that study that have AVD's terms, each with the paper's weight of the motion term and without its
floor, and writes to benchmarks/results/motion-gradients.json the size of the term's gradient at the student's output
over that of the own loss: the mean over the first steps, whose student is nearly the teacher. Takes a minute of a core.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Annotated, NamedTuple

import torch
import typer
from torch import Tensor

from avd_trainer.config.loading import load_config
from avd_trainer.data.sources import load_data
from avd_trainer.methods.base import Loss
from avd_trainer.methods.terms import Terms
from avd_trainer.runtime.environment import environment
from avd_trainer.runtime.ranks import Ranks, join_ranks
from avd_trainer.studies.catalog import find_study
from avd_trainer.training.config import TrainConfig
from avd_trainer.training.trainer import Trainer

WEIGHT = 0.05
STEPS, SEED, RATE = 6, 100, 5e-5
NO_FLOOR = -100.0  # below any loss
RESULTS = Path(__file__).parent / "results" / "motion-gradients.json"


class Part(NamedTuple):
    """A part of a method's run: the variant, and the values of a run of that part alone."""

    variant: str
    values: Sequence[str] = ()


PARTS = {
    "dmd": Part("dmd-avd"),
    "regression": Part("regression-avd"),
    "dmd2": Part("dmd2-avd"),
    "data-forcing": Part("data-forcing-avd", ("student_weights=null",)),
    "lcm": Part("lcm-avd"),
    "pcm": Part("pcm-avd"),
    "dcm, semantic turn": Part("dcm-avd", ("method.detail.after=199",)),
    "scm, after its warm-up": Part("scm-avd", ("method.tangent_warmup=0",)),
    "rcm, after its warm-up": Part("rcm-avd", ("method.tangent_warmup=0",)),
    "vpae, phase I": Part("vpae-avd", ("method.priming_steps=199",)),
    "vpae, phase II": Part("vpae-avd", ("method.priming_steps=0",)),
}


def main(output: Annotated[Path, typer.Option(help="Where the results go.")] = RESULTS) -> None:
    """Measure every part."""
    torch.set_num_threads(1)
    with join_ranks() as ranks:
        ratios = {name: motion_over_own(part, ranks) for name, part in PARTS.items()}
    for name, ratio in ratios.items():
        print(f"{name:24} {ratio:.2g}")
    found = {
        "weight": WEIGHT,
        "steps": STEPS,
        "seed": SEED,
        "learning_rate": RATE,
        "motion_over_own": ratios,
        "environment": environment(),
    }
    output.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


def motion_over_own(part: Part, ranks: Ranks) -> float:
    """The motion term's gradient over the own loss's, mean over the first steps that have samples."""
    values = [
        *part.values,
        f"seed={SEED}",
        f"method.student.optimizer.lr={RATE}",
        f"method.avd.motion.weight={WEIGHT}",
        f"method.avd.motion.floor={NO_FLOOR}",
    ]
    config = load_config(TrainConfig, str(find_study("methods") / f"{part.variant}.yaml"), values)
    architecture = config.method.transformer_config(config.teacher)
    trainer = Trainer(config, load_data(config.data, None, teacher=config.teacher, architecture=architecture), ranks)
    ratios: list[float] = []
    own_way = Terms.on_samples

    def watched(terms: Terms, own: Loss) -> Loss:
        assert own.cut is not None
        motion = terms.objective.on_samples(own.samples).loss
        ratios.append(_gradient(motion, own.cut.output) / _gradient(own.value, own.cut.output))
        return own_way(terms, own)

    Terms.on_samples = watched  # type: ignore[method-assign]
    try:
        for _ in zip(range(STEPS), trainer.run(), strict=False):
            pass
    finally:
        Terms.on_samples = own_way  # type: ignore[method-assign]
    return fmean(ratios)


def _gradient(loss: Tensor, output: Tensor) -> float:
    return float(torch.autograd.grad(loss, output, retain_graph=True)[0].norm())


if __name__ == "__main__":
    typer.run(main)
