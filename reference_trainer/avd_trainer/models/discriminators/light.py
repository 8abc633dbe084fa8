"""The light head: a learned query for each tapped block."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from avd_trainer.models.condition import Condition
from avd_trainer.models.discriminators.attention import LogitFromBlocks


class LightHead(nn.Module):
    """One learned query looks into each tapped block; together they give one logit. It knows nothing of the caption.

    After the discriminator of Self-Forcing (Huang et al. 2025, arXiv 2506.08009). What the blocks see is conditioned on
    the caption, so that the logit is too, if only indirectly.

    Args:
        feature_dim: Width D of the blocks.
        blocks: How many are tapped.
        width: Of the queries.
    """

    def __init__(self, feature_dim: int, blocks: int, *, width: int) -> None:
        super().__init__()
        self.queries = nn.Parameter(torch.randn(blocks, 1, width))
        self.judge = LogitFromBlocks(feature_dim, blocks, width, queries=1)

    def forward(self, features: Sequence[Tensor], condition: Condition) -> Tensor:
        """``[B, L, D]`` of each tapped block to logits ``[B]``; of ``condition`` nothing is read."""
        logits: Tensor = self.judge([query.expand(len(condition), -1, -1) for query in self.queries], features)
        return logits
