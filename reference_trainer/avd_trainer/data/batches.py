"""Examples by index, and batches of them, read ahead of need."""

from __future__ import annotations

import signal
from collections.abc import Iterable, Iterator
from typing import NamedTuple, Protocol

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from avd_trainer.data.shards import Example
from avd_trainer.runtime.errors import UserError
from avd_trainer.runtime.signals import SIGNALS


class Examples(Protocol):
    """Examples by index."""

    def __len__(self) -> int:
        """Number of samples."""

    def __getitem__(self, index: int) -> Example:
        """A sample."""


class CaptionedExamples(Examples, Protocol):
    """Captioned samples, with the text embedding of the negative prompt."""

    def unconditional(self) -> Tensor:
        """``[L, D]``."""


class PartOfData(Dataset[Example]):
    """Some examples of a data set.

    Args:
        whole: The data set.
        places: Which.
        text: Whether to read captions' embeddings, which are as large as clips and would be copied along.
    """

    def __init__(self, whole: CaptionedExamples, places: range, *, text: bool = True) -> None:
        self.whole, self._places, self._text = whole, places, text

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, index: int) -> Example:
        example = self.whole[self._places[index]]
        return example if self._text else example._replace(text=torch.empty(0))

    def unconditional(self) -> Tensor:
        """That of the whole."""
        return self.whole.unconditional()


class Batch(NamedTuple):
    """Examples side by side.

    Attributes:
        latents: ``[B, C, F, H, W]`` float32; empty where the data has prompts only.
        text: ``[B, L, D]`` float32.
    """

    latents: Tensor
    text: Tensor

    def to(self, device: torch.device) -> Batch:
        """The same on a device."""
        return Batch(self.latents.to(device), self.text.to(device))


def read_batches(data: Examples, batches: Iterable[list[int]], workers: int) -> Iterator[Batch]:
    """Read the samples of each list of indices, ahead of need where there are workers."""
    loader = DataLoader(
        _Reporting(data),
        batch_sampler=batches,  # type: ignore[arg-type]
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
    samples = [item for item in items if isinstance(item, Example)]
    latents = [sample.latent for sample in samples if sample.latent is not None]
    return Batch(torch.stack(latents) if latents else torch.empty(0), torch.stack([sample.text for sample in samples]))
