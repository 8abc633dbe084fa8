"""What training reads: rows of latent, text embedding and caption."""

from __future__ import annotations

from typing import NamedTuple, Protocol

from torch import Tensor


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
