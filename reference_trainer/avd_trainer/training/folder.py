"""The folder of a run: which run it holds, and whether that may be continued."""

from __future__ import annotations

import fcntl
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from avd_trainer.config.differences import differences
from avd_trainer.config.loading import COMMAND, ConfigError, validate
from avd_trainer.config.sections import ShardsData
from avd_trainer.models.roles import Built, Trained
from avd_trainer.runtime.errors import UserError
from avd_trainer.runtime.files import claim_folder
from avd_trainer.training.checkpoint import latest_checkpoint, read_state
from avd_trainer.training.config import TrainConfig

CONFIG = "config.yaml"
CHECKPOINTS = "checkpoints"
EVALUATION = "evaluation.json"
LOCK = ".lock"
TRAIN = "avd train"
"""The command that writes runs."""

# What may differ between a run and its resumption: nothing that the weights depend on. What shards hold is compared
# file by file, so it does not matter where they lie.
CHANGEABLE = (
    "max_skipped_steps",
    "monitor_grace",
    "monitor_patience",
    "micro_batch_size",
    "parallel.",
    "checkpoint.",
    "logging.",
    "samples.",
    "method.sampling_shift",
)
CHANGEABLE_OF_SHARDS = ("data.path", "data.workers", "prompts.path", "prompts.workers")


class FolderInUseError(UserError):
    """Another process works in a folder."""


def method_of_run(folder: Path) -> str | None:
    """The method of the run in a folder, as its ``config.yaml`` says; None if it holds none."""
    try:
        values = OmegaConf.to_container(OmegaConf.create((folder / CONFIG).read_text()))
    except (OSError, ValueError, OmegaConfBaseException, YAMLError):
        return None
    if not isinstance(values, dict) or values.get(COMMAND) != TRAIN:
        return None
    method = values.get("method")
    return str(method.get("kind")) if isinstance(method, dict) else None


def local_sources(config: TrainConfig) -> dict[str, str]:
    """By key, the whole paths of a run's models that are files or folders here.

    A run keeps what was asked for; from another folder ``my/teacher`` would look like a name on the hub.
    """
    sources = {"teacher": config.teacher, "student_weights": config.student_weights, "codec": config.codec}
    return {
        key: str(Path(source).resolve())
        for key, source in sources.items()
        if source is not None and Path(source).exists()
    }


def claim_run(folder: Path, config: TrainConfig) -> None:
    """Make the output folder of a run, or check that it holds this run, before any work starts.

    Raises:
        UserError: If it cannot be written to, or holds something else, or a run of another method or configuration.
    """
    claim_folder(folder)
    check_run(folder, config)


def check_run(folder: Path, config: TrainConfig) -> int | None:
    """The step that a run would go on at in a folder, None where it would start anew; writes nothing.

    Raises:
        UserError: If the folder holds something else, or a run of another method or configuration.
    """
    if not folder.exists():
        return None
    there = method_of_run(folder)
    if there not in (None, config.method.kind):
        raise UserError(
            f"--output {folder} holds a run of method {there}, and this is {config.method.kind}. Choose a new --output."
        )
    latest = latest_checkpoint(folder / CHECKPOINTS)
    if latest is not None:
        state = read_state(latest)
        _check_same_run(config, state["config"], latest)
        if config.max_steps < state["step"]:
            raise ConfigError(
                f"max_steps is {config.max_steps}, and the run in {folder} is at step {state['step']}. Choose at least "
                "that, or a new --output."
            )
        return int(state["step"])
    # A run that has saved nothing yet has nothing to lose: it starts over, also with other values.
    if {path.name for path in folder.iterdir()} - {LOCK} and there is None:
        raise UserError(
            f"{folder} is not empty and holds no run. Choose a new --output, so that nothing saved is overwritten."
        )
    return None


def is_beginning(shorter: TrainConfig, longer: TrainConfig) -> bool:
    """Whether a run is the beginning of another one, bit for bit: both differ in their number of steps alone.

    So the longer one may go on from the last checkpoint of the shorter one, and what it leaves is what it would have
    left if it had begun itself. Two runs of one length are the beginning of each other.
    """

    def rest(config: TrainConfig) -> TrainConfig:
        monitors = {"monitor_grace": longer.grace, "monitor_patience": longer.patience}
        return config.model_copy(update={"max_steps": longer.max_steps, **monitors})

    return (
        shorter.max_steps <= longer.max_steps
        and _has_free_length(longer)
        and shorter.grace == longer.grace
        and (shorter.patience == longer.patience or "discriminator" not in longer.method.roles())
        and rest(shorter) == rest(longer)
    )


@contextmanager
def locked(folder: Path, *, wait: bool = False) -> Iterator[None]:
    """Keep a second process out of a folder; the system lets go of the lock however the first one ends.

    Args:
        folder: Exists. A process that locks it a second time is let in, and so ends the first lock.
        wait: Until the other process is out, rather than to raise.

    Raises:
        FolderInUseError: If another process is in it.
    """
    with (folder / LOCK).open("w") as file:
        try:
            # Not flock, which the loader's processes would hold on to for seconds after this one is killed.
            fcntl.lockf(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except (BlockingIOError, PermissionError) as error:
            raise FolderInUseError(
                f"Another process is working in {folder}. Wait for it, stop it, or choose another --output."
            ) from error
        except OSError:
            pass  # a file system without locks
        yield


def _check_same_run(config: TrainConfig, saved: Mapping[str, Any], where: Path) -> None:
    changeable = CHANGEABLE + (CHANGEABLE_OF_SHARDS if isinstance(config.data, ShardsData) else ())
    if _has_free_length(config):
        changeable += ("max_steps",)
    # Options that came to be since the run was started count as at their defaults, which change nothing.
    completed = validate(TrainConfig, saved, str(where)).model_dump(mode="json")
    if differing := differences(completed, config.model_dump(mode="json"), changeable):
        raise ConfigError(
            f"This configuration is not the one that {where} was saved with:\n" + "\n".join(differing) + "\n"
            "Run with the saved values to go on, or choose a new --output to start over."
        )


def _has_free_length(config: TrainConfig) -> bool:
    """Whether no step of a run depends on how many there are; otherwise its learning rates do, from the first on."""
    trained = [role for role in config.method.roles().values() if isinstance(role, Trained | Built)]
    return all(role.optimizer.schedule == "constant" for role in trained)
