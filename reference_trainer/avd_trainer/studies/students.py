"""Students that are there already, measured as those of a study are."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

import torch

from avd_trainer.config.loading import load_config
from avd_trainer.config.sections import ShapeCaptions, ShapesData
from avd_trainer.data.in_memory import InMemoryData, encode_shapes
from avd_trainer.data.sources import held_out_shapes
from avd_trainer.evaluation.controls import CONTROLS, controls_of_shapes
from avd_trainer.evaluation.measure_table import Row, markdown_table
from avd_trainer.evaluation.measures import ALL_MEASURES, measure
from avd_trainer.evaluation.reference import Reference, reference_of_shapes
from avd_trainer.inference.generation import load_student
from avd_trainer.inference.students import Student
from avd_trainer.models.codecs.block_dct import BlockDCTCodec
from avd_trainer.models.codecs.latent_space import LATENT_SPACES
from avd_trainer.models.text_encoders.hashed import TEXT_LENGTH, HashTextEmbedding
from avd_trainer.models.transformer import VelocityModel
from avd_trainer.runtime.environment import environment
from avd_trainer.runtime.errors import UserError
from avd_trainer.runtime.files import write_json, write_text
from avd_trainer.runtime.progress import ProgressBar
from avd_trainer.studies.definition import StudyEvaluationConfig
from avd_trainer.studies.dots import save_figure
from avd_trainer.studies.units import batches_of, few_step_sample, sample_captions
from avd_trainer.training.config import TrainConfig

TABLE, FIGURE, RESULTS = "measures.md", "measures.png", "measures.json"
REQUEST = "request"
"""In the results, what was to be measured, and how."""


class Evaluated(NamedTuple):
    """Students beside real clips and controls.

    Attributes:
        rows: The means over noises.
        controls: Real clips that were spoiled.
        reference: Real clips.
        results: All of it as plain values, in the form of a study's ``results.json``; its variants are the students,
            and what are seeds there are noises.
    """

    rows: list[Row]
    controls: list[Row]
    reference: Reference
    results: dict[str, Any]


def evaluate_students(
    students: Mapping[str, Student],
    options: StudyEvaluationConfig,
    *,
    captions: ShapeCaptions,
    seed: int,
    device: torch.device,
) -> Evaluated:
    """Sample held-out captions of moving shapes with each student, from the same noise, and measure the clips.

    Args:
        students: By title.
        options: How many captions and noises, as in a study.
        captions: How much they say, as :func:`captions_of` the students.
        seed: Of the noises; a study has that of the run.
        device: Where to sample.

    Raises:
        UserError: If a clip is not finite.
    """
    codec = BlockDCTCodec()
    data = load_config(TrainConfig, "tiny").data  # which the studies have, too
    assert isinstance(data, ShapesData)
    shapes = held_out_shapes(data.model_copy(update={"captions": captions}), options.captions, options.caption_seed)
    with ProgressBar("real clips", options.renderings) as bar:
        reference = reference_of_shapes(shapes, codec, sets=options.renderings, on_set=bar.advance)
    clips = encode_shapes(shapes, codec)
    batches = batches_of(options.captions, options.batch_size)
    values: dict[str, list[dict[str, float]]] = {}
    with ProgressBar("samples", len(students) * options.noises * len(batches)) as bar:
        for title, student in students.items():
            sample = few_step_sample(
                VelocityModel(load_student(student, device, torch.float32)), student.timesteps, kind=student.sampler
            )
            embed = HashTextEmbedding(TEXT_LENGTH, student.architecture["text_dim"])
            asked = InMemoryData(clips, embed, image=student.image is not None)
            values[title] = []
            for noise in range(options.noises):
                latents = sample_captions(sample, asked, batches, (seed, noise), device, bar.advance)
                if not latents.isfinite().all():
                    raise UserError(f"{student.folder} makes clips with NaN or infinity: it has diverged.")
                video = codec.decode(latents)
                images = None if student.image is None else reference.real.video[:, :, 0]
                values[title].append(measure(latents, video, clips.captions, reference.real, images))
    spoiled = {
        name: measure(*each, clips.captions, reference.real) for name, each in controls_of_shapes(shapes, codec).items()
    }
    rows = [Row(title, {key: fmean(each[key] for each in own) for key in own[0]}) for title, own in values.items()]
    return Evaluated(
        rows,
        [Row(CONTROLS[name].title, own) for name, own in spoiled.items()],
        reference,
        _plain(rows, values, spoiled, reference, options, captions, seed),
    )


def captions_of(students: Mapping[str, Student]) -> ShapeCaptions:
    """How much the captions of moving shapes say that all of them were trained on; as full ones where that is not said.

    Raises:
        UserError: If a student makes other latents than the tiny preset's, or captions of one say more than another's.
    """
    for student in students.values():
        if student.latent_space != "block-dct-4":
            raise UserError(
                f"{student.folder} makes latents of {LATENT_SPACES[student.latent_space]}, of which there are no "
                "captioned clips whose every shape is known. Only students of the tiny preset can be measured on them."
            )
    said = {title: student.captions or "full" for title, student in students.items()}
    if len(set(said.values())) > 1:
        raise UserError(
            "Students of captions that leave the scene open are measured on such captions, and others on full ones: "
            f"data.captions was {', '.join(f'{captions} of {title}' for title, captions in said.items())}. Evaluate "
            "them by one command each."
        )
    return next(iter(said.values()))


def save_evaluation(evaluated: Evaluated, request: Mapping[str, Any], output: Path) -> None:
    """Write table, figure and values into a folder, with what was asked for."""
    headline = markdown_table(evaluated.rows, evaluated.reference, evaluated.controls)
    others = [name for name in evaluated.reference.spreads if not ALL_MEASURES[name].headline]
    more = markdown_table(evaluated.rows, evaluated.reference, evaluated.controls, names=others)
    write_text(output / TABLE, f"# {evaluated.results['title']}\n\n{headline}\n{more}")
    write_json(output / RESULTS, {**evaluated.results, REQUEST: request})
    save_figure(output / FIGURE, evaluated.results)


def _plain(
    rows: list[Row],
    values: Mapping[str, list[dict[str, float]]],
    spoiled: Mapping[str, dict[str, float]],
    reference: Reference,
    options: StudyEvaluationConfig,
    captions: ShapeCaptions,
    seed: int,
) -> dict[str, Any]:
    return {
        "title": f"{' and '.join(values)} on {options.captions} held-out captions",
        "evaluation": options.model_dump(),
        "captions": captions,
        "seed": seed,
        "reference": {
            "sets": reference.sets,
            "spreads": {name: asdict(each) for name, each in reference.spreads.items()},
        },
        "controls": {"controls": dict(spoiled)},
        "variants": {
            row.title: {
                "title": row.title,
                "measures": {name: {"mean": mean, "low": None, "high": None} for name, mean in row.values.items()},
                "seeds": {str(noise): {"values": own} for noise, own in enumerate(values[row.title])},
            }
            for row in rows
        },
        "environment": environment(),
    }
