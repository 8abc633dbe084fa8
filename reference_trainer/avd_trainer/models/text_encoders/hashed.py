"""A text embedding without weights: each word is a fixed random vector drawn from its hash."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence

import torch
from torch import Tensor

# Tokens per caption of the tiny models.
TEXT_LENGTH = 24


class HashTextEmbedding:
    """Maps captions to token embeddings by hashing words.

    Any word of any language gets a unit-variance vector that depends on its spelling alone, so a model can learn the
    words of its data and no vocabulary has to be shipped. A sinusoid marks the position, since the transformer's
    cross attention has no positions of its own. The empty caption is all zeros: the unconditional input of
    classifier-free guidance.

    Args:
        length: Tokens per caption; longer captions are cut, shorter ones padded with zeros.
        dim: Width of a token.
    """

    def __init__(self, length: int, dim: int) -> None:
        if length < 1 or dim < 2:
            raise ValueError(f"HashTextEmbedding needs length >= 1 and dim >= 2, got {length} and {dim}.")
        self.length, self.dim = length, dim
        self._words: dict[str, Tensor] = {}

    def __call__(self, captions: Sequence[str]) -> Tensor:
        """Embed captions.

        Returns:
            ``[len(captions), length, dim]`` float32.
        """
        embedding = torch.zeros(len(captions), self.length, self.dim)
        for row, caption in zip(embedding, captions, strict=True):
            words = re.findall(r"\w+", caption.lower())[: self.length]
            for position, word in enumerate(words):
                row[position] = self._word(word) + _position(position, self.dim)
        return embedding

    def _word(self, word: str) -> Tensor:
        if word not in self._words:
            seed = int.from_bytes(hashlib.blake2b(word.encode(), digest_size=7).digest(), "big")
            self._words[word] = torch.randn(self.dim, generator=torch.Generator().manual_seed(seed))
        return self._words[word]


def _position(position: int, dim: int) -> Tensor:
    angle = position / 100 ** (torch.arange(dim // 2) / max(1, dim // 2))
    return torch.cat([angle.sin(), angle.cos(), torch.zeros(dim % 2)])
