"""``avd train`` and its kin."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.console import Console

from avd_trainer.commands.options import (
    Data,
    MaxSteps,
    Output,
    Overrides,
    Preset,
    Prompts,
    Videos,
    clips_of,
    overrides_of,
    train_config,
)
from avd_trainer.config.loading import load_config
from avd_trainer.config.run import InterpolatorConfig, TeacherConfig
from avd_trainer.runtime.terminal import readable_errors, say

if TYPE_CHECKING:
    pass


def train(
    preset: Preset,
    output: Output,
    videos: Videos = None,
    data: Data = None,
    prompts: Prompts = None,
    max_steps: MaxSteps = None,
    set_: Overrides = None,
) -> None:
    """Distil a student, or take up again what the same command began in --output.

    Leaves config.yaml, metrics.jsonl, findings.json, checkpoints and the student's averaged weights. On several GPUs:
    torchrun --nproc-per-node N -m avd_trainer train ...
    """
    with readable_errors():
        config = train_config(preset, videos, data, prompts, max_steps, set_)
        from avd_trainer.runtime.ranks import join_ranks
        from avd_trainer.training.run import train as run

        options = config.parallel
        with join_ranks(options.replicate, options.timeout_minutes) as ranks:
            done = run(config, output, ranks)
        if done:
            say(f"The student is in {output / 'student'}.")
        else:
            say(f"Stopped on request, saved in {output / 'checkpoints'}. Run the same command again to go on.")


def train_interpolator(
    preset: Preset,
    output: Output,
    videos: Videos = None,
    data: Data = None,
    max_steps: MaxSteps = None,
    set_: Overrides = None,
) -> None:
    """Train the network that inserts latent frames, or take up again what the same command began in --output.

    Leaves config.yaml, metrics.jsonl, checkpoints, the network in interpolator and evaluation.json: its errors on
    held-out clips beside those of linear interpolation and of repeating frames.
    """
    with readable_errors():
        config = load_config(InterpolatorConfig, preset, overrides_of(set_, max_steps), clips_of(videos, data))
        from avd_trainer.methods.frame_interpolation import InterpolatorErrors, render
        from avd_trainer.runtime.ranks import join_ranks
        from avd_trainer.training.run import train_interpolator as run

        with join_ranks(timeout_minutes=config.parallel.timeout_minutes) as ranks:
            done = run(config, output, ranks)
            if done and ranks.first:
                errors = InterpolatorErrors.model_validate_json((output / "evaluation.json").read_text())
                Console().print(render(errors))
        if done:
            say(f"The interpolator is in {output / 'interpolator'}.")
        else:
            say(f"Stopped on request, saved in {output / 'checkpoints'}. Run the same command again to go on.")


def train_teacher(preset: Preset, output: Output, max_steps: MaxSteps = None, set_: Overrides = None) -> None:
    """Train the small teacher that the tiny preset distils, from random weights."""
    with readable_errors():
        config = load_config(TeacherConfig, preset, overrides_of(set_, max_steps))
        from avd_trainer.methods.flow_matching import TeacherTrainer
        from avd_trainer.runtime.files import claim_new_folder
        from avd_trainer.training.run import train_teacher

        claim_new_folder(output)
        train_teacher(TeacherTrainer(config), output)
        say(f"The teacher is in {output}.")
