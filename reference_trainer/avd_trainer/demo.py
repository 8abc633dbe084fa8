"""The demo: two students of one teacher, with and without our losses, and what became of them."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from avd_core import AVDConfig
from avd_trainer.config import TrainConfig
from avd_trainer.data.codec import BlockDCTCodec
from avd_trainer.data.sources import load_clips
from avd_trainer.errors import UserError
from avd_trainer.evaluation import ClipMetrics, evaluate
from avd_trainer.models import build_text_embedding, load_transformer
from avd_trainer.progress import ProgressBar
from avd_trainer.report import TITLES, save_gif, save_report
from avd_trainer.rollout import DrawNoise, few_step_rollout, sample_teacher
from avd_trainer.runs import claim_folder, train, write_json
from avd_trainer.trainer import Trainer


def run_demo(config: TrainConfig, output: Path) -> dict[str, ClipMetrics]:
    """Distil twice from one teacher, seed and number of updates: by distribution matching alone, and with AVD.

    Args:
        config: The AVD run; the other differs in its objective alone.
        output: Empty, or left by an earlier demo. Gets ``report.png``, ``real.gif``, ``teacher.gif``, ``dmd.gif``,
            ``avd.gif``, ``metrics.json``, and a folder for each of the two runs.

    Returns:
        The metrics of ``real``, ``teacher``, ``dmd`` and ``avd``.
    """
    _claim(output)
    codec = BlockDCTCodec()
    teacher = load_transformer(config.teacher)
    embed = build_text_embedding(teacher)
    clips, held_out = load_clips(config.data, codec)
    shape = clips.latents.shape[1:]
    samples, teacher_steps = config.evaluation.samples, config.evaluation.teacher_steps
    # The real clips that are shown, and their captions for the others; repeated where a folder of videos has fewer.
    captions = [clips.captions[i % len(clips)] for i in range(samples)]
    text = embed(captions)

    latents = {"real": clips.latents[:samples]}
    with ProgressBar("teacher samples", teacher_steps) as bar:
        latents["teacher"] = sample_teacher(
            teacher,
            text,
            shape,
            _same_noise(),
            steps=teacher_steps,
            guidance_scale=config.guidance_scale,
            on_step=bar.advance,
        )
    histories = {}
    without = config.model_copy(
        update={"objective": AVDConfig(timesteps=config.objective.timesteps, regression=None, motion=None)}
    )
    for name, run in {"dmd": without, "avd": config}.items():
        trainer = Trainer(run, teacher, clips, embed)
        claim_folder(output / name)
        histories[name] = train(trainer, output / name, description=name)
        with torch.no_grad(), trainer.ema.average_parameters():
            latents[name] = few_step_rollout(trainer.student, text, shape, trainer.few_steps, _same_noise()).x_0

    videos = {name: codec.decode(x) for name, x in latents.items()}
    metrics = {name: evaluate(latents[name], videos[name], held_out.latents) for name in latents}
    motion = config.objective.motion
    save_report(
        output / "report.png",
        videos,
        metrics,
        histories,
        captions,
        config.objective.timesteps,
        floor=None if motion is None else motion.floor,
        latent_std=float(clips.latents.std()),
    )
    for name, video in videos.items():
        save_gif(output / f"{name}.gif", video)
    write_json(output / "metrics.json", {name: value.model_dump() for name, value in metrics.items()})
    return metrics


def _claim(output: Path) -> None:
    """Take an empty folder, or that of an earlier demo, whose pictures and numbers are removed."""
    claim_folder(output)
    if any(output.iterdir()) and not (output / "dmd" / "config.yaml").exists():
        raise UserError(f"{output} holds something that is no earlier demo. Choose a new --output.")
    for path in (output / "report.png", output / "metrics.json", *(output / f"{name}.gif" for name in TITLES)):
        path.unlink(missing_ok=True)


def _same_noise() -> DrawNoise:
    """Noise that is the same for every model and every run."""
    draws = torch.Generator().manual_seed(2026)

    def draw(shape: torch.Size) -> Tensor:
        return torch.randn(shape, generator=draws)

    return draw
