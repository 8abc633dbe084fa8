"""A discriminator: a transformer whose blocks see a noised video, and a head that judges by what they see."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from avd_trainer.config.sections import OptimizerConfig, Section
from avd_trainer.models.condition import Condition
from avd_trainer.models.discriminators.attention import HEAD_DIM
from avd_trainer.models.discriminators.light import LightHead
from avd_trainer.models.discriminators.semantic import SemanticHead, image_token_dim
from avd_trainer.models.features import block_outputs, check_blocks, tapped_by_default
from avd_trainer.models.roles import Model
from avd_trainer.models.transformer import VelocityModel


class HeadConfig(Section):
    """A discriminator's head."""

    kind: Literal["light", "semantic"] = "semantic"
    """``light`` judges by the blocks alone; ``semantic`` reads the caption and sees the condition image. V-PAE:
    semantic."""
    blocks: tuple[Annotated[int, Field(ge=0)], ...] | None = Field(default=None, min_length=1)
    """Blocks whose outputs it sees, rising, counted from 0. None: at about one half and three quarters, and the last.
    Ours: the paper states none."""
    width: int = Field(default=512, ge=HEAD_DIM, multiple_of=HEAD_DIM)
    """Width of its queries. Ours."""
    optimizer: OptimizerConfig = OptimizerConfig(lr=4e-6, betas=(0.0, 0.9))
    """What steps on it. The betas are APT's; twice the student's rate, as in FastGen's LADD."""

    def tapped(self, layers: int) -> tuple[int, ...]:
        """The blocks that it sees of a transformer with so many.

        Raises:
            UserError: If there are none such.
        """
        if self.blocks is None:
            return tapped_by_default(layers)
        check_blocks(self.blocks, layers)
        return self.blocks


def build_head(config: HeadConfig, architecture: Mapping[str, Any]) -> nn.Module:
    """A head with random weights, for a transformer of these keyword arguments."""
    blocks = len(config.tapped(architecture["num_layers"]))
    feature_dim = architecture["num_attention_heads"] * architecture["attention_head_dim"]
    if config.kind == "light":
        return LightHead(feature_dim, blocks, width=config.width)
    image_dim = image_token_dim(architecture)
    return SemanticHead(feature_dim, blocks, architecture["text_dim"], image_dim, width=config.width)


@dataclass(frozen=True)
class Discriminator:
    """A frozen or trained transformer and a head on some of its blocks.

    Attributes:
        backbone: The transformer.
        head: Its head.
        blocks: The blocks that the head sees.
    """

    backbone: VelocityModel
    head: Model
    blocks: Sequence[int]

    def __call__(
        self, x_t: Tensor, timesteps: Tensor, condition: Condition, *, dtype: torch.dtype | None = None
    ) -> Tensor:
        """Logits ``[B]``, high for what it takes for real, of noised videos ``[B, C, F, H, W]`` at ``[B]`` times.

        ``dtype`` is what the backbone computes in, where that is more precise than usual.
        """
        features = block_outputs(self.backbone, x_t, timesteps, condition, self.blocks, dtype=dtype)
        logits: Tensor = self.head(features, condition)
        return logits
