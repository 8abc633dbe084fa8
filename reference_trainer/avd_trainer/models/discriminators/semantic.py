"""The semantic head: its queries have read the caption, and seen the image that a video is to begin with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from avd_trainer.models.architecture import image_input
from avd_trainer.models.condition import Condition
from avd_trainer.models.discriminators.attention import Attention, LogitFromBlocks


class SemanticHead(nn.Module):
    """Learned queries read caption and condition image, then look into each tapped block; together they give one logit.

    V-PAE (arXiv 2508.21019): queries, the condition image's tokens and the text's attend to each other, then the
    queries to the blocks. A run without images leaves them out; that is our reading.

    Args:
        feature_dim: Width D of the blocks.
        blocks: How many are tapped.
        text_dim: Width of a caption's tokens.
        image_dim: Width of a condition image's tokens; None if there is no image.
        width: Of the queries.
        queries: How many there are. Ours: the paper states none.
    """

    def __init__(
        self,
        feature_dim: int,
        blocks: int,
        text_dim: int,
        image_dim: int | None = None,
        *,
        width: int,
        queries: int = 4,
    ) -> None:
        super().__init__()
        self.queries = nn.Parameter(torch.randn(queries, width))
        self.read_text = nn.Sequential(nn.LayerNorm(text_dim), nn.Linear(text_dim, width))
        self.see_image = None
        if image_dim is not None:
            self.see_image = nn.Sequential(nn.LayerNorm(image_dim), nn.Linear(image_dim, width))
        self.attend = Attention(width, width)
        self.judge = LogitFromBlocks(feature_dim, blocks, width, queries)

    def forward(self, features: Sequence[Tensor], condition: Condition) -> Tensor:
        """``[B, L, D]`` of each tapped block to logits ``[B]``.

        Raises:
            ValueError: If there is an image and the head was built without, or the other way round.
        """
        image_BLD = image_tokens(condition)
        if (image_BLD is None) != (self.see_image is None):
            found, expected = ("no" if absent else "an" for absent in (image_BLD is None, self.see_image is None))
            raise ValueError(
                f"expected {expected} image, got {found} image. Build the head with image_dim where runs have a "
                "condition image, and without where they have none."
            )
        tokens = [self.queries.expand(len(condition), -1, -1), self.read_text(condition.text)]
        if image_BLD is not None and self.see_image is not None:
            tokens.append(self.see_image(image_BLD))
        all_BLW = torch.cat(tokens, dim=1)
        asking_BQW = self.attend(all_BLW, all_BLW)[:, : len(self.queries)]
        logits: Tensor = self.judge([asking_BQW] * len(features), features)
        return logits


def image_tokens(condition: Condition) -> Tensor | None:
    """A condition image's tokens ``[B, L, D]``: its embedding, or else the latents of the first frame; None without."""
    if condition.image_embedding is not None or condition.image_latents is None:
        return condition.image_embedding
    return condition.image_latents[:, :, 0].flatten(2).transpose(1, 2)


def image_token_dim(architecture: Mapping[str, Any]) -> int | None:
    """Width of :func:`image_tokens`, from the keyword arguments of a run's transformers; None if they see no image."""
    image = image_input(architecture)
    return None if image is None else image.embedding_dim or image.channels
