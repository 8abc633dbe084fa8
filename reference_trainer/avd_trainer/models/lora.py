"""Low-rank adapters of a transformer, one per role."""

from __future__ import annotations

import hashlib
import math
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from accelerate import init_empty_weights
from diffusers import WanTransformer3DModel
from torch import nn
from torch.distributed.tensor import DTensor, distribute_tensor

from avd_trainer.config.sections import LoRAConfig
from avd_trainer.runtime.errors import UserError


def add_adapter(model: WanTransformer3DModel, name: str, lora: LoRAConfig) -> None:
    """Give a model, whose weights may be on the meta device, a LoRA adapter on the meta device, in float32.

    Raises:
        UserError: If the model has no such layers.
    """
    from peft import LoraConfig, inject_adapter_in_model

    # peft is content with one layer that fits.
    layers = [f".{layer}" for layer, _ in model.named_modules()]
    missing = [target for target in lora.target_modules if not any(layer.endswith(f".{target}") for layer in layers)]
    if missing:
        raise UserError(
            f"method.{name}.lora.target_modules: the model has no layers whose names end in {' or '.join(missing)}. "
            f"Choose among {', '.join(LoRAConfig().target_modules)}."
        )
    before = set(model.parameters())
    options = LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,  # type: ignore[arg-type]  # peft takes fractions
        target_modules=list(lora.target_modules),
        init_lora_weights=False,
    )
    try:
        with init_empty_weights(include_buffers=False), warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Already found a `peft_config`")  # several are what is wanted
            inject_adapter_in_model(options, model, name)
    except ValueError as error:
        raise UserError(
            f"method.{name}.lora.target_modules {list(lora.target_modules)} do not fit the model: {error}"
        ) from error
    for layer in adapted_layers(model):
        layer.cast_input_dtype_enabled = False  # who asks the model casts, and perhaps to more than the weights have
    for parameter in model.parameters():
        if parameter not in before:
            parameter.data = parameter.data.float()
    # peft freezes the adapters that are not active; here each is trained in its role.
    for parameter_name, parameter in model.named_parameters():
        parameter.requires_grad_(".lora_" in parameter_name)


def start_adapter(name: str, parameter: nn.Parameter, seed: int) -> None:
    """peft's start, A uniform and B zero, drawn whole so that it is the same for any number of ranks."""
    values = torch.zeros(parameter.shape)
    if ".lora_A." in name:
        key = hashlib.blake2b(f"{seed} {name}".encode(), digest_size=7).digest()
        draws = torch.Generator().manual_seed(int.from_bytes(key, "big"))
        nn.init.kaiming_uniform_(values, a=math.sqrt(5), generator=draws)
    values = values.to(parameter.device)
    with torch.no_grad():
        if isinstance(parameter, DTensor):
            parameter.copy_(distribute_tensor(values, parameter.device_mesh, parameter.placements))
        else:
            parameter.copy_(values)


def adapted_layers(model: nn.Module) -> list[Any]:
    """The layers that have adapters."""
    # By attribute and not by class, so that a full run needs no peft.
    return [module for module in model.modules() if hasattr(module, "lora_A")]


@contextmanager
def active_adapter(layers: Sequence[Any], name: str | None) -> Iterator[None]:
    """Switch an adapter on, and back afterwards.

    peft's own switch also freezes what it turns off, which FSDP, having seen those parameters as trainable, must not
    find out about in the middle of a step.
    """
    before = [(layer._disable_adapters, layer._active_adapter) for layer in layers]
    for layer in layers:
        layer._disable_adapters = name is None
        layer._active_adapter = [name] if name is not None else layer._active_adapter
    try:
        yield
    finally:
        for layer, (disabled, active) in zip(layers, before, strict=True):
            layer._disable_adapters, layer._active_adapter = disabled, active
