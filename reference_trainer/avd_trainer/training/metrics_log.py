"""The metrics of a run, step by step: a file, TensorBoard, and Weights & Biases where that is asked for."""

from __future__ import annotations

import errno
import json
import math
import os
import uuid
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self

import torch
from torch import Tensor

from avd_trainer.config.sections import WandbConfig
from avd_trainer.runtime.errors import UserError

Value = float | list[float]

METRICS_FILE = "metrics.jsonl"
TENSORBOARD_FOLDER = "tensorboard"
WANDB_ID_FILE = "wandb-id.txt"

# The few step of each sample; splits the regression's other lists.
TIMESTEPS = "regression/timesteps"


class MetricsLog:
    """Writes each step's metrics to ``metrics.jsonl`` and to dashboards; a context manager, for one process of a run.

    Keeps nothing in memory: what was written is read back by :func:`read_series`.

    Args:
        folder: The run's folder, which exists. Gets ``metrics.jsonl``, ``tensorboard`` and, with W&B, ``wandb`` and
            ``wandb-id.txt``.
        resume_step: The step that the run goes on from: what was logged beyond it is dropped, what was logged up to it
            stays. 0 begins anew.
        tensorboard: Whether to write event files.
        wandb: Where to log to Weights & Biases; None is nowhere.
        run_config: The run's configuration, shown by Weights & Biases.

    Raises:
        UserError: If a file cannot be written, or a dashboard's package or account is missing.
    """

    def __init__(
        self,
        folder: Path,
        *,
        resume_step: int = 0,
        tensorboard: bool = True,
        wandb: WandbConfig | None = None,
        run_config: Mapping[str, Any] | None = None,
    ) -> None:
        self._sinks: list[_Sink] = []
        # The file comes last: a dashboard that cannot be reached must not have cost the lines of an earlier run.
        if wandb is not None:
            self._sinks.append(_Wandb(folder, wandb, resume_step, run_config or {}))
        if tensorboard:
            self._sinks.append(_TensorBoard(folder / TENSORBOARD_FOLDER, resume_step))
        self._path = folder / METRICS_FILE
        with _writing(self._path):
            _drop_steps_after(resume_step, self._path)
            # Unbuffered: a line is written at once or fails at once, and closing has nothing left to do.
            self._file = self._path.open("ab", buffering=0)

    def append(self, step: int, metrics: Mapping[str, Tensor | float]) -> dict[str, Value]:
        """Write a step.

        Args:
            step: Number of the step; the first of a run is 1.
            metrics: Numbers and plain tensors (no DTensors), scalar or ``[B]``.

        Returns:
            The metrics as numbers and lists. Waits for the device: all tensors of one device come in one transfer.

        Raises:
            UserError: If a file cannot be written.
        """
        values = _to_host(metrics)
        line = json.dumps({"step": step} | {name: _finite(value) for name, value in values.items()}, allow_nan=False)
        with _writing(self._path):
            _write_all(self._file, line.encode() + b"\n")
        scalars = _scalars(values)
        for sink in self._sinks:
            sink.write(step, scalars)
        return values

    def close(self) -> None:
        """Finish the files."""
        self._file.close()
        for sink in self._sinks:
            sink.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def read_series(path: Path, name: str) -> list[Value]:
    """The values of one metric over steps, from ``metrics.jsonl``.

    Args:
        path: The file.
        name: For example ``regression/loss``.

    Returns:
        One value for each step that has the metric, NaN for those that were not finite; empty if no step has it.
    """
    with path.open("rb") as lines:
        steps = (entry for line in lines if (entry := _parse(line)) is not None)
        return [_number(entry[name]) for entry in steps if name in entry]


class _Sink(Protocol):
    """A dashboard."""

    def write(self, step: int, scalars: Mapping[str, float]) -> None:
        """Log a step."""

    def close(self) -> None:
        """Finish."""


class _TensorBoard:
    def __init__(self, folder: Path, resume_step: int) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise UserError(
                f"TensorBoard's files need the package tensorboard ({error}). Install it with `pip install "
                "tensorboard`, or set logging.tensorboard=false."
            ) from error
        self._folder = folder
        with _writing(folder):
            # Steps that an earlier attempt logged beyond the one that we go on from are hidden.
            self._writer = SummaryWriter(str(folder), purge_step=resume_step + 1)

    def write(self, step: int, scalars: Mapping[str, float]) -> None:
        with _writing(self._folder):
            for name, value in scalars.items():
                self._writer.add_scalar(name, value, step)
            self._writer.flush()  # a killed run has lost nothing up to its checkpoint

    def close(self) -> None:
        with _writing(self._folder):
            self._writer.close()


class _Wandb:
    def __init__(self, folder: Path, config: WandbConfig, resume_step: int, run_config: Mapping[str, Any]) -> None:
        try:
            import wandb
        except ImportError as error:
            raise UserError(
                f"logging.wandb needs the package wandb ({error}). Install it with `pip install wandb`, or remove "
                "logging.wandb from the configuration."
            ) from error
        try:
            self._run = wandb.init(
                project=config.project,
                entity=config.entity,
                name=config.name or folder.name,
                mode=config.mode,
                dir=folder,
                id=_wandb_id(folder / WANDB_ID_FILE, resume_step),
                resume="allow",
                config=dict(run_config),
            )
        except wandb.Error as error:
            raise UserError(
                f"Weights & Biases did not start: {error} Run `wandb login`, set logging.wandb.mode=offline, or remove "
                "logging.wandb from the configuration."
            ) from error
        # W&B's own step never goes back, so a resumed run could not log the steps that a crash had taken from it.
        self._run.define_metric("*", step_metric="step")

    def write(self, step: int, scalars: Mapping[str, float]) -> None:
        self._run.log({"step": step, **scalars})

    def close(self) -> None:
        self._run.finish()


def _wandb_id(path: Path, resume_step: int) -> str:
    """The run's identity: a new one for a new run, and the same for all of its sessions."""
    with _writing(path):
        if resume_step == 0 or not path.exists():
            path.write_text(uuid.uuid4().hex[:8])
        return path.read_text()


def _to_host(metrics: Mapping[str, Tensor | float]) -> dict[str, Value]:
    """Numbers and lists; one transfer for each device that holds some of them, which is one in practice."""
    values: dict[str, Value] = {}
    tensors_on: dict[torch.device, dict[str, Tensor]] = defaultdict(dict)
    for name, value in metrics.items():
        if isinstance(value, Tensor):
            tensors_on[value.device][name] = value.detach()
        else:
            values[name] = value
    for tensors in tensors_on.values():
        numbers = torch.cat([tensor.reshape(-1) for tensor in tensors.values()]).tolist()
        for name, tensor in tensors.items():
            own, numbers = numbers[: tensor.numel()], numbers[tensor.numel() :]
            values[name] = own if tensor.ndim else own[0]
    return {name: values[name] for name in metrics}


def _scalars(values: Mapping[str, Value]) -> dict[str, float]:
    """What a dashboard draws: numbers as they are, lists by their mean, and the regression's for each few step."""
    scalars: dict[str, float] = {}
    timesteps = values.get(TIMESTEPS)
    for name, value in values.items():
        if not isinstance(value, list):
            scalars[name] = value
        elif value and name != TIMESTEPS:
            scalars[name] = _mean(value)
            if isinstance(timesteps, list) and name.startswith("regression/") and len(value) == len(timesteps):
                for timestep in sorted(set(timesteps)):
                    own = [number for t, number in zip(timesteps, value, strict=True) if t == timestep]
                    scalars[f"{name}/t{timestep:g}"] = _mean(own)
    return scalars


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _drop_steps_after(last: int, path: Path) -> None:
    """Leave the lines of steps up to ``last``; whatever is no whole line, a killed run's last one say, goes too."""
    part = path.with_name(path.name + ".part")
    with part.open("wb") as kept:
        if path.exists():
            with path.open("rb") as lines:
                for line in lines:
                    entry = _parse(line)
                    if entry is not None and entry["step"] <= last:
                        kept.write(line.rstrip(b"\n") + b"\n")
    os.replace(part, path)


def _parse(line: bytes) -> dict[str, Any] | None:
    """The step on a line, or None if it is torn."""
    try:
        entry = json.loads(line)
    except ValueError:
        return None
    return entry if isinstance(entry, dict) and isinstance(entry.get("step"), int) else None


def _finite(value: Value) -> Value | list[float | None] | None:
    """JSON has no NaN and no infinity: null stands for both."""
    if isinstance(value, list):
        return [number if math.isfinite(number) else None for number in value]
    return value if math.isfinite(value) else None


def _number(value: Value | list[float | None] | None) -> Value:
    """The inverse of :func:`_finite`, as far as there is one."""
    if isinstance(value, list):
        return [math.nan if number is None else number for number in value]
    return math.nan if value is None else value


def _write_all(file: Any, data: bytes) -> None:
    """A disk that fills up takes a part without complaint."""
    if file.write(data) != len(data):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(
            f"{path} cannot be written: {error.strerror or error}. Free some space or mend its permissions, then run "
            "the same command again."
        ) from error
