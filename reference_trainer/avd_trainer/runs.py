"""A run and its folder: training with progress, saving what came out."""

from __future__ import annotations

import json
import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from avd_trainer.config import save_config
from avd_trainer.errors import UserError
from avd_trainer.history import History
from avd_trainer.progress import ProgressBar
from avd_trainer.teacher import TeacherTrainer
from avd_trainer.trainer import Trainer

SHOWN = {
    "loss": "loss",
    "matching/loss": "dm",
    "regression/loss": "reg",
    "motion/loss": "motion",
    "online/loss": "online",
}


def claim_new_folder(folder: Path) -> None:
    """Make the output folder of a run, before any work starts.

    Raises:
        UserError: If it holds something already, or cannot be written to.
    """
    claim_folder(folder)
    if any(folder.iterdir()):
        raise UserError(f"{folder} is not empty. Choose a new --output, so that nothing saved is overwritten.")


def claim_folder(folder: Path) -> None:
    """Make a folder and see that it can be written to.

    Raises:
        UserError: If it cannot.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / ".writable"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise UserError(f"--output {folder} cannot be written to: {error.strerror}. Choose another folder.") from error


def train(trainer: Trainer, folder: Path, description: str = "train") -> History:
    """Train to the end.

    Leaves in ``folder``: ``config.yaml``, ``metrics.jsonl`` (one step a line), ``findings.json`` (what
    :class:`CollapseMonitor` noticed) and ``student`` (averaged weights, a diffusers folder).
    """
    save_config(trainer.config, folder / "config.yaml")
    history = History(folder / "metrics.jsonl")
    try:
        with ProgressBar(description, trainer.config.max_steps) as bar:
            for metrics in trainer.run():
                values = history.append(metrics)
                bar.advance({short: v for name, short in SHOWN.items() if isinstance(v := values.get(name), float)})
    finally:
        history.close()
        write_json(folder / "findings.json", [asdict(finding) for finding in trainer.monitor.findings])
    with trainer.ema.average_parameters():
        trainer.student.save_pretrained(folder / "student", safe_serialization=True)
    return history


def train_teacher(trainer: TeacherTrainer, folder: Path) -> None:
    """Train a teacher to the end; leaves ``training.yaml`` and the averaged weights in bfloat16 in ``folder``."""
    save_config(trainer.config, folder / "training.yaml")
    with ProgressBar("teacher", trainer.config.max_steps) as bar:
        for loss in trainer.run():
            bar.advance({"loss": loss})
    with trainer.ema.average_parameters(), torch.no_grad():
        for parameter in trainer.model.parameters():
            parameter.data = parameter.data.bfloat16()  # half the download
        trainer.model.save_pretrained(folder, safe_serialization=True)


def write_json(path: Path, value: Any) -> None:
    """Write a file that is either the old or the new one, never half."""
    part = path.with_name(path.name + ".part")
    part.write_text(json.dumps(value, indent=2) + "\n")
    os.replace(part, path)
