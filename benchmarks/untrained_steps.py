"""What are few steps worth without any training? Both tiny teachers of text to video, in one step, in four and in 25.

    .venv/bin/python benchmarks/untrained_steps.py

Where a student before its first update makes real clips, a comparison of methods says little of their use. Writes to
benchmarks/results/untrained-steps.json every measure of 256 held-out captions, for captions that say all of a clip and
for those that name its two shapes alone, beside real clips and the teacher with the guidance that students learn from.
Takes ten minutes of a core. With --picture also an animation of the first clips of the latter captions.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor

from avd_trainer.config.loading import load_config
from avd_trainer.config.sections import ShapesData
from avd_trainer.data.in_memory import InMemoryData, encode_shapes
from avd_trainer.data.sources import held_out_shapes
from avd_trainer.evaluation.controls import Encoded
from avd_trainer.evaluation.measure_table import Row, markdown_table
from avd_trainer.evaluation.reference import reference_of_shapes, score
from avd_trainer.methods.dmd import DMDMethodConfig
from avd_trainer.models.codecs.block_dct import BlockDCTCodec
from avd_trainer.models.text_encoders.hashed import TEXT_LENGTH, HashTextEmbedding
from avd_trainer.models.transformer import VelocityModel, load_transformer
from avd_trainer.runtime.environment import environment
from avd_trainer.studies.pictures import save_animation
from avd_trainer.studies.units import Sample, batches_of, few_step_sample, sample_captions, teacher_sample
from avd_trainer.training.config import TrainConfig

PRESETS = ("tiny", "tiny-open")
SHOWN = (
    "visible",
    "preserved",
    "color_error",
    "saturation",
    "spatial_frequency",
    "motion_distance",
    "variety",
    "repetition",
)
PICTURED = 4
"""Clips of each row of the animation."""
SEEDS = (100, 0)
RESULTS = Path(__file__).parent / "results" / "untrained-steps.json"


def main(
    captions: Annotated[int, typer.Option(help="Held-out clips.")] = 256,
    output: Annotated[Path, typer.Option(help="Where the results go.")] = RESULTS,
    picture: Annotated[Path | None, typer.Option(help="Animation to write, such as open-captions.gif.")] = None,
) -> None:
    """Sample and measure."""
    torch.set_num_threads(1)
    found: dict[str, Any] = {}
    for name in PRESETS:
        shown, videos, found[name] = measure_preset(name, captions)
    if picture is not None:
        save_animation(videos, shown, picture)
    command = f"python benchmarks/untrained_steps.py --captions {captions}"
    output.write_text(json.dumps({"command": command, **environment(), **found}, indent=1) + "\n", encoding="utf-8")


def measure_preset(name: str, captions: int) -> tuple[list[str], dict[str, Tensor], dict[str, Any]]:
    """The first captions with clips of each way to sample the preset's teacher, and all measures."""
    config, codec = load_config(TrainConfig, name, method="dmd"), BlockDCTCodec()
    method = config.method
    assert isinstance(method, DMDMethodConfig)
    assert isinstance(config.data, ShapesData)
    assert config.teacher is not None
    shapes = held_out_shapes(config.data, captions)
    clips, reference = encode_shapes(shapes, codec), reference_of_shapes(shapes, codec)
    device = torch.device("cpu")
    model = VelocityModel(load_transformer(config.teacher, device))
    asked = InMemoryData(clips, HashTextEmbedding(TEXT_LENGTH, method.transformer_config(config.teacher)["text_dim"]))
    videos, scores = {"real": codec.decode(clips.latents[:PICTURED])}, {}
    for title, sample in ways(model, method).items():
        latents = sample_captions(sample, asked, batches_of(captions, 64), SEEDS, device, lambda: None)
        video = codec.decode(latents)
        videos[title], scores[title] = video[:PICTURED], score(Encoded(latents, video), clips.captions, reference)
    names = [measure for measure in SHOWN if measure in reference.spreads]
    print(markdown_table([Row(title, values) for title, values in scores.items()], reference, names=names))
    return (
        clips.captions[:PICTURED],
        videos,
        {
            "sets": reference.sets,
            "clips": reference.clips,
            "real": {measure: asdict(spread) for measure, spread in reference.spreads.items()},
            "samples": scores,
        },
    )


def ways(model: VelocityModel, method: DMDMethodConfig) -> Mapping[str, Sample]:
    """By title, ways to sample; the steps are those of the preset's students."""
    first, _, third, _ = method.few_steps
    return {
        "one step": few_step_sample(model, (first,)),
        "two steps": few_step_sample(model, (first, third)),
        "four steps": few_step_sample(model, method.few_steps),
        "four steps of Euler": few_step_sample(model, method.few_steps, kind="ode"),
        "teacher, 25 steps, no guidance": teacher_sample(model, 25, 1.0, method.sampling_shift),
        f"teacher, 25 steps, guidance {method.guidance_scale:g}": teacher_sample(
            model, 25, method.guidance_scale, method.sampling_shift
        ),
    }


if __name__ == "__main__":
    typer.run(main)
