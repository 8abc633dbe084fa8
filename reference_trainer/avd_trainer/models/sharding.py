"""FSDP2: parameters in shards, blocks gathered when they are needed, activations computed again."""

from __future__ import annotations

import warnings
from contextlib import nullcontext
from typing import Any

import torch
from diffusers import WanTransformer3DModel
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.utils.checkpoint import checkpoint

from avd_trainer.models.lora import active_adapter, adapted_layers
from avd_trainer.runtime.ranks import Ranks


def materialise(model: nn.Module, device: torch.device) -> None:
    """Give a module from the meta device memory for its weights, with nothing in it; its buffers keep their values."""
    buffers = dict(model.named_buffers())
    model.to_empty(device=device)
    for name, buffer in buffers.items():
        owner, _, attribute = name.rpartition(".")
        setattr(model.get_submodule(owner), attribute, buffer.to(device))


def shard(model: WanTransformer3DModel, dtype: torch.dtype, ranks: Ranks) -> None:
    """FSDP2: each block is gathered when it is needed and let go of afterwards."""
    # The velocity is a view of the last layer's output, which nobody changes in place.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module", category=UserWarning)
    # Inputs are cast by VelocityModel, which knows that timesteps and rotary frequencies must not be.
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    exact = MixedPrecisionPolicy(cast_forward_inputs=False)
    fully_shard(model.condition_embedder.time_embedder, mesh=ranks.mesh, mp_policy=exact)
    for block in model.blocks:
        fully_shard(block, mesh=ranks.mesh, mp_policy=policy, reshard_after_forward=True)
    # Also after the last forward: the average of the weights is swapped in and out of the shards.
    fully_shard(model, mesh=ranks.mesh, mp_policy=policy, reshard_after_forward=True)


def checkpoint_blocks(model: WanTransformer3DModel) -> None:
    """Keep only each block's input for the backward pass, which computes the rest again, in the role of the forward."""

    layers = adapted_layers(model)

    def run(block: nn.Module, *inputs: Any) -> Any:
        adapter = layers[0].active_adapters[0] if layers and not layers[0].disable_adapters else None
        return checkpoint(
            block.__call__,
            *inputs,
            use_reentrant=False,
            context_fn=lambda: (nullcontext(), active_adapter(layers, adapter)),
        )

    model.enable_gradient_checkpointing(run)


def compile_blocks(model: WanTransformer3DModel) -> None:
    """``torch.compile`` of each block, to be called before it is sharded. Sets an option of the whole process."""
    # A loss may be differentiated at a sample, to measure its share, before the backward pass that trains. PyTorch's
    # default would let the first of the two passes overwrite what the second one needs, and refuses both.
    torch._functorch.config.donated_buffer = False
    model.compile_repeated_blocks()
