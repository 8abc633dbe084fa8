"""The demo: two students of one teacher, with and without the two terms, compared."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

import torch
from pydantic import Field
from torch import Tensor

from avd_core import temporal_variance
from avd_trainer.config.differences import differences
from avd_trainer.config.loading import read_saved, save_config
from avd_trainer.config.sections import Section, ShardsData
from avd_trainer.data.examples import condition_of
from avd_trainer.data.in_memory import InMemoryData
from avd_trainer.data.sources import TrainingData
from avd_trainer.evaluation.controls import Encoded
from avd_trainer.methods.avd import AVDMethodConfig
from avd_trainer.methods.dmd import DMDMethodConfig
from avd_trainer.models.architecture import image_input
from avd_trainer.models.codecs.block_dct import BlockDCTCodec
from avd_trainer.models.samplers import DrawNoise, VelocityPredictor, few_step_rollout, sample_teacher
from avd_trainer.models.text_encoders.hashed import TEXT_LENGTH, HashTextEmbedding
from avd_trainer.models.transformer import VelocityModel, load_transformer
from avd_trainer.runtime.environment import environment
from avd_trainer.runtime.errors import UserError
from avd_trainer.runtime.files import claim_folder, write_text
from avd_trainer.runtime.processes import FailedProcessError, run_processes
from avd_trainer.runtime.progress import ProgressBar
from avd_trainer.runtime.ranks import Ranks, join_ranks
from avd_trainer.runtime.terminal import say
from avd_trainer.runtime.threads import one_thread
from avd_trainer.runtime.timing import timed
from avd_trainer.studies.blind import write_blind_check
from avd_trainer.studies.demo_calibration import Part, calibrated
from avd_trainer.studies.demo_clips import DemoClips
from avd_trainer.studies.figures import save_report
from avd_trainer.studies.findings import STUDENTS, TITLES, Findings, measure_rows
from avd_trainer.studies.pictures import save_animation
from avd_trainer.studies.real_side import RealSide
from avd_trainer.studies.verdict import render_verdict
from avd_trainer.training.config import TrainConfig
from avd_trainer.training.metrics_log import METRICS_FILE
from avd_trainer.training.run import train

REAL = "real"
CLIPS_IN_ANIMATION = 6
CLIPS_TO_CALIBRATE = 64
LINES_OF_FAILURE = 10
"""How much of what a process has printed is shown where it failed."""
DEMO = "avd demo"
"""The command that writes demos."""
CONFIG = "demo.yaml"
LOGS = "logs"
CLIPS = "clips.safetensors"
ANIMATION = "demo.gif"
REPORT = "report.png"
VERDICT = "verdict.md"
METRICS = "metrics.json"


class DemoEvaluationConfig(Section):
    """How a demo measures what came out."""

    samples: int = Field(default=128, ge=4)
    """Clips per model, and held-out captions of shapes."""
    teacher_steps: int = Field(default=25, ge=1)
    """Euler steps of the teacher."""


class DemoConfig(TrainConfig):
    """The AVD run of a demo, and how its students are measured."""

    evaluation: DemoEvaluationConfig = DemoEvaluationConfig()
    """What is measured."""
    calibrate: tuple[Part, ...] = ()
    """What of the method is chosen by the clips in place of the values here; ``avd demo --videos`` asks for what is not
    set by ``--set``. The demo's ``calibration.json`` says what came of it."""


def run_demo(
    config: DemoConfig, output: Path, ranks: Ranks, *, jobs: int = 1, command: str | None = None
) -> Findings | None:
    """Distil twice from one teacher, seed and number of updates: by distribution matching alone, and with AVD.

    A demo that was stopped goes on where it stands. Of one that is finished nothing is done again.

    Args:
        config: The AVD run; the other differs in its objective alone.
        output: Empty, or that of the same demo. Gets ``demo.yaml``, ``demo.gif``, ``report.png``, ``verdict.md``,
            ``metrics.json``, ``clips.safetensors``, and a folder for each of the two runs; where
            values are chosen by the clips, ``calibration.json``.
        ranks: The process of the demo.
        jobs: With 1 this process trains one student after the other; with 2 each is trained in a process of its own,
            at the same time, which prints to ``logs``. In one thread each, so that students are the same either way.
        command: What would do it again, in the shell's words, for ``metrics.json``; None where no command asked for it.

    Returns:
        What was measured; None where a signal asked it to stop, with everything saved.

    Raises:
        FailedProcessError: If a process has failed; the other one was asked to save and stop.
        UserError: If there are several ranks, the data is not in memory, the method is not AVD, or ``output`` holds
            something else or a demo of other settings; otherwise as :func:`train`.
    """
    if ranks.size > 1 or isinstance(config.data, ShardsData):
        raise UserError("The demo is for one process and for shapes or videos. Use `avd train` for more.")
    if not isinstance(config.method, AVDMethodConfig):
        raise UserError(
            f"The demo compares AVD with DMD alone, and this is method {config.method.kind}. Leave method.kind out."
        )
    continued = _claim(config, output)
    if _is_finished(output):
        say(f"The demo in {output} is finished, and nothing is done again. Another one wants another --output.")
        saved = DemoClips.load(output / CLIPS).latents[REAL]
        return Findings.load(output / METRICS, Encoded(saved, BlockDCTCodec().decode(saved)))
    begun_in = environment()
    seconds: dict[str, float] = {}
    with timed(seconds, "all"):
        findings = _compare(config, output, ranks, jobs, seconds)
    if findings is None:
        return None
    # What a process did that was stopped took time as well, maybe elsewhere, and nobody knows how much.
    origin = {"command": command, "continued": continued, "seconds": None if continued else seconds}
    findings.save(output / METRICS, {**origin, "environment": begun_in})
    return findings


def write_blind_pairs(output: Path, seed: int) -> Path:
    """Write the blind check of a finished demo; returns its page. See :func:`write_blind_check`.

    Raises:
        UserError: If ``output`` holds no finished demo, or cannot be written to.
    """
    if not _is_finished(output):
        raise UserError(f"{output} holds no finished demo. Run `avd demo --output {output}` first.")
    clips = DemoClips.load(output / CLIPS)
    codec = BlockDCTCodec()
    videos = {name: codec.decode(clips.latents[name]) for name in STUDENTS}
    return write_blind_check(videos, clips.captions, TITLES, output, seed)


def _compare(config: DemoConfig, output: Path, ranks: Ranks, jobs: int, seconds: dict[str, float]) -> Findings | None:
    """Make what is missing of clips, pictures and verdict; None where a signal asked to stop.

    ``seconds`` gets what training, sampling and measuring take.
    """
    assert not isinstance(config.data, ShardsData), "the caller has seen to it"
    codec = BlockDCTCodec()
    samples, teacher_steps = config.evaluation.samples, config.evaluation.teacher_steps
    real = RealSide.load(config.data, samples, codec)
    method = calibrated(
        config, config.calibrate, real.train, output, samples=min(samples, CLIPS_TO_CALIBRATE), steps=teacher_steps
    )
    if not (output / CLIPS).exists():
        made = _make_clips(config, method, real, output, ranks, jobs, seconds)
        if made is None:
            return None
        made.save(output / CLIPS)
    clips = DemoClips.load(output / CLIPS)
    rows = {name: Encoded(latents, codec.decode(latents)) for name, latents in clips.latents.items()}
    generated = {name: row for name, row in rows.items() if name != REAL}
    with timed(seconds, "measure"):
        findings = measure_rows(
            generated,
            clips.captions,
            real.held_out.captions,
            real.reference(codec),
            real.controls(codec),
            of_shapes=real.shapes is not None,
        )

    videos = {name: row.video for name, row in rows.items()}
    shown = min(CLIPS_IN_ANIMATION, *map(len, videos.values()))
    save_animation(
        {TITLES[name]: video[:shown] for name, video in videos.items()}, clips.captions[:shown], output / ANIMATION
    )
    save_report(
        output / REPORT,
        videos,
        clips.captions,
        findings,
        {name: output / name / METRICS_FILE for name in STUDENTS},
        method.few_steps,
        floor=None if method.motion is None else method.motion.floor,
        real={
            "sample/std": float(real.train.latents.std()),
            "sample/temporal_loss": -math.log(float(temporal_variance(real.train.latents))),
        },
    )
    write_text(output / VERDICT, render_verdict(findings) + "\n" + findings.table)
    return findings


def _make_clips(
    config: DemoConfig,
    method: AVDMethodConfig,
    real: RealSide,
    output: Path,
    ranks: Ranks,
    jobs: int,
    seconds: dict[str, float],
) -> DemoClips | None:
    """Sample from the teacher, train the students and sample from them; None where a signal asked to stop."""
    assert config.teacher is not None  # the method needs one
    teacher = load_transformer(config.teacher)
    embed = HashTextEmbedding(TEXT_LENGTH, teacher.config.text_dim)
    image = image_input(teacher.config) is not None
    memory, held_out = (InMemoryData(clips, embed, image=image) for clips in (real.train, real.held_out))
    shape = real.train.latents.shape[1:]
    samples, teacher_steps = config.evaluation.samples, config.evaluation.teacher_steps
    # Repeated where a folder of videos has fewer.
    asked = [held_out[i % len(held_out)] for i in range(samples)]
    captions, condition = [example.caption for example in asked], condition_of(asked)

    latents = {REAL: real.held_out.latents}
    with timed(seconds, "sample"), ProgressBar("teacher samples", teacher_steps) as bar:
        latents["teacher"] = sample_teacher(
            VelocityModel(teacher),
            condition,
            memory.unconditional(),
            shape,
            _same_noise(samples),
            steps=teacher_steps,
            guidance_scale=method.guidance_scale,
            shift=method.sampling_shift,
            on_step=bar.advance,
        )
    engine = config.model_dump(exclude={"evaluation", "calibrate", "method"})
    shared = method.model_dump(include=set(DMDMethodConfig.model_fields) - {"kind"})
    methods = (DMDMethodConfig(**shared), method)
    runs = {name: TrainConfig(**engine, method=own) for name, own in zip(STUDENTS, methods, strict=True)}
    with timed(seconds, "train"):
        trained = _train_students(runs, output, TrainingData(memory, memory), ranks, jobs)
    if not trained:
        return None
    with timed(seconds, "sample"), torch.no_grad():
        for name in runs:
            student: VelocityPredictor = VelocityModel(load_transformer(str(output / name / "student")))
            latents[name] = few_step_rollout(student, condition, shape, method.few_steps, _same_noise(samples)).x_0
    return DemoClips(captions, latents)


def _train_students(runs: Mapping[str, TrainConfig], output: Path, data: TrainingData, ranks: Ranks, jobs: int) -> bool:
    """Train a student by each run, in folders of their names; False where a signal asked to stop."""
    if jobs == 1:
        with one_thread():
            return all(train(run, output / name, ranks, data=data, description=name) for name, run in runs.items())
    (output / LOGS).mkdir(exist_ok=True)
    logs = {name: output / LOGS / f"{name}.txt" for name in runs}
    say(f"Training {' and '.join(runs)} at the same time, in one thread each. They print to {output / LOGS}.")

    def look() -> None:
        done = {name: _steps_logged(output / name) for name in runs}
        bar.reach(sum(done.values()), done)

    steps = sum(run.max_steps for run in runs.values())
    begun = sum(_steps_logged(output / name) for name in runs)
    with ProgressBar(" and ".join(runs), steps, start=begun) as bar:
        ended = run_processes(
            {logs[name]: partial(_train_student, run, output / name, data, name) for name, run in runs.items()},
            preload="avd_trainer.studies.demo",
            on_look=look,
            until_failure=True,
        )
    if ended.signal is None and ended.failed:
        log = ended.failed[0]
        said = "\n".join(log.read_text().splitlines()[-LINES_OF_FAILURE:])
        raise FailedProcessError(
            f"Training {log.stem} failed. {log} ends with:\n{said}\nMend it and run the same command again: what is "
            "saved stays."
        )
    return ended.signal is None


def _train_student(run: TrainConfig, folder: Path, data: TrainingData, name: str) -> None:
    with join_ranks() as ranks:
        train(run, folder, ranks, data=data, description=name)


def _steps_logged(run: Path) -> int:
    log = run / METRICS_FILE
    return log.read_bytes().count(b"\n") if log.exists() else 0


def _claim(config: DemoConfig, output: Path) -> bool:
    """Take a new folder, or that of the same demo, and say whether it is the latter.

    Raises:
        UserError: If it cannot be written to, or holds something else or a demo of other settings.
    """
    claim_folder(output)
    file = output / CONFIG
    begun = file.exists()
    if begun:
        if differing := differences(read_saved(file), config.model_dump(mode="json")):
            raise UserError(
                f"{output} holds a demo of other settings:\n" + "\n".join(differing) + "\n"
                "Choose a new --output for this one, or run with the settings there to go on."
            )
    elif any(output.iterdir()):
        raise UserError(f"{output} holds something that is no demo. Choose a new --output.")
    else:
        save_config(config, file, DEMO)
    return begun


def _is_finished(output: Path) -> bool:
    return all((output / name).exists() for name in (CLIPS, ANIMATION, REPORT, VERDICT, METRICS))


def _same_noise(samples: int) -> DrawNoise:
    """Noise that is the same for every model and every run."""
    draws = torch.Generator().manual_seed(2026)

    def draw(shape: Sequence[int]) -> Tensor:
        return torch.randn(samples, *shape, generator=draws)

    return draw
