"""Captioned latents in memory, and the order in which training reads them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from avd_trainer.data.codec import BlockDCTCodec
from avd_trainer.data.shapes import MovingShapes


@dataclass(frozen=True)
class CaptionedLatents:
    """Clips as the trainer sees them.

    Attributes:
        latents: ``[N, C, F, H, W]`` float32.
        captions: ``N`` captions, in the same order.
    """

    latents: Tensor
    captions: Sequence[str]

    def __post_init__(self) -> None:
        if self.latents.ndim != 5 or len(self.latents) != len(self.captions) or len(self.captions) == 0:
            raise ValueError(
                f"CaptionedLatents needs latents [N, C, F, H, W] and N captions with N >= 1, "
                f"got {list(self.latents.shape)} and {len(self.captions)} captions."
            )

    def __len__(self) -> int:
        return len(self.captions)


def encode_shapes(
    shapes: MovingShapes, codec: BlockDCTCodec, on_clip: Callable[[], None] = lambda: None
) -> CaptionedLatents:
    """Render and encode every clip of ``shapes``; ``on_clip`` is called after each."""
    latents, captions = [], []
    for index in range(len(shapes)):
        clip = shapes[index]
        latents.append(codec.encode(clip.video.unsqueeze(0)))
        captions.append(clip.caption)
        on_clip()
    return CaptionedLatents(torch.cat(latents), captions)


def shuffled_indices(length: int, batch_size: int, seed: int) -> Iterator[Tensor]:
    """Endless batches of indices ``[batch_size]``; each epoch is a permutation keyed by ``(seed, epoch)``.

    A batch may span two epochs, so no sample is dropped when the length is no multiple of the batch size.
    """
    epoch, pool = 0, torch.empty(0, dtype=torch.long)
    while True:
        while len(pool) < batch_size:
            generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
            pool = torch.cat([pool, torch.randperm(length, generator=generator)])
            epoch += 1
        yield pool[:batch_size]
        pool = pool[batch_size:]
