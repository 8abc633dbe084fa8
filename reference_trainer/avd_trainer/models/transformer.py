"""A Wan transformer in one of its roles: from tensors in float32 to a velocity."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import Any

import torch
from accelerate import init_empty_weights
from diffusers import WanTransformer3DModel
from torch import Tensor, nn

from avd_trainer.config.sections import ArchitectureConfig, LoRAConfig
from avd_trainer.models.architecture import MASK_CHANNELS
from avd_trainer.models.codecs.block_dct import BlockDCTCodec
from avd_trainer.models.condition import Condition
from avd_trainer.models.lora import active_adapter, adapted_layers, add_adapter
from avd_trainer.models.sharding import checkpoint_blocks, materialise
from avd_trainer.models.weights import load_into, open_weights

# What ``precision`` means.
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


class VelocityModel:
    """A transformer in one of its roles: called with tensors in float32, gives the velocity in float32.

    Several roles can share one module, whose frozen weights are then in memory once: each role has an adapter of its
    own, and the role without one is the module as it was loaded.

    Args:
        module: The transformer.
        adapter: The LoRA adapter that is on in this role; None for none.
        dtype: In what the transformer computes.
    """

    def __init__(
        self, module: WanTransformer3DModel, adapter: str | None = None, dtype: torch.dtype = torch.float32
    ) -> None:
        self.module = module
        self.adapter = adapter
        self.dtype = dtype
        self._adapted = adapted_layers(module)

    def __call__(self, x_t: Tensor, timesteps: Tensor, condition: Condition) -> Tensor:
        """One forward: ``[B, C, F, H, W]``, ``[B]`` and what B samples are told, to a velocity ``[B, C, F, H, W]``."""
        with self.in_role():
            output = self.module(*transformer_inputs(x_t, timesteps, condition, self.dtype), return_dict=False)[0]
        velocity: Tensor = output.float()
        return velocity

    def in_role(self) -> AbstractContextManager[None]:
        """Within this context the module runs with this role's adapter, or with none if it has none."""
        return active_adapter(self._adapted, self.adapter)

    def named_parameters(self) -> dict[str, nn.Parameter]:
        """What training changes in this role, by name; empty for a frozen one."""
        return {name: parameter for name, parameter in self.own_parameters().items() if parameter.requires_grad}

    def own_parameters(self) -> dict[str, nn.Parameter]:
        """The parameters of its adapter, by name; of the module where it has none."""
        return {
            name: parameter
            for name, parameter in self.module.named_parameters()
            if self.adapter is None or f".{self.adapter}." in name
        }

    def parameters(self) -> list[nn.Parameter]:
        """The values of :meth:`named_parameters`."""
        return list(self.named_parameters().values())


def transformer_inputs(
    x_t: Tensor, timesteps: Tensor, condition: Condition, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """The first arguments of a ``WanTransformer3DModel``'s forward: sample, timestep, text and image embedding.

    Args:
        x_t: ``[B, C, F, H, W]``.
        timesteps: ``[B]``; they keep their precision: bfloat16 has no 757.
        condition: Of B samples; its image latents have as many frames as ``x_t``.
        dtype: In what the transformer computes.
    """
    seen = None if condition.image_embedding is None else condition.image_embedding.to(dtype)
    if condition.image_latents is not None:
        x_t = torch.cat([x_t, condition.image_latents], dim=1)
    return x_t.to(dtype), timesteps, condition.text.to(dtype), seen


def load_transformer(
    source: str, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
) -> WanTransformer3DModel:
    """Load a whole transformer in evaluation mode; beside it there is one tensor at a time in host memory.

    Args:
        source: Whatever :func:`open_weights` understands.
        device: Where to.
        dtype: What it computes in; weights that are used in float32 in any precision are kept so.

    Raises:
        UserError: If there is no such model.
    """
    with open_weights(source) as weights:
        model = without_memory(weights.config)
        prepare(model, {}, dtype)
        materialise(model, torch.device(device))
        load_into(model, weights)
    return model


def empty_transformer(architecture: dict[str, Any], device: torch.device) -> WanTransformer3DModel:
    """A whole transformer in float32 with memory for its weights and nothing in it."""
    model = without_memory(architecture)
    materialise(model, device)
    return model


def prepare(
    model: WanTransformer3DModel,
    adapters: Mapping[str, LoRAConfig],
    dtype: torch.dtype,
    *,
    trainable: bool = False,
    checkpointing: bool = False,
) -> None:
    """Bring a model, which may be on the meta device, into the state that it is trained or asked in.

    What an optimizer steps on is in float32; what is only read is kept as it is computed with.

    Args:
        model: Changed in place.
        adapters: Adapters to add, by role.
        dtype: What it computes in.
        trainable: Whether all of its weights are trained.
        checkpointing: Whether blocks keep their inputs only, where there is a gradient.
    """
    for name, parameter in model.requires_grad_(trainable).named_parameters():
        parameter.data = parameter.data.to(torch.float32 if trainable or computes_in_float32(name) else dtype)
    for name, lora in adapters.items():
        add_adapter(model, name, lora)
    model.train(trainable or bool(adapters))
    if checkpointing:  # frozen ones too: a gradient may cross them on its way to what they are asked about
        checkpoint_blocks(model)


def computes_in_float32(name: str) -> bool:
    """Whether a parameter is used in float32 in any precision: as in diffusers and in Wan2.1, the time embedding's."""
    return ".time_embedder." in name


def build_transformer(config: ArchitectureConfig) -> WanTransformer3DModel:
    """A small Wan2.1 transformer with random weights."""
    channels = BlockDCTCodec.channels
    return WanTransformer3DModel(
        patch_size=(1, 2, 2),
        in_channels=channels + (MASK_CHANNELS + channels if config.image_to_video else 0),
        out_channels=channels,
        rope_max_seq_len=64,
        **config.model_dump(exclude={"image_to_video"}),
    )


@torch.no_grad()
def start_from(model: WanTransformer3DModel, source: str) -> WanTransformer3DModel:
    """Fill a model with the weights of one that has no further input channels; what goes into those starts at zero.

    So a model of image to video starts as one of text to video that does not look at the image yet.

    Raises:
        UserError: If there are no such weights, or they do not fit otherwise.
    """
    with open_weights(source) as weights:
        whole = WanTransformer3DModel.from_config({**model.config, "in_channels": weights.config["in_channels"]})
        load_into(whole, weights)
    embedding, own = model.patch_embedding.weight, whole.patch_embedding.weight
    extended = torch.zeros_like(embedding)
    extended[:, : own.shape[1]] = own
    model.load_state_dict({**whole.state_dict(), "patch_embedding.weight": extended})
    return model


def without_memory(config: dict[str, Any]) -> WanTransformer3DModel:
    """A transformer without memory for its weights. Its buffers are real: they are computed, not loaded."""
    with init_empty_weights(include_buffers=False):
        model: WanTransformer3DModel = WanTransformer3DModel.from_config(config)
    return model


def adapter_names(architecture: dict[str, Any], name: str, lora: LoRAConfig) -> dict[str, torch.Size]:
    """Names and shapes of an adapter's parameters."""
    model = without_memory(architecture)
    add_adapter(model, name, lora)
    return {key: parameter.shape for key, parameter in model.named_parameters() if ".lora_" in key}
