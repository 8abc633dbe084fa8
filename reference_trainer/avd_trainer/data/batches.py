"""Batches of examples, read ahead of need."""

from __future__ import annotations

import signal
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from avd_trainer.data.examples import Example, Examples, condition_of
from avd_trainer.models.condition import Condition
from avd_trainer.runtime.errors import UserError
from avd_trainer.runtime.signals import SIGNALS


class Batch(NamedTuple):
    """Examples side by side.

    Attributes:
        latents: ``[B, C, F, H, W]`` float32; empty where the data has prompts only.
        condition: What they show, in float32.
    """

    latents: Tensor
    condition: Condition

    def to(self, device: torch.device) -> Batch:
        """The same on a device."""
        return Batch(self.latents.to(device), self.condition.to(device))


def join(examples: Sequence[Example]) -> Batch:
    """Examples as a batch."""
    latents = [example.latent for example in examples if example.latent is not None]
    return Batch(torch.stack(latents) if latents else torch.empty(0), condition_of(examples))


def read_batches(data: Examples, batches: Iterable[list[int]], workers: int) -> Iterator[Batch]:
    """Read the examples of each list of indices, ahead of need where there are workers."""
    loader = DataLoader(
        _Reporting(data),
        batch_sampler=batches,
        num_workers=workers,
        collate_fn=_collate,
        pin_memory=torch.cuda.is_available(),
        # Its own generator: starting a loader must not move the global one, which checkpoints hold.
        generator=torch.Generator(),
        worker_init_fn=_leave_signals_to_the_trainer,
    )
    for batch in loader:
        if isinstance(batch, UserError):
            raise batch
        yield batch


class _Reporting(Dataset[Example | UserError]):
    """Hands errors over as values: a DataLoader would bury their message in its worker's traceback."""

    def __init__(self, data: Examples) -> None:
        self._data = data

    def __getitem__(self, index: int) -> Example | UserError:
        try:
            return self._data[index]
        except UserError as error:
            return error


def _leave_signals_to_the_trainer(worker: int) -> None:
    # Launchers signal whole process groups; the trainer needs its data until it has saved, and then ends its workers.
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def _collate(items: list[Example | UserError]) -> Batch | UserError:
    errors = [item for item in items if isinstance(item, UserError)]
    if errors:
        return errors[0]
    return join([item for item in items if isinstance(item, Example)])
