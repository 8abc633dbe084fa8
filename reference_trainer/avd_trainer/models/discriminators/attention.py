"""What discriminator heads have in common: queries look into the features of each tapped block, and a logit comes out.

Cross-attention, rather than convolutions, after Self-Forcing (Huang et al. 2025, arXiv 2506.08009) and V-PAE (arXiv
2508.21019). Width and number of queries are ours: the papers state none.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

HEAD_DIM = 32
"""Width of an attention head; a head's width is a multiple of it."""


class Attention(nn.Module):
    """Tokens look at other tokens: ``x + attend(x, y)``, then ``x + feed_forward(x)``, with norms before each.

    Args:
        width: Of the tokens that look.
        seen: Width of those that are looked at.
    """

    def __init__(self, width: int, seen: int) -> None:
        super().__init__()
        self.norm_x, self.norm_y, self.norm_out = nn.LayerNorm(width), nn.LayerNorm(seen), nn.LayerNorm(width)
        self.query, self.out = nn.Linear(width, width), nn.Linear(width, width)
        self.key, self.value = nn.Linear(seen, width), nn.Linear(seen, width)
        self.feed_forward = nn.Sequential(nn.Linear(width, 2 * width), nn.SiLU(), nn.Linear(2 * width, width))

    def forward(self, x_BQW: Tensor, y_BLD: Tensor) -> Tensor:
        """``[B, Q, width]`` looking at ``[B, L, seen]``, to ``[B, Q, width]``."""
        x, y = self.norm_x(x_BQW), self.norm_y(y_BLD)
        query, key, value = (
            tokens.unflatten(2, (-1, HEAD_DIM)).transpose(1, 2)
            for tokens in (self.query(x), self.key(y), self.value(y))
        )
        attended = F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)
        x_BQW = x_BQW + self.out(attended)
        looked: Tensor = x_BQW + self.feed_forward(self.norm_out(x_BQW))
        return looked


class LogitFromBlocks(nn.Module):
    """Queries look into each tapped block, and what they saw becomes a logit.

    Args:
        feature_dim: Width D of the blocks.
        blocks: How many are tapped.
        width: Of the queries, a multiple of :data:`HEAD_DIM`.
        queries: How many there are.
    """

    def __init__(self, feature_dim: int, blocks: int, width: int, queries: int) -> None:
        super().__init__()
        self.look = nn.ModuleList(Attention(width, feature_dim) for _ in range(blocks))
        seen = blocks * queries * width
        self.decide = nn.Sequential(nn.LayerNorm(seen), nn.Linear(seen, width), nn.SiLU(), nn.Linear(width, 1))

    def forward(self, queries: Sequence[Tensor], features: Sequence[Tensor]) -> Tensor:
        """``[B, Q, width]`` and ``[B, L, D]`` for each tapped block, to logits ``[B]``."""
        looks = zip(self.look, queries, features, strict=True)
        seen = [look(query_BQW, feature_BLD).flatten(1) for look, query_BQW, feature_BLD in looks]
        logits: Tensor = self.decide(torch.cat(seen, dim=1)).squeeze(1)
        return logits
