"""A run and its folder: starting or taking it up again, training, saving, stopping."""

from __future__ import annotations

import fcntl
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from avd_core import __version__
from avd_trainer.config.loading import ConfigError, save_config
from avd_trainer.config.run import InterpolatorConfig, TrainConfig
from avd_trainer.config.sections import ShardsData
from avd_trainer.data.sources import TrainingData, load_data
from avd_trainer.methods.flow_matching import TeacherTrainer
from avd_trainer.methods.frame_interpolation import (
    InterpolatorData,
    InterpolatorTrainer,
    evaluate_interpolator,
    export_interpolator,
    load_interpolator_data,
)
from avd_trainer.models.roles import load_models
from avd_trainer.models.weights import open_weights
from avd_trainer.runtime.errors import UserError
from avd_trainer.runtime.files import claim_folder, write_json
from avd_trainer.runtime.progress import ProgressBar
from avd_trainer.runtime.ranks import Ranks, naming_lost_ranks
from avd_trainer.runtime.signals import StopSignals
from avd_trainer.training.checkpoint import Checkpoints, latest_checkpoint, list_checkpoints, read_state, read_tensors
from avd_trainer.training.export import export_student
from avd_trainer.training.kinds import CONFIG, kind_of_config, kind_of_run
from avd_trainer.training.metrics_log import MetricsLog
from avd_trainer.training.optimizers import Metrics
from avd_trainer.training.sample_clips import SampleWriter
from avd_trainer.training.trainer import Trainer

RunConfig = TrainConfig | InterpolatorConfig

# What may differ between a run and its resumption: nothing that the weights depend on. What shards hold is compared
# file by file, so it does not matter where they lie.
CHANGEABLE = ("max_skipped_steps", "micro_batch_size", "parallel.", "checkpoint.", "logging.")
CHANGEABLE_OF_DISTILLATION = ("max_steps", "samples.", "evaluation.")
CHANGEABLE_OF_SHARDS = ("data.path", "data.workers", "prompts.path", "prompts.workers")

CHECKPOINTS = "checkpoints"
INTERPOLATOR = "interpolator"
EVALUATION = "evaluation.json"
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
    return _run(config, folder, ranks, partial(_Distillation, config, folder, ranks, data), description)


def train_interpolator(
    config: InterpolatorConfig, folder: Path, ranks: Ranks, *, data: InterpolatorData | None = None
) -> bool:
    """Train a frame interpolator to the end, from where the run in ``folder`` stands.

    Leaves in ``folder``: ``config.yaml``, ``metrics.jsonl``, ``checkpoints``, and at the end ``interpolator`` (what
    :meth:`LatentFrameInterpolator.save_pretrained` writes) and ``evaluation.json`` (:class:`InterpolatorErrors`). All
    ranks call.

    Args:
        config: The run.
        folder: Empty, or that of the same run.
        ranks: The processes of the run.
        data: What to train on, where it is in memory already; None loads what ``config`` names.

    Returns:
        Whether the run is done; False where a signal asked it to stop, with everything saved.

    Raises:
        UserError: For anything that a person can mend; what was saved before stays.
    """
    return _run(config, folder, ranks, partial(_Interpolation, config, folder, ranks, data), "interpolator")


def claim_run(folder: Path, config: RunConfig) -> None:
    """Make the output folder of a run, or see that it holds this run; before any work starts.

    Raises:
        UserError: If it cannot be written to, or holds something else, or a run of another command or configuration.
    """
    claim_folder(folder)
    there, this = kind_of_run(folder), kind_of_config(config.model_dump())
    if there not in (None, this):
        raise UserError(f"--output {folder} holds a run of `{there}`, and this is `{this}`. Choose a new --output.")
    latest = latest_checkpoint(folder / CHECKPOINTS)
    if latest is not None:
        _check_same_run(config, read_state(latest)["config"], latest)
    # A run that has saved nothing yet has nothing to lose: it starts over, also with other values.
    elif {path.name for path in folder.iterdir()} - {LOCK} and not (folder / CONFIG).exists():
        raise UserError(
            f"{folder} is not empty and holds no run. Choose a new --output, so that nothing saved is overwritten."
        )


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


class _Training(Protocol):
    """What the loop asks of a trainer."""

    @property
    def config(self) -> RunConfig: ...
    @property
    def ranks(self) -> Ranks: ...
    @property
    def step(self) -> int:
        """Steps done."""

    def run(self) -> Iterator[Metrics]:
        """Train from the current step to the last one; yields each step's metrics, the same on all ranks."""

    def state_tensors(self) -> Mapping[str, Mapping[str, Tensor]]:
        """All tensors of the run by owner and name: the very ones that training changes, to be saved or filled."""

    def state(self) -> dict[str, Any]:
        """The rest of the run's state: numbers, strings and containers of them."""

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Restore what :meth:`state` gave."""


class _Run(Protocol):
    """A training and what belongs to it besides steps: what one kind of run has and another has not."""

    shown: Mapping[str, str]
    """Metrics on the progress bar, with their short names."""

    @property
    def trainer(self) -> _Training: ...

    def about(self) -> dict[str, Any]:
        """What each checkpoint says of the run: ``data``, the fingerprint, and what an export needs."""

    def check_data(self, saved: Any) -> None:
        """Compare the data with the fingerprint in a checkpoint; raises UserError."""

    def after_step(self) -> None:
        """On all ranks, when a step is logged and saved."""

    def write_notes(self) -> None:
        """On the first rank, however the run ends."""

    def finish(self) -> None:
        """On the first rank, when the last step is saved."""


class _Distillation:
    """A student's run: sample clips, the monitor's findings, the student."""

    shown: Mapping[str, str] = {
        "loss": "loss",
        "matching/loss": "dm",
        "regression/loss": "reg",
        "motion/loss": "motion",
        "online/loss": "online",
    }

    def __init__(self, config: TrainConfig, folder: Path, ranks: Ranks, data: TrainingData | None) -> None:
        with open_weights(config.teacher) as weights:
            self._architecture = weights.config
        data = data or load_data(config, self._architecture["text_dim"], self._architecture["in_channels"])
        self.trainer = Trainer(config, load_models(config, ranks), data, ranks)
        self._folder = folder
        self._samples = SampleWriter(config, folder / "samples", ranks.device) if ranks.first else None

    def about(self) -> dict[str, Any]:
        trainer = self.trainer
        return {
            "architecture": self._architecture,
            "latent_shape": trainer.latent_shape,
            "data": trainer.data.fingerprint,
        }

    def check_data(self, saved: Any) -> None:
        data = self.trainer.data
        for name, part in (("data", data.clips), ("prompts", data.prompts)):
            part.check_fingerprint(saved[name])  # type: ignore[attr-defined]

    def after_step(self) -> None:
        """Sample clips, where it is time; every rank takes part in sampling, the first one writes."""
        trainer, options = self.trainer, self.trainer.config.samples
        if options.every is None or trainer.step % options.every:
            return
        prompts = trainer.data.prompts
        rows = [prompts[index] for index in range(min(options.count, len(prompts)))]
        with trainer.ema.average_parameters():
            latents = trainer.sample(torch.stack([row.text for row in rows]), "samples")
        if self._samples is not None:
            self._samples.write(trainer.step, latents, [row.caption for row in rows])
        trainer.ranks.barrier()

    def write_notes(self) -> None:
        if self.trainer.monitor is not None:
            findings = [asdict(finding) for finding in self.trainer.monitor.findings]
            write_json(self._folder / "findings.json", findings)

    def finish(self) -> None:
        export_student(self._folder, self._folder / "student")


class _Interpolation:
    """An interpolator's run: the network and its errors on held-out clips."""

    shown: Mapping[str, str] = {"loss": "loss"}

    def __init__(self, config: InterpolatorConfig, folder: Path, ranks: Ranks, data: InterpolatorData | None) -> None:
        data = data or load_interpolator_data(config)
        self.trainer = InterpolatorTrainer(config, data, ranks)
        self._folder = folder

    def about(self) -> dict[str, Any]:
        shards = self.trainer.data.shards
        return {"channels": self.trainer.channels, "data": None if shards is None else shards.fingerprint()}

    def check_data(self, saved: Any) -> None:
        if self.trainer.data.shards is not None:
            self.trainer.data.shards.check_fingerprint(saved)

    def after_step(self) -> None:
        pass

    def write_notes(self) -> None:
        pass

    def finish(self) -> None:
        trainer = self.trainer
        interpolator = export_interpolator(self._folder, self._folder / INTERPOLATOR)
        errors = evaluate_interpolator(interpolator.to(trainer.ranks.device), trainer.data.held_out)
        write_json(self._folder / EVALUATION, errors.model_dump())


def _run(config: RunConfig, folder: Path, ranks: Ranks, begin: Callable[[], _Run], description: str) -> bool:
    """Claim the folder, begin or take up, train, finish; returns whether the run is done."""
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
        torch.manual_seed(config.seed + ranks.rank)
        run = begin()
        stopped = _run_steps(run, folder, _restore(run, folder), description)
        if ranks.first and stopped is None:
            run.finish()
        ranks.barrier()
        return stopped is None


def _run_steps(run: _Run, folder: Path, checkpoints: Checkpoints, description: str) -> str | None:
    """Train; returns the name of the signal that ended it early."""
    trainer, ranks = run.trainer, run.trainer.ranks
    config = trainer.config
    about = {
        "version": __version__,
        "torch": torch.__version__,
        "ranks": ranks.size,
        "device": ranks.device.type,
        "config": config.model_dump(mode="json"),
        **run.about(),
    }
    log = _open_log(trainer, folder) if ranks.first else None
    bar = ProgressBar(
        description, config.max_steps, start=trainer.step, samples=config.batch_size, quiet=not ranks.first
    )
    try:
        with StopSignals() as signals, bar:
            for metrics in trainer.run():
                values = log.append(trainer.step, metrics) if log is not None else {}
                bar.advance({short: v for name, short in run.shown.items() if isinstance(v := values.get(name), float)})
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
                run.after_step()
            checkpoints.wait()
    except BaseException:
        checkpoints.settle()
        raise
    finally:
        if log is not None:
            log.close()
            run.write_notes()
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


def _open_log(trainer: _Training, folder: Path) -> MetricsLog:
    options = trainer.config.logging
    return MetricsLog(
        folder,
        resume_step=trainer.step,
        tensorboard=options.tensorboard,
        wandb=options.wandb,
        run_config=trainer.config.model_dump(mode="json"),
    )


def _restore(run: _Run, folder: Path) -> Checkpoints:
    """Bring a run to its newest checkpoint, if there is one."""
    trainer, ranks = run.trainer, run.trainer.ranks
    options = trainer.config.checkpoint
    checkpoints = Checkpoints(
        folder / CHECKPOINTS, ranks, keep_latest=options.keep_latest, keep_every=options.keep_every
    )
    # As the first rank sees it: a shared folder may show itself to others with a delay.
    found = list_checkpoints(checkpoints.folder)
    step = ranks.from_first(found[-1][0] if found else -1)
    if step >= 0:
        _load(run, checkpoints.path(step))
    return checkpoints


def _load(run: _Run, checkpoint: Path) -> None:
    trainer = run.trainer
    state = read_state(checkpoint)
    if state["data"] is not None and run.about()["data"] is not None:
        run.check_data(state["data"])
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


def _check_same_run(config: RunConfig, saved: Mapping[str, Any], where: Path) -> None:
    now, before = _flatten(config.model_dump(mode="json")), _flatten(saved)
    changeable = CHANGEABLE + (CHANGEABLE_OF_SHARDS if isinstance(config.data, ShardsData) else ())
    if isinstance(config, TrainConfig):
        changeable += CHANGEABLE_OF_DISTILLATION
    elif config.lr_schedule == "constant":  # otherwise the learning rate depends on it from the first step
        changeable += ("max_steps",)
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
