"""What training reads: rows of latent, text embedding and caption."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor
from torch.utils.data import Dataset

from avd_trainer.models.condition import Condition


class Example(NamedTuple):
    """One row of a data set.

    What a clip begins with is there where image to video was asked for.

    Attributes:
        latent: ``[C, F, H, W]`` float32, or None in a data set of prompts.
        text: ``[L, D]`` float32, zeros behind the caption's tokens.
        caption: What the embedding says.
        source: Where the row came from, for example a file's name.
        image_latents: ``[C', F, H, W]`` float32 of the first frame, as in :class:`Condition`.
        image_embedding: ``[T, D_i]`` float32 of the first frame.
    """

    latent: Tensor | None
    text: Tensor
    caption: str
    source: str
    image_latents: Tensor | None = None
    image_embedding: Tensor | None = None


class Examples(Protocol):
    """Examples by index."""

    def __len__(self) -> int:
        """Number of examples."""

    def __getitem__(self, index: int) -> Example:
        """The example at ``index``, from 0."""


class CaptionedExamples(Examples, Protocol):
    """Examples with the text embedding of the negative prompt."""

    def unconditional(self) -> Tensor:
        """``[L, D]`` float32."""


def condition_of(examples: Sequence[Example]) -> Condition:
    """What examples show, side by side."""
    return Condition(
        torch.stack([example.text for example in examples]),
        _stack([example.image_latents for example in examples]),
        _stack([example.image_embedding for example in examples]),
    )


def _stack(tensors: Sequence[Tensor | None]) -> Tensor | None:
    there = [tensor for tensor in tensors if tensor is not None]
    assert len(there) in (0, len(tensors)), "either all examples have an image, or none"
    return torch.stack(there) if there else None


class PartOfData(Dataset[Example]):
    """Some examples of a data set.

    Args:
        whole: The data set.
        places: Which examples.
        text: Whether to read the embeddings of captions, which are as large as clips.
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
