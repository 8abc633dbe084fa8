"""What a transformer's blocks see in a video: outputs of tapped blocks, in a forward that stops behind the last."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from types import MethodType
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import WanTransformer3DModel
from torch import Tensor
from torch.distributed.fsdp import register_fsdp_forward_method
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map_only

from avd_trainer.models.condition import Condition
from avd_trainer.models.transformer import VelocityModel, transformer_inputs
from avd_trainer.runtime.errors import UserError


def block_outputs(
    model: VelocityModel,
    x_t: Tensor,
    timesteps: Tensor,
    condition: Condition,
    blocks: Sequence[int],
    *,
    dtype: torch.dtype | None = None,
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
        dtype: In what the blocks compute, where that is more precise than what ``model`` does; its weights are rounded
            as ever. The time is embedded in float32 in any precision, as its embedder's weights are
            (:func:`avd_trainer.models.transformer.computes_in_float32`), to whose type diffusers casts it.

    Returns:
        For each of them ``[B, L, D]`` in float32; the L tokens are patches, frame by frame and row by row.

    Raises:
        ValueError: If ``blocks`` do not rise or are not among the transformer's.
    """
    return _ask(model, x_t, timesteps, condition, blocks, dtype=dtype)[0]


def block_predictions(
    model: VelocityModel, x_t: Tensor, timesteps: Tensor, condition: Condition, blocks: Sequence[int]
) -> tuple[list[Tensor], list[Tensor]]:
    """:func:`block_outputs`, and what the transformer would predict if each of these blocks were its last.

    Returns:
        The outputs of the blocks, and for each ``[B, L, N]`` in float32 what the output layers make of them: the N
        numbers of a patch's velocity.
    """
    return _ask(model, x_t, timesteps, condition, blocks, predict=True)


def _ask(
    model: VelocityModel,
    x_t: Tensor,
    timesteps: Tensor,
    condition: Condition,
    blocks: Sequence[int],
    *,
    predict: bool = False,
    dtype: torch.dtype | None = None,
) -> tuple[list[Tensor], list[Tensor]]:
    module = model.module
    check_blocks(blocks, len(module.blocks))
    if not hasattr(module, "forward_to_blocks"):
        # FSDP has to know of it: it gathers the embedding's weights before, and does so again in the backward pass.
        # Leaving the usual forward by an exception would skip what FSDP does behind it.
        module.forward_to_blocks = MethodType(_forward_to_blocks, module)
        register_fsdp_forward_method(module, "forward_to_blocks")
    with model.in_role():
        inputs = transformer_inputs(x_t, timesteps, condition, dtype or model.dtype)
        outputs, predictions = module.forward_to_blocks(*inputs, tuple(blocks), predict, dtype is not None)
    return [output.float() for output in outputs], [prediction.float() for prediction in predictions]


def check_blocks(blocks: Sequence[int], available: int) -> None:
    """Raise UserError unless ``blocks`` rise and are among the ``available`` ones."""
    if not blocks or list(blocks) != sorted({*blocks}) or blocks[0] < 0 or blocks[-1] >= available:
        raise UserError(
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
    predict: bool,
    precise: bool,
) -> tuple[list[Tensor], list[Tensor]]:
    """``WanTransformer3DModel.forward`` up to the last of some blocks; behind each, perhaps, its output layers."""
    run = _run_precisely if precise else _run
    rotary = module.rope(x_t)
    hidden_BLD = run(module.patch_embedding, x_t).flatten(2).transpose(1, 2).contiguous()
    time, modulation, text, image = run(module.condition_embedder, timesteps, text, image)
    modulation = modulation.unflatten(1, (6, -1))
    seen = text if image is None else torch.cat([image, text], dim=1)
    checkpointed = torch.is_grad_enabled() and module.gradient_checkpointing
    outputs, predictions = [], []
    for number, block in enumerate(module.blocks[: blocks[-1] + 1]):
        # Inside of what is checkpointed, which is run again in the backward pass.
        whole = partial(run, block)
        inputs = (hidden_BLD, seen, modulation, rotary)
        hidden_BLD = module._gradient_checkpointing_func(whole, *inputs) if checkpointed else whole(*inputs)
        if number in blocks:
            outputs.append(hidden_BLD)
            if predict:
                predictions.append(_output_layers(module, hidden_BLD, time))
    return outputs, predictions


def _output_layers(module: WanTransformer3DModel, hidden_BLD: Tensor, time_BD: Tensor) -> Tensor:
    """What a transformer does behind its last block; the patches stay apart."""
    shift, scale = (module.scale_shift_table + time_BD.unsqueeze(1)).chunk(2, dim=1)
    prediction_BLN: Tensor = module.proj_out(
        (module.norm_out(hidden_BLD.float()) * (1 + scale) + shift).type_as(hidden_BLD)
    )
    return prediction_BLN


def _run(part: Callable[..., Any], *inputs: Any) -> Any:
    return part(*inputs)


def _run_precisely(part: Callable[..., Any], *inputs: Any) -> Any:
    with _AsPreciseAsInputs():
        return part(*inputs)


_WEIGHTED = frozenset({F.linear, F.conv3d, F.rms_norm})
"""Functions of a transformer's layers that want weights of their input's type."""


class _AsPreciseAsInputs(TorchFunctionMode):
    """Layers compute in the type of their input, whatever type FSDP has gathered their weights in."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func not in _WEIGHTED:
            return func(*args, **kwargs)
        dtype = args[0].dtype
        args, kwargs = tree_map_only(Tensor, lambda tensor: tensor.to(dtype), (args, kwargs))
        return func(*args, **kwargs)
