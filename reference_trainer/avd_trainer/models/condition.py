"""What a model is told besides the noised sample and its time: a text, and for image to video the first frame."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class Condition:
    """What B samples are conditioned on.

    Text-to-video models have the text alone. In image-to-video models of Wan's layout, ``image_latents`` stand beside
    the noised sample as further input channels, ``cat([x_t, image_latents], dim=1)``. Those that look at the image
    through CLIP as well, Wan2.1's, read ``image_embedding`` by a cross attention of its own.

    Attributes:
        text: ``[B, L, D]``.
        image_latents: ``[B, C', F, H, W]``: mask channels, then the latents of the padded first frame; None without.
        image_embedding: ``[B, T, D_i]`` tokens of the first frame; None without.
    """

    text: Tensor
    image_latents: Tensor | None = None
    image_embedding: Tensor | None = None

    def __len__(self) -> int:
        """B, the number of samples."""
        return len(self.text)

    def __getitem__(self, rows: slice | list[int]) -> Condition:
        """That of some of the samples."""
        return self.map(lambda tensor: tensor[rows])

    def map(self, change: Callable[[Tensor], Tensor]) -> Condition:
        """The same with each tensor changed."""
        return Condition(
            change(self.text),
            *(None if tensor is None else change(tensor) for tensor in (self.image_latents, self.image_embedding)),
        )

    def to(self, device: torch.device) -> Condition:
        """The same on a device."""
        return self.map(lambda tensor: tensor.to(device))

    def pin_memory(self) -> Condition:
        """The same in page-locked memory. A ``DataLoader`` asks for it by this name."""
        return self.map(Tensor.pin_memory)

    def with_text(self, text: Tensor) -> Condition:
        """The same image with another text, ``[B, L, D]`` or one ``[L, D]`` for all, as guidance needs it."""
        return replace(self, text=text.expand_as(self.text))

    @staticmethod
    def cat(parts: Sequence[Condition]) -> Condition:
        """Samples after one another; all have an image, or none."""
        return Condition(
            torch.cat([part.text for part in parts]),
            _cat([part.image_latents for part in parts]),
            _cat([part.image_embedding for part in parts]),
        )

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """Those that are there."""
        return tuple(t for t in (self.text, self.image_latents, self.image_embedding) if t is not None)


def _cat(tensors: Sequence[Tensor | None]) -> Tensor | None:
    there = [tensor for tensor in tensors if tensor is not None]
    assert len(there) in (0, len(tensors)), "either all samples have an image, or none"
    return torch.cat(there) if there else None
