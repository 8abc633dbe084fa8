"""The semantic head: its queries have read the caption, and seen the image that a video is to begin with."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from avd_trainer.models.discriminators.attention import Attention, Judge


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
        self.judge = Judge(feature_dim, blocks, width, queries)

    def forward(self, features: Sequence[Tensor], text: Tensor, image: Tensor | None = None) -> Tensor:
        """Logits ``[B]``.

        Args:
            features: ``[B, L, D]`` of each tapped block.
            text: ``[B, L_text, text_dim]``.
            image: ``[B, L_image, image_dim]``; None if there is none.

        Raises:
            ValueError: If there is an image and the head was built without, or the other way round.
        """
        if (image is None) != (self.see_image is None):
            raise ValueError(
                f"expected {'no' if self.see_image is None else 'an'} image, got {'none' if image is None else 'one'}. "
                "Build the head with image_dim where runs have a condition image, and without where they have none."
            )
        tokens = [self.queries.expand(len(text), -1, -1), self.read_text(text)]
        if image is not None and self.see_image is not None:
            tokens.append(self.see_image(image))
        all_BLW = torch.cat(tokens, dim=1)
        asking_BQW = self.attend(all_BLW, all_BLW)[:, : len(self.queries)]
        logits: Tensor = self.judge([asking_BQW] * len(features), features)
        return logits
