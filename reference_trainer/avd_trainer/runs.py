"""A run and its folder: starting or taking it up again, training, saving, stopping."""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from avd_core import __version__
from avd_trainer.checkpoint import Checkpoints, latest_checkpoint, list_checkpoints, read_state, read_tensors
from avd_trainer.config import ConfigError, ShardsData, TrainConfig, save_config
from avd_trainer.data.sources import TrainingData, load_data
from avd_trainer.distributed import Ranks, naming_lost_ranks
from avd_trainer.errors import UserError
from avd_trainer.export import export_student
from avd_trainer.history import MetricsLog
from avd_trainer.models import load_models
from avd_trainer.progress import ProgressBar
from avd_trainer.sampling import SampleWriter
from avd_trainer.signals import StopSignals
from avd_trainer.teacher import TeacherTrainer
from avd_trainer.trainer import Trainer
from avd_trainer.weights import open_weights

SHOWN = {
    "loss": "loss",
    "matching/loss": "dm",
    "regression/loss": "reg",
    "motion/loss": "motion",
    "online/loss": "online",
}

# What may differ between a run and its resumption: nothing that the weights depend on. What shards hold is compared
# file by file, so it does not matter where they lie.
CHANGEABLE = (
    "max_steps", "max_skipped_steps", "micro_batch_size",
    "parallel.", "checkpoint.", "samples.", "logging.", "evaluation.",
)  # fmt: skip
CHANGEABLE_OF_SHARDS = ("data.path", "data.workers", "prompts.path", "prompts.workers")

CHECKPOINTS = "checkpoints"
CONFIG = "config.yaml"
LOCK = ".lock"


def train(
    config: TrainConfig, folder: Path, ranks: Ranks, *, data: TrainingData | None = None, description: str = "train"
) -> bool:
    """Train to the end, from where the run in ``folder`` stands.

    Leaves in ``folder``: ``config.yaml``, ``metrics.jsonl`` (one step a line), ``findings.json`` (what
    :class:`CollapseMonitor` noticed), ``checkpoints``, and at the end ``student`` (what :func:`export_student` makes of
    the averaged weights). All ranks call.

    Args:
        config: The run.
        folder: Empty, or that of the same run.
        ranks: The processes of the run.
        data: What to train on, where it is in memory already; None loads what ``config`` names.
        description: Of the progress bar.

    Returns:
        Whether the run is done; False where a signal asked it to stop, with everything saved.

    Raises:
        UserError: For anything that a person can mend; what was saved before stays.
    """
    with naming_lost_ranks(), ExitStack() as stack:
        if ranks.first:
            claim_run(folder, config)
            stack.enter_context(_locked(folder))
            save_config(config, folder / CONFIG)
        ranks.barrier()
        if not (folder / LOCK).exists():
            raise UserError(
                f"Rank {ranks.rank} does not see what the first rank wrote to --output {folder}. Choose a folder that "
                "all nodes of this run share."
            )
        return _train(config, folder, ranks, data, description)


def claim_run(folder: Path, config: TrainConfig) -> None:
    """Make the output folder of a run, or see that it holds this run; before any work starts.

    Raises:
        UserError: If it cannot be written to, or holds something else, or a run of another configuration.
    """
    claim_folder(folder)
    latest = latest_checkpoint(folder / CHECKPOINTS)
    if latest is not None:
        _check_same_run(config, read_state(latest)["config"], latest)
    # A run that has saved nothing yet has nothing to lose: it starts over, also with other values.
    elif {path.name for path in folder.iterdir()} - {LOCK} and not (folder / CONFIG).exists():
        raise UserError(
            f"{folder} is not empty and holds no run. Choose a new --output, so that nothing saved is overwritten."
        )


def claim_new_folder(folder: Path) -> None:
    """Make an output folder, before any work starts.

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


def _train(config: TrainConfig, folder: Path, ranks: Ranks, data: TrainingData | None, description: str) -> bool:
    torch.manual_seed(config.seed + ranks.rank)
    with open_weights(config.teacher) as weights:
        architecture = weights.config
    data = data or load_data(config, architecture["text_dim"], architecture["in_channels"])
    trainer = Trainer(config, load_models(config, ranks), data, ranks)
    options = config.checkpoint
    checkpoints = Checkpoints(
        folder / CHECKPOINTS, ranks, keep_latest=options.keep_latest, keep_every=options.keep_every
    )
    # As the first rank sees it: a shared folder may show itself to others with a delay.
    found = list_checkpoints(checkpoints.folder)
    step = ranks.from_first(found[-1][0] if found else -1)
    if step >= 0:
        _restore(trainer, checkpoints.path(step))
    about = {
        "version": __version__,
        "torch": torch.__version__,
        "ranks": ranks.size,
        "device": ranks.device.type,
        "config": config.model_dump(mode="json"),
        "architecture": architecture,
        "data": data.fingerprint,
    }
    stopped = _run_steps(trainer, folder, checkpoints, about, description)
    if ranks.first:
        _write_findings(trainer, folder)
        if stopped is None:
            export_student(folder, folder / "student")
    ranks.barrier()
    return stopped is None


def _run_steps(
    trainer: Trainer, folder: Path, checkpoints: Checkpoints, about: Mapping[str, Any], description: str
) -> str | None:
    """Train; returns the name of the signal that ended it early."""
    config, ranks = trainer.config, trainer.ranks
    samples = SampleWriter(config, folder / "samples", ranks.device) if ranks.first else None
    log = _open_log(trainer, folder) if ranks.first else None
    bar = ProgressBar(
        description, config.max_steps, start=trainer.step, samples=config.batch_size, quiet=not ranks.first
    )
    try:
        with StopSignals() as signals, bar:
            for metrics in trainer.run():
                values = log.append(trainer.step, metrics) if log is not None else {}
                bar.advance({short: v for name, short in SHOWN.items() if isinstance(v := values.get(name), float)})
                stopping, failed = ranks.any([signals.received is not None, checkpoints.failed()])
                if failed:
                    checkpoints.wait()  # raises, on every rank
                done = trainer.step == config.max_steps
                if stopping or done or trainer.step % config.checkpoint.every == 0:
                    state = {**about, **trainer.state()}
                    checkpoints.save(trainer.step, {**trainer.state_tensors(), "rng": _rng_state(ranks.rank)}, state)
                if stopping and not done:
                    checkpoints.wait()
                    return signals.received or "a signal on another rank"
                if config.samples.every is not None and trainer.step % config.samples.every == 0:
                    _save_samples(trainer, samples)
            checkpoints.wait()
    except BaseException:
        checkpoints.settle()
        raise
    finally:
        if log is not None:
            log.close()
            _write_findings(trainer, folder)
    return None


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Keep a second process out of a run's folder; the system lets go of the lock however the first one ends."""
    with (folder / LOCK).open("w") as file:
        try:
            # Not flock, which the loader's processes would hold on to for seconds after this one is killed.
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError) as error:
            raise UserError(
                f"Another process is training in {folder}. Wait for it, stop it, or choose another --output."
            ) from error
        except OSError:
            pass  # a file system without locks
        yield


def _open_log(trainer: Trainer, folder: Path) -> MetricsLog:
    options = trainer.config.logging
    return MetricsLog(
        folder,
        resume_step=trainer.step,
        tensorboard=options.tensorboard,
        wandb=options.wandb,
        run_config=trainer.config.model_dump(mode="json"),
    )


def _write_findings(trainer: Trainer, folder: Path) -> None:
    if trainer.monitor is not None:
        write_json(folder / "findings.json", [asdict(finding) for finding in trainer.monitor.findings])


def _save_samples(trainer: Trainer, writer: SampleWriter | None) -> None:
    """Every rank takes part in sampling, the first one writes."""
    prompts = trainer.data.prompts
    rows = [prompts[index] for index in range(min(trainer.config.samples.count, len(prompts)))]
    with trainer.ema.average_parameters():
        latents = trainer.sample(torch.stack([row.text for row in rows]), "samples")
    if writer is not None:
        writer.write(trainer.step, latents, [row.caption for row in rows])
    trainer.ranks.barrier()


def _restore(trainer: Trainer, checkpoint: Path) -> None:
    state = read_state(checkpoint)
    _check_data(trainer.data, state["data"], checkpoint)
    rank = trainer.ranks.rank
    rng: dict[str, Tensor] = {}
    if rank < state["ranks"]:
        # A run that moves between CPUs and GPUs takes along what both have.
        rng = {name: value for name, value in _rng_state(rank).items() if state["device"] == "cuda" or "cpu" in name}
    read_tensors(checkpoint, {**trainer.state_tensors(), "rng": rng})
    for name, value in rng.items():
        (torch.set_rng_state if name.endswith("cpu") else torch.cuda.set_rng_state)(value)
    trainer.load_state(state)


def _rng_state(rank: int) -> dict[str, Tensor]:
    """The generators of this process. Training draws nothing from them; what a library may draw is reproducible too."""
    state = {f"{rank}.cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        state[f"{rank}.cuda"] = torch.cuda.get_rng_state()
    return state


def _check_data(data: TrainingData, saved: Mapping[str, Any] | None, checkpoint: Path) -> None:
    if data.fingerprint is None or saved is None:
        return
    for name, part in (("data", data.clips), ("prompts", data.prompts)):
        part.check_fingerprint(saved[name])


def _check_same_run(config: TrainConfig, saved: Mapping[str, Any], where: Path) -> None:
    now, before = _flatten(config.model_dump(mode="json")), _flatten(saved)
    changeable = CHANGEABLE + (CHANGEABLE_OF_SHARDS if isinstance(config.data, ShardsData) else ())
    fixed = sorted(key for key in now.keys() | before.keys() if not key.startswith(changeable))
    differing = [
        f"  {key}: {before.get(key)!r} there, {now.get(key)!r} now" for key in fixed if now.get(key) != before.get(key)
    ]
    if differing:
        raise ConfigError(
            f"This configuration is not the one that {where} was saved with:\n" + "\n".join(differing) + "\n"
            "Run with the saved values to go on, or choose a new --output to start over."
        )


def _flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            flat |= _flatten(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat
