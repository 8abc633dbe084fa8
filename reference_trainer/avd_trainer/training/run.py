"""A run from start to end: its folder, resuming, training, saving, stopping."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from avd_core import __version__
from avd_trainer.config.loading import save_config
from avd_trainer.data.examples import condition_of
from avd_trainer.data.sources import TrainingData, assumed_encoding, load_data
from avd_trainer.models.roles import check_roles
from avd_trainer.runtime.errors import UserError
from avd_trainer.runtime.files import write_json
from avd_trainer.runtime.progress import ProgressBar
from avd_trainer.runtime.ranks import Ranks, naming_lost_ranks
from avd_trainer.runtime.signals import StopSignals
from avd_trainer.runtime.terminal import say
from avd_trainer.training.checkpoint import Checkpoints, list_checkpoints, read_state, read_tensors
from avd_trainer.training.config import TrainConfig
from avd_trainer.training.export import export_product
from avd_trainer.training.folder import CHECKPOINTS, CONFIG, EVALUATION, LOCK, TRAIN, claim_run, local_sources, locked
from avd_trainer.training.metrics_log import MetricsLog
from avd_trainer.training.sample_clips import SampleWriter
from avd_trainer.training.trainer import Trainer

FINDINGS = "findings.json"


def train(
    config: TrainConfig, folder: Path, ranks: Ranks, *, data: TrainingData | None = None, description: str | None = None
) -> bool:
    """Train to the end, from where the run in ``folder`` stands.

    Leaves in ``folder``: ``config.yaml``, ``metrics.jsonl`` (one step a line), ``checkpoints``, at the end what was
    trained under its role's name (``student``: what :func:`export_product` makes of the averaged weights), and, where
    the method has them, ``findings.json`` (what the monitors noticed, and whether they judged samples) and
    ``evaluation.json``. All ranks call.

    Args:
        config: The run.
        folder: Empty, or that of the same run.
        ranks: The processes of the run.
        data: What to train on, where it is in memory already; None loads what ``config`` names.
        description: Of the progress bar; None is the method's name.

    Returns:
        Whether the run is done; False where a signal asked it to stop, with everything saved.

    Raises:
        UserError: For anything that a person can mend; what was saved before stays.
    """
    with naming_lost_ranks(), ExitStack() as stack:
        if ranks.first:
            claim_run(folder, config)
            stack.enter_context(locked(folder))
            save_config(config, folder / CONFIG, TRAIN)
        ranks.barrier()
        if not (folder / LOCK).exists():
            raise UserError(
                f"Rank {ranks.rank} does not see what the first rank wrote to --output {folder}. Choose a folder that "
                "all nodes of this run share."
            )
        torch.manual_seed(config.seed + ranks.rank)
        run = _Run(config, folder, ranks, data)
        stopped = run.go_on(description or config.method.kind)
        if ranks.first and stopped is None:
            run.finish()
        ranks.barrier()
        return stopped is None


class _Run:
    """A trainer and what belongs to it besides steps."""

    def __init__(self, config: TrainConfig, folder: Path, ranks: Ranks, data: TrainingData | None) -> None:
        self.config, self.folder, self.ranks = config, folder, ranks
        method = config.method
        self.architecture = method.transformer_config(config.teacher)
        check_roles(method.roles(config.student_weights), self.architecture or {})
        data = data or load_data(
            config.data,
            config.prompts,
            teacher=config.teacher,
            architecture=self.architecture,
            text=method.needs_text,
            held_out=method.held_out_clips,
        )
        self.encoding = data.encoding or assumed_encoding(config.data, config.teacher)
        self.trainer = Trainer(config, data, ranks)
        self.samples: SampleWriter | None = None
        if self.trainer.method.sampler is not None and ranks.first:
            self.samples = SampleWriter(
                config.samples,
                self.encoding,
                codec=config.codec,
                teacher=config.teacher,
                folder=folder / "samples",
                device=ranks.device,
            )
        options = config.checkpoint
        self.checkpoints = Checkpoints(
            folder / CHECKPOINTS, ranks, keep_latest=options.keep_latest, keep_every=options.keep_every
        )

    def go_on(self, description: str) -> str | None:
        """Train from the newest checkpoint, if there is one; returns the name of the signal that ended it early."""
        # As the first rank sees it: a shared folder may show itself to others with a delay.
        found = list_checkpoints(self.checkpoints.folder)
        step = self.ranks.from_first(found[-1][0] if found else -1)
        if step >= 0:
            self._load(self.checkpoints.path(step))
        trainer, config, ranks = self.trainer, self.config, self.ranks
        if trainer.step >= config.max_steps:
            say(f"{description}: all {trainer.step} steps are done already.")
        elif trainer.step > 0:
            say(f"{description}: going on at step {trainer.step} of {config.max_steps}.")
        log = self._open_log() if ranks.first else None
        bar = ProgressBar(
            description, config.max_steps, start=trainer.step, samples=config.batch_size, quiet=not ranks.first
        )
        try:
            with StopSignals() as signals, bar:
                for metrics in trainer.run():
                    values = log.append(trainer.step, metrics) if log is not None else {}
                    bar.advance(_shown(values))
                    stopping, failed = ranks.any([signals.received is not None, self.checkpoints.failed()])
                    if failed:
                        self.checkpoints.wait()  # raises, on every rank
                    done = trainer.step == config.max_steps
                    if stopping or done or trainer.step % config.checkpoint.every == 0:
                        self._save()
                    if stopping and not done:
                        self.checkpoints.wait()
                        return signals.received or "a signal on another rank"
                    self._write_samples()
                self.checkpoints.wait()
        except BaseException:
            self.checkpoints.settle()
            raise
        finally:
            if log is not None:
                log.close()
                self._write_findings()
        return None

    def finish(self) -> None:
        """On the first rank, when the last step is saved."""
        trainer = self.trainer
        module = export_product(self.folder, self.folder / trainer.main_role)
        if module is not None and trainer.data.held_out is not None:
            errors = trainer.method.evaluate(module.to(self.ranks.device), trainer.data.held_out)
            if errors is not None:
                write_json(self.folder / EVALUATION, errors.model_dump())

    def _save(self) -> None:
        trainer, ranks = self.trainer, self.ranks
        state = {
            "version": __version__,
            "torch": torch.__version__,
            "ranks": ranks.size,
            "device": ranks.device.type,
            "config": self.config.model_dump(mode="json"),
            "local_sources": local_sources(self.config),
            "architecture": self.architecture,
            "latent_shape": trainer.latent_shape,
            "encoding": self.encoding._asdict(),
            "data": trainer.data.fingerprint,
            **trainer.state(),
        }
        self.checkpoints.save(trainer.step, {**trainer.state_tensors(), "rng": _rng_state(ranks.rank)}, state)

    def _load(self, checkpoint: Path) -> None:
        trainer = self.trainer
        state = read_state(checkpoint)
        if state["data"] is not None and trainer.data.fingerprint is not None:
            trainer.data.check_fingerprint(state["data"])
        rank = self.ranks.rank
        rng: dict[str, Tensor] = {}
        if rank < state["ranks"]:
            # A run that moves between CPUs and GPUs takes along what both have.
            rng = {k: value for k, value in _rng_state(rank).items() if state["device"] == "cuda" or "cpu" in k}
        read_tensors(checkpoint, {**trainer.state_tensors(), "rng": rng})
        for name, value in rng.items():
            (torch.set_rng_state if name.endswith("cpu") else torch.cuda.set_rng_state)(value)
        trainer.load_state(state)

    def _open_log(self) -> MetricsLog:
        options = self.config.logging
        return MetricsLog(
            self.folder,
            resume_step=self.trainer.step,
            tensorboard=options.tensorboard,
            wandb=options.wandb,
            run_config=self.config.model_dump(mode="json"),
        )

    def _write_samples(self) -> None:
        """Sample clips, where it is time; every rank takes part in sampling, the first one writes."""
        trainer, options = self.trainer, self.config.samples
        if trainer.method.sampler is None or options.every is None or trainer.step % options.every:
            return
        prompts = trainer.data.prompts
        examples = [prompts[index] for index in range(min(options.count, len(prompts)))]
        with ExitStack() as stack:
            for average in trainer.averages.values():
                stack.enter_context(average.average_parameters())
            latents = trainer.sample(condition_of(examples), "samples")
        if self.samples is not None:
            self.samples.write(trainer.step, latents, [example.caption for example in examples])
        self.ranks.barrier()

    def _write_findings(self) -> None:
        if (monitor := self.trainer.monitor) is not None:
            findings = [asdict(finding) for finding in self.trainer.findings]
            write_json(self.folder / FINDINGS, {"samples_judged": monitor.samples_judged, "findings": findings})


def _shown(values: dict[str, Any]) -> dict[str, float]:
    """The losses among a step's metrics, for the progress bar: short names for what is long."""
    short = {"matching": "dm", "regression": "reg"}
    shown = {}
    for name, value in values.items():
        part, slash, rest = name.partition("/")
        if isinstance(value, float) and (name == "loss" or rest == "loss"):
            shown[short.get(part, part) if slash else name] = value
    return shown


def _rng_state(rank: int) -> dict[str, Tensor]:
    """The generators of this process. Training draws nothing from them; what a library may draw is reproducible too."""
    state = {f"{rank}.cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        state[f"{rank}.cuda"] = torch.cuda.get_rng_state()
    return state
