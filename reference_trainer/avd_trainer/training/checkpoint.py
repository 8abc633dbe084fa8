"""Complete checkpoints of a run: written while training goes on, visible only when complete.

Tensors go through PyTorch's Distributed Checkpoint, in its safetensors layout: every rank writes its shards, and any
number of ranks reads them. Numbers and strings go into ``state.json``. Nothing is pickled.
"""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
import threading
import warnings
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import async_save

from avd_core import LossMeanCache
from avd_trainer.runtime.errors import UserError
from avd_trainer.runtime.ranks import Ranks, is_lost_rank

logger = logging.getLogger(__name__)

STATE = "state.json"
KEEP = "keep"
_NAME = re.compile(r"step-(\d{8})")
_UNFINISHED = ".part"

Tensors = Mapping[str, Mapping[str, Tensor]]


class Checkpoints:
    """The checkpoints of a run, ``FOLDER/step-00000100`` and so on.

    A checkpoint is written under another name and renamed when every rank has written and flushed its part. So whatever
    has the final name is complete, even if a process is killed at any moment.

    Args:
        folder: Where they are.
        ranks: The processes of the run; all of them call every method in the same order.
        keep_latest: How many to keep. Those that hold a file named ``keep`` are never removed and do not count.
        keep_every: Those of steps that this divides are never removed either.
    """

    def __init__(self, folder: Path, ranks: Ranks, *, keep_latest: int = 2, keep_every: int | None = None) -> None:
        self.folder = folder
        self._ranks = ranks
        self._keep_latest, self._keep_every = keep_latest, keep_every
        self._writing: Future[Any] | None = None
        self._target: Path | None = None
        self._published = threading.Event()
        self._failure: BaseException | None = None
        if ranks.first:
            self._clean_up()

    def save(self, step: int, tensors: Tensors, state: Mapping[str, Any]) -> None:
        """Start to write a checkpoint. Returns when the tensors are copied, so that training may change them.

        Waits for the previous one.

        Raises:
            UserError: If the previous one could not be written.
        """
        self.wait()
        target = self.path(step)
        part = target.with_name(target.name + _UNFINISHED)
        self._target = target
        if self._ranks.first:
            try:
                part.mkdir(parents=True, exist_ok=True)
                _write_flushed(part / STATE, json.dumps(state, indent=1))
            except OSError as error:
                self._fail(error)
        self._check()
        self._published.clear()
        alone = self._ranks.size == 1
        if alone:
            _expect_no_dist()
        writing = async_save(
            _flat(tensors),
            storage_writer=HuggingFaceStorageWriter(str(part), save_distributed=True),
            process_group=self._ranks.background,
            # One rank has nothing to tell others, and gloo's thread would start OpenMP threads of its own to say it:
            # with more of them than cores, OpenMP stops spinning, and every later step takes 1.4 times as long.
            no_dist=alone,
        )
        assert isinstance(writing, Future)
        self._writing = writing
        writing.add_done_callback(lambda done: self._finish(done, part, target))

    def path(self, step: int) -> Path:
        """The folder of a step's checkpoint."""
        return self.folder / f"step-{step:08d}"

    def failed(self) -> bool:
        """Whether the checkpoint in work has failed, as far as this rank knows; :meth:`wait` raises it."""
        return self._failure is not None

    def wait(self) -> None:
        """Wait until the checkpoint that is being written is complete.

        Raises:
            UserError: If it could not be written. Earlier checkpoints are untouched.
        """
        if self._writing is not None:
            self._published.wait()
            self._writing = None
        self._check()

    def settle(self, seconds: float = 600.0) -> None:
        """When a run ends by an error: give the checkpoint in work time to become visible. Not a collective."""
        if self._writing is not None:
            self._published.wait(seconds)

    def _check(self) -> None:
        """Raise on every rank what failed on any."""
        if not self._ranks.any([self._failure is not None])[0]:
            return
        reason = "another rank failed" if self._failure is None else _reason(self._failure)
        latest = latest_checkpoint(self.folder)
        left = f"{latest} is whole" if latest else "There is no earlier one"
        raise UserError(
            f"Checkpoint {self._target} could not be written: {reason}. {left}. Free space or mend the permissions of "
            "that folder, then run the same command again to go on."
        ) from self._failure

    def _finish(self, done: Future[Any], part: Path, target: Path) -> None:
        """Runs in the writing thread."""
        try:
            if (error := done.exception()) is not None:
                raise error
            if self._ranks.first:
                _flush_folder(part)
                os.replace(part, target)
                _flush_folder(self.folder)
                try:
                    self._remove_old()
                except OSError as error:  # the new one is whole all the same
                    logger.warning("An old checkpoint in %s could not be removed: %s.", self.folder, error)
        except BaseException as error:
            self._fail(error)
        finally:
            self._published.set()

    def _fail(self, error: BaseException) -> None:
        self._failure = error
        if self._ranks.first and self._target is not None:
            shutil.rmtree(self._target.with_name(self._target.name + _UNFINISHED), ignore_errors=True)

    def _clean_up(self) -> None:
        """Remove what a killed run left half written."""
        for path in self.folder.glob(f"step-*{_UNFINISHED}"):
            shutil.rmtree(path, ignore_errors=True)

    def _remove_old(self) -> None:
        removable = [
            path
            for step, path in list_checkpoints(self.folder)
            if not (path / KEEP).exists() and not (self._keep_every and step % self._keep_every == 0)
        ]
        for path in removable[: -self._keep_latest]:
            # Out of sight at once: a removal that is cut short must not leave a torn checkpoint.
            hidden = path.with_name(path.name + _UNFINISHED)
            os.replace(path, hidden)
            shutil.rmtree(hidden, ignore_errors=True)


def list_checkpoints(folder: Path) -> list[tuple[int, Path]]:
    """Whole checkpoints with their steps, oldest first."""
    found = [(int(match[1]), path) for path in folder.glob("step-*") if (match := _NAME.fullmatch(path.name))]
    return sorted(found)


def latest_checkpoint(folder: Path) -> Path | None:
    """The newest whole checkpoint, or None."""
    found = list_checkpoints(folder)
    return found[-1][1] if found else None


def read_state(checkpoint: Path) -> dict[str, Any]:
    """The numbers and strings of a checkpoint.

    Raises:
        UserError: If the file is missing or damaged.
    """
    path = checkpoint / STATE
    try:
        state: dict[str, Any] = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise _damaged(checkpoint, path, error) from error
    return state


def read_tensors(checkpoint: Path, tensors: Tensors, *, distributed: bool = True) -> None:
    """Fill tensors from a checkpoint, by their names; each rank reads its part.

    Args:
        checkpoint: The folder.
        tensors: By owner and name. They are changed in place; spreads of losses become 0 if the checkpoint was
            written before they were kept.
        distributed: Whether all ranks call, each with its shards; False for one process alone.

    Raises:
        UserError: If something is missing or damaged.
    """
    files = sorted(checkpoint.glob("*.safetensors"))
    for path in files:
        _check_whole(checkpoint, path)
    flat = _flat(tensors)
    alone = not (distributed and dist.is_initialized() and dist.get_world_size() > 1)
    if alone:
        _expect_no_dist()
    try:
        reader = HuggingFaceStorageReader(str(checkpoint))
        stored = reader.read_metadata().state_dict_metadata
        for name in LossMeanCache.starting_anew(stored) & flat.keys():
            flat.pop(name).zero_()
        _check_complete(flat, stored, files)
        load(flat, storage_reader=reader, no_dist=alone)
    except (OSError, SafetensorError, CheckpointException, RuntimeError, KeyError, ValueError) as error:
        if isinstance(error, torch.OutOfMemoryError) or is_lost_rank(error):
            raise  # no fault of the files
        raise _damaged(checkpoint, checkpoint, error) from error


def _expect_no_dist() -> None:
    """Silence the warning that ranks do not talk; for good, as the writing thread gives it some time later."""
    warnings.filterwarnings("ignore", message="torch.distributed is disabled")


def _flat(tensors: Tensors) -> dict[str, Tensor]:
    return {f"{owner}/{name}": tensor for owner, named in tensors.items() for name, tensor in named.items()}


def _check_whole(checkpoint: Path, path: Path) -> None:
    try:
        with safe_open(path, framework="pt"):
            pass  # compares the header with the file's length
    except (OSError, SafetensorError) as error:
        raise _damaged(checkpoint, path, error) from error


def _check_complete(tensors: Mapping[str, Tensor], stored: Mapping[str, Any], files: Sequence[Path]) -> None:
    """A missing file leaves holes in sharded tensors, which loading would pass over in silence."""
    for name, tensor in tensors.items():
        entry = stored.get(name)
        found = sum(chunk.sizes.numel() for chunk in entry.chunks) if isinstance(entry, TensorStorageMetadata) else 0
        if found != tensor.numel():
            raise ValueError(
                f"its files ({', '.join(file.name for file in files)}) hold {found} of the {tensor.numel()} numbers of "
                f"{name}; another file is missing"
            )


def _damaged(checkpoint: Path, path: Path, error: BaseException) -> UserError:
    return UserError(
        f"Checkpoint {checkpoint} cannot be read: {path}: {_reason(error)}. Move this folder away to go on from the "
        "checkpoint before it."
    )


def _reason(error: BaseException) -> str:
    if isinstance(error, CheckpointException):
        reasons = {str(_root(failure)) or type(failure).__name__ for failure, *_ in error.failures.values()}
        return "; ".join(sorted(reasons))
    return str(error) or type(error).__name__


def _root(error: BaseException) -> BaseException:
    return error if error.__cause__ is None else _root(error.__cause__)


def _write_flushed(path: Path, text: str) -> None:
    with path.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def _flush_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
