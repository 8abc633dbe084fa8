"""The demo: two students of one teacher, with and without the two terms, compared."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from pydantic import Field
from torch import Tensor

from avd_trainer.config.differences import differences
from avd_trainer.config.loading import read_saved, save_config
from avd_trainer.config.sections import Section, ShardsData
from avd_trainer.data.in_memory import InMemoryData
from avd_trainer.data.sources import TrainingData, load_clips
from avd_trainer.data.video_files import enlarge, save_gif, tile
from avd_trainer.evaluation.clip_metrics import ClipMetrics, evaluate
from avd_trainer.methods.avd import AVDMethodConfig
from avd_trainer.methods.dmd import DMDMethodConfig
from avd_trainer.models.codecs.block_dct import BlockDCTCodec
from avd_trainer.models.samplers import DrawNoise, VelocityPredictor, few_step_rollout, sample_teacher
from avd_trainer.models.text_encoders.hashed import TEXT_LENGTH, HashTextEmbedding
from avd_trainer.models.transformer import VelocityModel, load_transformer
from avd_trainer.runtime.errors import UserError
from avd_trainer.runtime.files import claim_folder, write_json
from avd_trainer.runtime.progress import ProgressBar
from avd_trainer.runtime.ranks import Ranks
from avd_trainer.runtime.terminal import say
from avd_trainer.studies.demo_calibration import Part, calibrated
from avd_trainer.studies.figures import TITLES, save_report
from avd_trainer.training.config import TrainConfig
from avd_trainer.training.metrics_log import METRICS_FILE
from avd_trainer.training.run import train

CLIPS_PER_GIF = 8
CLIPS_TO_CALIBRATE = 64
DEMO = "avd demo"
"""The command that writes demos."""
CONFIG = "demo.yaml"
REPORT = "report.png"
METRICS = "metrics.json"


class EvaluationConfig(Section):
    """How a demo measures what came out."""

    samples: int = Field(default=144, ge=2)
    """Clips per model, and real clips to compare with."""
    teacher_steps: int = Field(default=25, ge=1)
    """Euler steps of the teacher."""


class DemoConfig(TrainConfig):
    """The AVD run of a demo, and how its students are measured."""

    evaluation: EvaluationConfig = EvaluationConfig()
    """What is measured."""
    calibrate: tuple[Part, ...] = ()
    """What of the method is chosen by the clips in place of the values here; ``avd demo --videos`` asks for what is not
    set by ``--set``. The demo's ``calibration.json`` says what came of it."""


def run_demo(config: DemoConfig, output: Path, ranks: Ranks) -> dict[str, ClipMetrics] | None:
    """Distil twice from one teacher, seed and number of updates: by distribution matching alone, and with AVD.

    A demo that was stopped goes on where it stands. Of one that is finished nothing is done again.

    Args:
        config: The AVD run; the other differs in its objective alone.
        output: Empty, or that of the same demo. Gets ``demo.yaml``, ``report.png``, ``real.gif``, ``teacher.gif``,
            ``dmd.gif``, ``avd.gif``, ``metrics.json``, and a folder for each of the two runs; where values
            are chosen by the clips, ``calibration.json``.
        ranks: The one process of the demo.

    Returns:
        The metrics of ``real``, ``teacher``, ``dmd`` and ``avd``; None where a signal asked it to stop, with everything
        saved.

    Raises:
        UserError: If there are several ranks, the data is not in memory, the method is not AVD, or ``output`` holds
            something else or a demo of other settings; otherwise as :func:`train`.
    """
    if ranks.size > 1 or isinstance(config.data, ShardsData):
        raise UserError("The demo is for one process and for shapes or videos. Use `avd train` for more.")
    method = config.method
    if not isinstance(method, AVDMethodConfig):
        raise UserError(
            f"The demo compares AVD with DMD alone, and this is method {method.kind}. Leave method.kind out."
        )
    assert config.teacher is not None  # the method needs one
    _claim(config, output)
    if (finished := _read_finished(output)) is not None:
        say(f"The demo in {output} is finished, and nothing is done again. Another one wants another --output.")
        return finished
    codec = BlockDCTCodec()
    teacher = load_transformer(config.teacher)
    embed = HashTextEmbedding(TEXT_LENGTH, teacher.config.text_dim)
    clips, held_out = load_clips(config.data, codec)
    data = InMemoryData(clips, embed)
    shape = clips.latents.shape[1:]
    samples, teacher_steps = config.evaluation.samples, config.evaluation.teacher_steps
    method = calibrated(
        config, config.calibrate, clips, output, samples=min(samples, CLIPS_TO_CALIBRATE), steps=teacher_steps
    )
    # The real clips that are shown, and their captions for the others; repeated where a folder of videos has fewer.
    captions = [clips.captions[i % len(clips)] for i in range(samples)]
    text = embed(captions)

    latents = {"real": clips.latents[:samples]}
    with ProgressBar("teacher samples", teacher_steps) as bar:
        latents["teacher"] = sample_teacher(
            VelocityModel(teacher),
            text,
            data.unconditional(),
            shape,
            _same_noise(samples),
            steps=teacher_steps,
            guidance_scale=method.guidance_scale,
            shift=method.sampling_shift,
            on_step=bar.advance,
        )
    engine = config.model_dump(exclude={"evaluation", "calibrate", "method"})
    shared = method.model_dump(include=set(DMDMethodConfig.model_fields) - {"kind"})
    methods = {"dmd": DMDMethodConfig(**shared), "avd": method}
    for name, run in {name: TrainConfig(**engine, method=each) for name, each in methods.items()}.items():
        if not train(run, output / name, ranks, data=TrainingData(data, data), description=name):
            return None
        student: VelocityPredictor = VelocityModel(load_transformer(str(output / name / "student")))
        with torch.no_grad():
            latents[name] = few_step_rollout(student, text, shape, method.few_steps, _same_noise(samples)).x_0

    videos = {name: codec.decode(x) for name, x in latents.items()}
    metrics = {name: evaluate(latents[name], videos[name], held_out.latents) for name in latents}
    motion = method.motion
    save_report(
        output / REPORT,
        videos,
        metrics,
        {name: output / name / METRICS_FILE for name in ("dmd", "avd")},
        captions,
        method.few_steps,
        floor=None if motion is None else motion.floor,
        latent_std=float(clips.latents.std()),
    )
    for name, video in videos.items():
        save_gif(enlarge(tile(video[:CLIPS_PER_GIF]), 2), output / f"{name}.gif", fps=12)
    write_json(output / METRICS, {name: value.model_dump() for name, value in metrics.items()})
    return metrics


def _claim(config: DemoConfig, output: Path) -> None:
    """Take a new folder, or that of the same demo.

    Raises:
        UserError: If it cannot be written to, or holds something else or a demo of other settings.
    """
    claim_folder(output)
    file = output / CONFIG
    if file.exists():
        if differing := differences(read_saved(file), config.model_dump(mode="json")):
            raise UserError(
                f"{output} holds a demo of other settings:\n" + "\n".join(differing) + "\n"
                "Choose a new --output for this one, or run with the settings there to go on."
            )
    elif any(output.iterdir()):
        raise UserError(f"{output} holds something that is no demo. Choose a new --output.")
    else:
        save_config(config, file, DEMO)


def _read_finished(output: Path) -> dict[str, ClipMetrics] | None:
    """The metrics of a demo that has all of its files; None of any other."""
    if not all((output / name).exists() for name in (METRICS, REPORT, *(f"{name}.gif" for name in TITLES))):
        return None
    saved = json.loads((output / METRICS).read_text())
    return {name: ClipMetrics.model_validate(values) for name, values in saved.items()}


def _same_noise(samples: int) -> DrawNoise:
    """Noise that is the same for every model and every run."""
    draws = torch.Generator().manual_seed(2026)

    def draw(shape: Sequence[int]) -> Tensor:
        return torch.randn(samples, *shape, generator=draws)

    return draw
