"""A run and its folder: training with progress, saving what came out."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from avd_trainer.config import save_config
from avd_trainer.errors import UserError
from avd_trainer.history import History
from avd_trainer.progress import ProgressBar
from avd_trainer.trainer import Trainer

SHOWN = {
    "loss": "loss",
    "matching/loss": "dm",
    "regression/loss": "reg",
    "motion/loss": "motion",
    "online/loss": "online",
}


def claim_folder(folder: Path, *, must_be_new: bool) -> Path:
    """Make the output folder, before any work starts.

    Raises:
        UserError: If it cannot be written to, or must be new and holds something.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if must_be_new and any(folder.iterdir()):
            raise UserError(f"{folder} is not empty. Choose a new --output, so that nothing saved is overwritten.")
        probe = folder / ".writable"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise UserError(f"--output {folder} cannot be written to: {error.strerror}. Choose another folder.") from error
    return folder


def train(trainer: Trainer, folder: Path, description: str = "train") -> History:
    """Train to the end; leaves ``config.yaml``, ``metrics.jsonl`` and the student's averaged weights in ``folder``."""
    save_config(trainer.config, folder / "config.yaml")
    history = History(folder / "metrics.jsonl")
    try:
        with ProgressBar(description, trainer.config.max_steps) as bar:
            for metrics in trainer.run():
                values = history.append(metrics)
                bar.advance({short: v for name, short in SHOWN.items() if isinstance(v := values.get(name), float)})
    finally:
        history.close()
    with trainer.ema.average_parameters():
        trainer.student.save_pretrained(folder / "student", safe_serialization=True)
    return history


def write_json(path: Path, value: Any) -> None:
    """Write a file that is either the old or the new one, never half."""
    part = path.with_name(path.name + ".part")
    part.write_text(json.dumps(value, indent=2) + "\n")
    os.replace(part, path)
