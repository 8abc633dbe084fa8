"""Does V-PAE's discriminator tell clips from samples on the tiny models? Pairs that it ranks, while training and after.

    .venv/bin/python benchmarks/discriminator_ranks.py

Trains students of the study `vpae` once more, as the study does, and writes to
benchmarks/results/discriminator-ranks.json in what share of pairs the clip's logit lies above the sample's: over each
fifth of phase II, which is its metric `discriminator/ranked`, and after the last step on held-out captions, for samples
of the student and of its average. A pair has one caption and one time t', and noises of its own; one half is chance.
Takes about two minutes of a core for each student.
"""

import json
from pathlib import Path
from statistics import fmean
from typing import Annotated, Any

import torch
import typer
from torch import Tensor

from avd_trainer.data.examples import condition_of
from avd_trainer.data.in_memory import CaptionedLatents, InMemoryData, encode_shapes
from avd_trainer.data.sources import held_out_shapes, load_data
from avd_trainer.methods.vpae import VPAE
from avd_trainer.models.codecs.block_dct import BlockDCTCodec
from avd_trainer.models.samplers import predict, schedule
from avd_trainer.models.text_encoders.hashed import TEXT_LENGTH, HashTextEmbedding
from avd_trainer.runtime.draws import Draws
from avd_trainer.runtime.environment import environment
from avd_trainer.runtime.ranks import Ranks, join_ranks
from avd_trainer.studies.definition import Study, load_study, parse_seeds
from avd_trainer.studies.statistics import estimate
from avd_trainer.training.trainer import Trainer

PARTS = 5
RANKED = "discriminator/ranked"
TIMES = (50.0, 100.0, 300.0, 500.0, 700.0, 900.0)
RESULTS = Path(__file__).parent / "results" / "discriminator-ranks.json"


def main(
    variants: Annotated[str, typer.Option(help="Of the study vpae, with commas.")] = "vpae,csds-0",
    seeds: Annotated[str, typer.Option(help="Of training.")] = "1..6",
    results: Annotated[Path, typer.Option(help="File to write.")] = RESULTS,
) -> None:
    study = load_study("vpae")
    found: dict[str, Any] = {}
    with join_ranks() as ranks:
        for variant in variants.split(","):
            students = [student(study, variant, seed, ranks) for seed in parse_seeds(seeds)]
            columns = {name: [each[name] for each in students] for name in students[0]}
            found[variant] = {
                name: {"values": values, **estimate(values)._asdict()} for name, values in columns.items()
            }
            for name, values in columns.items():
                print(variant, name, *(f"{value:.3f}" for value in values), f"mean {fmean(values):.3f}")
    command = f"python benchmarks/discriminator_ranks.py --variants {variants} --seeds {seeds}"
    report = {"command": command, **environment(), "share_of_pairs": found}
    results.write_text(json.dumps(report, indent=2) + "\n")


def student(study: Study, variant: str, seed: int, ranks: Ranks) -> dict[str, float]:
    """Shares of pairs ranked rightly, by where."""
    config = study.run(variant).model_copy(update={"seed": seed})
    architecture = config.method.transformer_config(config.teacher)
    data = load_data(config.data, None, teacher=config.teacher, architecture=architecture)
    trainer = Trainer(config, data, ranks)
    training = [float(metrics[RANKED]) for metrics in trainer.run() if RANKED in metrics]
    size = len(training) // PARTS
    found = {f"training_{part + 1}": fmean(training[part * size : (part + 1) * size]) for part in range(PARTS)}
    evaluation = study.config.evaluation
    shapes = held_out_shapes(study.data, evaluation.captions, evaluation.caption_seed)
    clips = encode_shapes(shapes, BlockDCTCodec())
    embed = HashTextEmbedding(TEXT_LENGTH, architecture["text_dim"])
    return found | held_out(trainer, clips, InMemoryData(clips, embed))


@torch.no_grad()
def held_out(trainer: Trainer, clips: CaptionedLatents, asked: InMemoryData) -> dict[str, float]:
    """Shares of held-out pairs, by whose samples they are and the time t'."""
    method = trainer.method
    assert isinstance(method, VPAE)
    condition = condition_of([asked[place] for place in range(len(asked))])
    x_0 = clips.latents
    draws = Draws((0, "discriminator-ranks"), range(len(x_0)), x_0.device)
    noise, top = draws.normal("input", x_0.shape[1:]), torch.full((len(x_0),), 1000.0)

    def logits(x_BCFHW: Tensor, name: str, t_B: Tensor) -> Tensor:
        noised = schedule.add_noise(x_BCFHW, draws.normal(name, x_BCFHW.shape[1:]), t_B)
        return method.equilibrium.discriminator(noised, t_B, condition)

    found = {}
    for role in ("student", "ema"):
        samples = predict(trainer.models[role], noise, top, condition, finished=True).x_0
        for t in TIMES:
            t_B = torch.full_like(top, t)
            gaps = logits(x_0, "clips", t_B) - logits(samples, "samples", t_B)
            found[f"{role}_{t:g}"] = float(0.5 + 0.5 * gaps.sign().mean())
    return found


if __name__ == "__main__":
    typer.run(main)
