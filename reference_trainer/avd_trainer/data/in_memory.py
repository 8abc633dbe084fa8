"""Captioned latents in memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.data import Dataset

from avd_trainer.data.examples import Example
from avd_trainer.data.moving_shapes import MovingShapes
from avd_trainer.models.codecs.block_dct import BlockDCTCodec
from avd_trainer.models.codecs.first_frame import with_mask
from avd_trainer.models.text_encoders.hashed import HashTextEmbedding


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

    def with_misfits(self, count: int) -> CaptionedLatents:
        """The same clips and captions, but each of the first ``count`` clips has the next one's caption."""
        captions = list(self.captions)
        return CaptionedLatents(self.latents, captions[1:count] + captions[: min(count, 1)] + captions[count:])


class InMemoryData(Dataset[Example]):
    """Captioned latents as a data set, like :class:`ShardDataset`.

    Args:
        clips: The clips.
        embed: Embeds their captions.
        image: Whether examples come with image latents, for a model of image to video.
    """

    def __init__(self, clips: CaptionedLatents, embed: HashTextEmbedding, *, image: bool = False) -> None:
        self.clips = clips
        self._text = embed(clips.captions)
        self._codec = BlockDCTCodec() if image else None

    def __len__(self) -> int:
        return len(self.clips)

    def __getitem__(self, index: int) -> Example:
        latent = self.clips.latents[index]
        image = None if self._codec is None else with_mask(self._codec.keep_first_frame(latent))
        return Example(latent, self._text[index], self.clips.captions[index], source="", image_latents=image)

    def unconditional(self) -> Tensor:
        """``[L, D]``: the empty caption, which is all zeros."""
        return torch.zeros_like(self._text[0])


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
