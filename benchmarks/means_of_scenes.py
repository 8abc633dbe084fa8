"""Does a student of few steps draw one scene, or the mean of all scenes of a caption?

    .venv/bin/python benchmarks/means_of_scenes.py runs/methods --seeds 1,2

Captions of the study `methods` leave most of a scene open. For each held-out one, from the students of its runs and in
latents: how far samples of different noise scatter around their mean, as a share of real clips' variance; and how far
that mean is from the mean of real clips, squared, as the same share (without the part that so few clips would have by
chance). One scene for each noise: 1 and 0. The mean of all scenes, whatever the noise: 0 and 0. Writes to
benchmarks/results/means-of-scenes.json.
"""

import json
from pathlib import Path
from typing import Annotated

import torch
import typer
from torch import Tensor

from avd_trainer.config.sections import ShapesData
from avd_trainer.data.in_memory import CaptionedLatents, InMemoryData
from avd_trainer.data.sources import held_out_shapes
from avd_trainer.models.codecs.block_dct import BlockDCTCodec
from avd_trainer.models.text_encoders.hashed import TEXT_LENGTH, HashTextEmbedding
from avd_trainer.models.transformer import VelocityModel, load_transformer
from avd_trainer.runtime.environment import environment
from avd_trainer.studies.definition import load_study
from avd_trainer.studies.units import batches_of, few_step_sample, sample_captions
from avd_trainer.training.config import TrainConfig

STUDENTS = ("untrained-vpae", "vpae", "vpae-avd", "dmd", "dmd-avd")
"""Those of one step, and one of four without and with the terms."""
RESULTS = Path(__file__).parent / "results" / "means-of-scenes.json"


def main(
    folder: Annotated[Path, typer.Argument(help="The study's, with the students of these seeds.")],
    seeds: Annotated[str, typer.Option(help="Of the students, with commas.")] = "1",
    captions: Annotated[int, typer.Option(help="Held-out captions.")] = 16,
    clips: Annotated[int, typer.Option(help="Of each caption.")] = 32,
    output: Annotated[Path, typer.Option(help="Where the results go.")] = RESULTS,
) -> None:
    """Sample and compare."""
    torch.set_num_threads(1)
    study, device = load_study("methods"), torch.device("cpu")
    assert isinstance(study.data, ShapesData)
    codec = BlockDCTCodec()
    shapes = held_out_shapes(study.data, 2 * captions)  # whose captions come in pairs
    drawn = [[shapes.render(2 * caption, rendering) for rendering in range(clips)] for caption in range(captions)]
    flat = [clip for each in drawn for clip in each]
    real = torch.cat([codec.encode(clip.video.unsqueeze(0)) for clip in flat])
    of_captions = real.unflatten(0, (captions, -1))
    found: dict[str, dict[str, dict[str, float]]] = {"real": {"one half": compare(*of_captions.chunk(2, dim=1))}}
    for name in STUDENTS:
        config = study.run(name)
        assert isinstance(config, TrainConfig)
        assert config.teacher is not None
        embed = HashTextEmbedding(TEXT_LENGTH, config.method.transformer_config(config.teacher)["text_dim"])
        asked = InMemoryData(CaptionedLatents(real, [clip.caption for clip in flat]), embed)
        for seed in map(int, seeds.split(",")):
            weights = folder / "units" / f"{name}-{seed}" / "run" / "student"
            untrained = name.startswith("untrained")
            model = VelocityModel(load_transformer(config.teacher if untrained else str(weights), device))
            sample = few_step_sample(model, config.method.few_steps)
            made = sample_captions(sample, asked, batches_of(len(flat), 64), (seed, 0), device, lambda: None)
            found.setdefault(name, {})[str(seed)] = compare(made.unflatten(0, (captions, -1)), of_captions)
            print(name, seed, found[name][str(seed)], flush=True)
    command = f"python benchmarks/means_of_scenes.py DIR --seeds {seeds} --captions {captions} --clips {clips}"
    output.write_text(
        json.dumps({"command": command, **environment(), "found": found}, indent=1) + "\n", encoding="utf-8"
    )


def compare(made: Tensor, real: Tensor) -> dict[str, float]:
    """Samples and real clips, ``[captions, clips, ...]`` each; both figures are shares of the real clips' variance."""
    variance, spread = made.var(1).mean(), real.var(1).mean()
    distance = (made.mean(1) - real.mean(1)).square().mean() - variance / made.shape[1] - spread / real.shape[1]
    return {"scatter": float(variance / spread), "distance_of_means": float(distance / spread)}


if __name__ == "__main__":
    typer.run(main)
