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

    Attributes:
        latent: ``[C, F, H, W]`` float32, or None in a data set of prompts.
        text: ``[L, D]`` float32, zeros behind the caption's tokens.
        caption: What the embedding says.
        source: Where the row came from, for example a file's name.
    """

    latent: Tensor | None
    text: Tensor
    caption: str
    source: str


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
    return Condition(torch.stack([example.text for example in examples]))


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
