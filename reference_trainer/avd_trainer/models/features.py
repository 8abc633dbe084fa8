"""What a transformer's blocks see in a video: outputs of tapped blocks, in a forward that stops behind the last."""

from __future__ import annotations

from collections.abc import Sequence
from types import MethodType

import torch
from diffusers import WanTransformer3DModel
from torch import Tensor
from torch.distributed.fsdp import register_fsdp_forward_method

from avd_trainer.models.condition import Condition
from avd_trainer.models.transformer import VelocityModel, transformer_inputs


def block_outputs(
    model: VelocityModel, x_t: Tensor, timesteps: Tensor, condition: Condition, blocks: Sequence[int]
) -> list[Tensor]:
    """The outputs of some of a transformer's blocks, in the role of ``model``; later blocks are not computed.

    A gradient flows to ``x_t`` also through frozen weights. Blocks that are checkpointed are computed again in the
    backward pass, as in any forward. A collective where the transformer is sharded.

    Args:
        model: The transformer in its role.
        x_t: ``[B, C, F, H, W]``.
        timesteps: ``[B]``, in [0, 1000].
        condition: What the B samples are conditioned on.
        blocks: Which ones, rising, counted from 0.

    Returns:
        For each of them ``[B, L, D]`` in float32; the L tokens are patches, frame by frame and row by row.

    Raises:
        ValueError: If ``blocks`` do not rise or are not among the transformer's.
    """
    module = model.module
    check_blocks(blocks, len(module.blocks))
    if not hasattr(module, "forward_to_blocks"):
        # FSDP has to know of it: it gathers the embedding's weights before, and does so again in the backward pass.
        # Leaving the usual forward by an exception would skip what FSDP does behind it.
        module.forward_to_blocks = MethodType(_forward_to_blocks, module)
        register_fsdp_forward_method(module, "forward_to_blocks")
    with model.in_role():
        outputs = module.forward_to_blocks(*transformer_inputs(x_t, timesteps, condition, model.dtype), tuple(blocks))
    return [output.float() for output in outputs]


def check_blocks(blocks: Sequence[int], available: int) -> None:
    """Raise ValueError unless ``blocks`` rise and are among the ``available`` ones."""
    if not blocks or list(blocks) != sorted({*blocks}) or blocks[0] < 0 or blocks[-1] >= available:
        raise ValueError(
            f"blocks must rise within 0 to {available - 1}, the blocks of this transformer, got {list(blocks)}. Choose "
            "among them, each once."
        )


def tapped_by_default(available: int) -> tuple[int, ...]:
    """Blocks at about one half and three quarters of ``available`` ones, and the last.

    Ours, where the papers are silent: Self-Forcing taps 13, 21 and 29 of 30 blocks, FastGen 15, 22 and 29.
    """
    return tuple(sorted({available // 2, 3 * available // 4, available - 1}))


def _forward_to_blocks(
    module: WanTransformer3DModel,
    x_t: Tensor,
    timesteps: Tensor,
    text: Tensor,
    image: Tensor | None,
    blocks: tuple[int, ...],
) -> list[Tensor]:
    """The first part of ``WanTransformer3DModel.forward``, whose output layers and remaining blocks are left out."""
    rotary = module.rope(x_t)
    hidden_BLD = module.patch_embedding(x_t).flatten(2).transpose(1, 2).contiguous()
    _, modulation, text, image = module.condition_embedder(timesteps, text, image)
    modulation = modulation.unflatten(1, (6, -1))
    seen = text if image is None else torch.cat([image, text], dim=1)
    checkpointed = torch.is_grad_enabled() and module.gradient_checkpointing
    outputs = []
    for number, block in enumerate(module.blocks[: blocks[-1] + 1]):
        inputs = (hidden_BLD, seen, modulation, rotary)
        hidden_BLD = module._gradient_checkpointing_func(block, *inputs) if checkpointed else block(*inputs)
        if number in blocks:
            outputs.append(hidden_BLD)
    return outputs
