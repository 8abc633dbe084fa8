"""What logs and students of two studies say beyond their results: figures of docs/studies.md.

    avd study misfits --output runs/misfits --jobs 2
    avd study balance --output runs/balance --jobs 2
    .venv/bin/python benchmarks/study_logs.py runs/misfits runs/balance

Writes benchmarks/results/study-logs.json. Of `misfits`: how much of the regression goes to clips with a wrong caption,
over the second half of the runs, and of which captions students lose a shape. Of `balance`: the regression's gradient
over the matching term's. Logs do not say whose caption is wrong. But data and order belong to the seeds, so both are
made again, and are held against the first losses of runs that differ in captions alone. Trains nothing; a minute.
"""

import json
from collections.abc import Callable
from pathlib import Path
from statistics import fmean
from typing import Annotated, Any

import torch
import typer
from torch import Tensor

from avd_trainer.config.loading import load_config
from avd_trainer.config.sections import ShapesData
from avd_trainer.data.in_memory import InMemoryData, encode_shapes
from avd_trainer.data.order import ShuffledOrder
from avd_trainer.data.sources import held_out_shapes
from avd_trainer.evaluation.shape_measures import shape_measures
from avd_trainer.evaluation.shape_tracking import track_shapes
from avd_trainer.methods.distillation import DistillationConfig
from avd_trainer.models.codecs.block_dct import BlockDCTCodec
from avd_trainer.models.text_encoders.hashed import TEXT_LENGTH, HashTextEmbedding
from avd_trainer.models.transformer import VelocityModel, load_transformer
from avd_trainer.runtime.draws import seed_of
from avd_trainer.runtime.environment import environment
from avd_trainer.runtime.files import read_json
from avd_trainer.studies.definition import StudyEvaluationConfig
from avd_trainer.studies.units import batches_of, few_step_sample, sample_captions
from avd_trainer.training.config import TrainConfig
from avd_trainer.training.folder import CONFIG
from avd_trainer.training.metrics_log import METRICS_FILE, read_series

RESULTS = Path(__file__).parent / "results" / "study-logs.json"
RIGHT, PLAIN = "plain-right", "plain"
WITH_WRONG_CAPTIONS = (PLAIN, "paper", "preset", "standardized", "relative")
PICTURED = (RIGHT, PLAIN, "paper")
RATIOS = ("ratio-0.03", "ratio-0.1", "ratio-0.3", "ratio-1", "constant")


def main(
    misfits: Annotated[Path, typer.Argument(help="Folder of the study misfits.")],
    balance: Annotated[Path, typer.Argument(help="Folder of the study balance.")],
    results: Annotated[Path, typer.Option(help="File to write.")] = RESULTS,
) -> None:
    for seed in seeds(misfits):
        check_captions(misfits, seed)
    report = {
        "command": "python benchmarks/study_logs.py runs/misfits runs/balance",
        **environment(),
        "wrong_captions": {name: over_seeds(misfits, name, wrong_captions) for name in WITH_WRONG_CAPTIONS},
        "clips_with_a_loss": clips_with_a_loss(misfits, seed=1),
        "gradient_ratio": {name: over_seeds(balance, name, gradient_ratio) for name in RATIOS},
    }
    results.write_text(json.dumps(report, indent=2) + "\n")
    print(json.dumps({name: report[name] for name in ("wrong_captions", "gradient_ratio")}, indent=1))


def over_seeds(study: Path, variant: str, look: Callable[[Path], dict[str, float]]) -> dict[str, dict[str, float]]:
    """Mean, smallest and largest of what the runs of a variant have, by name."""
    found = [look(run_of(study, variant, seed)) for seed in seeds(study)]
    columns = {name: [each[name] for each in found] for name in found[0]}
    return {name: {"mean": fmean(each), "min": min(each), "max": max(each)} for name, each in columns.items()}


def wrong_captions(run: Path) -> dict[str, float]:
    """What the clips with a wrong caption are to the regression, over the second half of a run."""
    wrong_SB = has_wrong_caption(config_of(run))
    later = slice(len(wrong_SB) // 2, None)
    wrong_SB = wrong_SB[later]
    weights_SB, losses_SB = (series(run, f"regression/{name}")[later] for name in ("weights", "sample_losses"))
    weighted_SB = weights_SB * losses_SB
    return {
        "share_of_clips": float(wrong_SB.double().mean()),
        "share_of_weighted_loss": float(weighted_SB[wrong_SB].sum() / weighted_SB.sum()),
        "weight_over_that_of_others": float(weights_SB[wrong_SB].mean() / weights_SB[~wrong_SB].mean()),
        "loss": float(losses_SB[wrong_SB].mean()),
        "loss_of_others": float(losses_SB[~wrong_SB].mean()),
        "spread_of_losses": float(losses_SB.std()),
    }


def gradient_ratio(run: Path) -> dict[str, float]:
    """The regression's gradient over the matching term's, as it is applied: mean over a run."""
    return {"mean_over_the_run": float((series(run, "balance/gradient_ratio") * series(run, "balance/scale")).mean())}


def has_wrong_caption(config: TrainConfig) -> Tensor:
    """``[S, B]``: whether a clip had another one's caption, of all that a run has read, by step and place."""
    assert isinstance(config.data, ShapesData)
    order = ShuffledOrder(config.data.clips, seed_of(config.seed, "order", "clips"))  # the trainer's
    read = torch.tensor(order.batch(0, config.max_steps * config.batch_size))
    return (read < config.data.misfits).view(config.max_steps, config.batch_size)  # as CaptionedLatents.with_misfits


def check_captions(study: Path, seed: int) -> None:
    """Hold :func:`has_wrong_caption` against the logs.

    In the first step the students of ``plain`` and ``plain-right`` are the same and see the same clips in the same
    noise: their losses differ where a caption is wrong, and nowhere else.

    Raises:
        ValueError: If that is not so.
    """
    runs = [run_of(study, variant, seed) for variant in (RIGHT, PLAIN)]
    right_B, plain_B = (series(run, "regression/sample_losses")[0] for run in runs)
    expected_B = has_wrong_caption(config_of(runs[1]))[0]
    if not torch.equal(right_B != plain_B, expected_B):
        raise ValueError(
            f"seed {seed}: in step 1 wrong captions are expected at {expected_B.nonzero().flatten().tolist()}, but the "
            f"losses {plain_B.tolist()} and {right_B.tolist()} differ elsewhere. Order or captions of the data have "
            "changed since these runs: look at them with the code that made them."
        )


def clips_with_a_loss(study: Path, seed: int) -> dict[str, Any]:
    """Places of the captions of which students lose a shape, or its look for some frames, in the first noise."""
    evaluation = StudyEvaluationConfig(**read_json(study / "study.json")["evaluation"])
    config, codec = config_of(run_of(study, RIGHT, seed)), BlockDCTCodec()
    assert isinstance(config.data, ShapesData)
    assert isinstance(config.method, DistillationConfig)
    clips = encode_shapes(held_out_shapes(config.data, evaluation.captions, evaluation.caption_seed), codec)
    places = {}
    for variant in PICTURED:
        student = VelocityModel(load_transformer(str(run_of(study, variant, seed) / config.method.main_role)))
        asked = InMemoryData(clips, HashTextEmbedding(TEXT_LENGTH, student.module.config.text_dim))
        batches = batches_of(len(clips), evaluation.batch_size)
        sample = few_step_sample(student, config.method.few_steps)
        samples = sample_captions(sample, asked, batches, (seed, 0), torch.device("cpu"), lambda: None)
        preserved_N2 = shape_measures(track_shapes(codec.decode(samples), clips.captions))["preserved"]
        places[variant] = (preserved_N2 < 1).any(1).nonzero().flatten().tolist()
    return {
        "captions": evaluation.captions,
        "seed": seed,
        "clips": {variant: len(each) for variant, each in places.items()},
        "places": places,
    }


def seeds(study: Path) -> list[int]:
    """Those of a study's results."""
    found: list[int] = read_json(study / "results.json")["seeds"]
    return found


def run_of(study: Path, variant: str, seed: int) -> Path:
    return study / "units" / f"{variant}-{seed}" / "run"


def config_of(run: Path) -> TrainConfig:
    return load_config(TrainConfig, str(run / CONFIG))


def series(run: Path, name: str) -> Tensor:
    """``[S]`` or ``[S, B]``: a metric of each step."""
    return torch.tensor(read_series(run / METRICS_FILE, name), dtype=torch.float64)


if __name__ == "__main__":
    typer.run(main)
