"""The three models of a run, sharded over its ranks: student, frozen teacher, online model."""

from __future__ import annotations

import hashlib
import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
from accelerate import init_empty_weights
from diffusers import WanTransformer3DModel
from torch import Tensor, nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.utils.checkpoint import checkpoint

from avd_trainer.config import ArchitectureConfig, LoRAConfig, TrainConfig
from avd_trainer.data.codec import BlockDCTCodec
from avd_trainer.distributed import Ranks
from avd_trainer.errors import UserError
from avd_trainer.weights import TransformerWeights, load_into, open_weights

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
        self._adapted = _adapted_layers(module)

    def __call__(self, x_t: Tensor, timesteps: Tensor, text: Tensor) -> Tensor:
        """One forward: ``[B, C, F, H, W]``, ``[B]``, ``[B, L, D]`` to a velocity ``[B, C, F, H, W]``."""
        with _adapter(self._adapted, self.adapter):
            # Timesteps keep their precision: bfloat16 has no 757.
            output = self.module(x_t.to(self.dtype), timesteps, text.to(self.dtype), return_dict=False)[0]
        velocity: Tensor = output.float()
        return velocity

    def named_parameters(self) -> dict[str, nn.Parameter]:
        """What training changes in this role, by name; empty for a frozen one."""
        return {
            name: parameter
            for name, parameter in self.module.named_parameters()
            if parameter.requires_grad and (self.adapter is None or f".{self.adapter}." in name)
        }

    def parameters(self) -> list[nn.Parameter]:
        """The values of :meth:`named_parameters`."""
        return list(self.named_parameters().values())


class Models(NamedTuple):
    """Who takes part in a distillation. All start from the teacher, or the student from weights of its own."""

    student: VelocityModel
    teacher: VelocityModel
    online: VelocityModel


def load_models(config: TrainConfig, ranks: Ranks) -> Models:
    """Build, shard and fill the models of a run.

    No rank holds a whole model at any time: modules are built without memory, sharded, and then each rank reads its
    part of the files.

    Raises:
        UserError: If weights are missing, damaged or of another architecture.
    """
    adapters = {"student": config.student_lora, "online": config.online_lora}
    shared = {role: lora for role, lora in adapters.items() if lora is not None}
    with open_weights(config.teacher) as weights:
        base = _build(weights, shared, config, ranks, trainable=False)
        full = {role: _build(weights, {}, config, ranks, trainable=True) for role in adapters if role not in shared}
        if config.student_weights is not None:
            with open_weights(config.student_weights, config=weights.config) as own:
                load_into(full["student"], own)
    dtype = DTYPES[config.precision]
    return Models(
        teacher=VelocityModel(base, None, dtype),
        **{
            role: VelocityModel(full[role], None, dtype) if role in full else VelocityModel(base, role, dtype)
            for role in adapters
        },
    )


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
        model = _empty(weights.config)
        prepare(model, {}, dtype)
        _materialise(model, torch.device(device))
        load_into(model, weights)
    return model


def empty_transformer(architecture: dict[str, Any], device: torch.device) -> WanTransformer3DModel:
    """A whole transformer in float32 with memory for its weights and nothing in it."""
    model = _empty(architecture)
    _materialise(model, device)
    return model


def adapter_names(architecture: dict[str, Any], name: str, lora: LoRAConfig) -> dict[str, torch.Size]:
    """Names and shapes of an adapter's parameters."""
    model = _empty(architecture)
    add_adapter(model, name, lora)
    return {key: parameter.shape for key, parameter in model.named_parameters() if ".lora_" in key}


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
        checkpointing: Whether blocks keep their inputs only, where anything is trained.
    """
    for name, parameter in model.requires_grad_(trainable).named_parameters():
        parameter.data = parameter.data.to(torch.float32 if trainable or computes_in_float32(name) else dtype)
    for name, lora in adapters.items():
        add_adapter(model, name, lora)
    model.train(trainable or bool(adapters))
    if checkpointing and (trainable or adapters):
        _checkpoint_blocks(model)


def computes_in_float32(name: str) -> bool:
    """Whether a parameter is used in float32 in any precision: as in diffusers and in Wan2.1, the time embedding's."""
    return ".time_embedder." in name


def build_transformer(config: ArchitectureConfig) -> WanTransformer3DModel:
    """A small Wan2.1 transformer with random weights."""
    return WanTransformer3DModel(
        patch_size=(1, 2, 2),
        in_channels=BlockDCTCodec.channels,
        out_channels=BlockDCTCodec.channels,
        rope_max_seq_len=64,
        **config.model_dump(),
    )


def _build(
    weights: TransformerWeights, adapters: dict[str, LoRAConfig], config: TrainConfig, ranks: Ranks, *, trainable: bool
) -> WanTransformer3DModel:
    model = _empty(weights.config)
    dtype = DTYPES[config.precision]
    prepare(model, adapters, dtype, trainable=trainable, checkpointing=config.parallel.activation_checkpointing)
    if config.parallel.compile:
        model.compile_repeated_blocks()
    _shard(model, dtype, ranks)
    _materialise(model, ranks.device)
    load_into(model, weights)
    for name, parameter in model.named_parameters():
        if ".lora_" in name:
            _start_adapter(name, parameter, config.seed)
    return model


def _empty(config: dict[str, Any]) -> WanTransformer3DModel:
    """A transformer without memory for its weights. Its buffers are real: they are computed, not loaded."""
    with init_empty_weights(include_buffers=False):
        model: WanTransformer3DModel = WanTransformer3DModel.from_config(config)
    return model


def _materialise(model: nn.Module, device: torch.device) -> None:
    buffers = dict(model.named_buffers())
    model.to_empty(device=device)
    for name, buffer in buffers.items():
        owner, _, attribute = name.rpartition(".")
        setattr(model.get_submodule(owner), attribute, buffer.to(device))


def _shard(model: WanTransformer3DModel, dtype: torch.dtype, ranks: Ranks) -> None:
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
            f"{name}_lora.target_modules: the model has no layers whose names end in {' or '.join(missing)}. Choose "
            f"among {', '.join(LoRAConfig().target_modules)}."
        )
    before = set(model.parameters())
    options = LoraConfig(
        r=lora.rank, lora_alpha=lora.alpha, target_modules=list(lora.target_modules), init_lora_weights=False
    )
    try:
        with init_empty_weights(include_buffers=False), warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Already found a `peft_config`")  # several are what is wanted
            inject_adapter_in_model(options, model, name)
    except ValueError as error:
        raise UserError(
            f"{name}_lora.target_modules {list(lora.target_modules)} do not fit the model: {error}"
        ) from error
    for parameter in model.parameters():
        if parameter not in before:
            parameter.data = parameter.data.float()
    # peft freezes the adapters that are not active; here each is trained in its role.
    for parameter_name, parameter in model.named_parameters():
        parameter.requires_grad_(".lora_" in parameter_name)


def _start_adapter(name: str, parameter: nn.Parameter, seed: int) -> None:
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


def _checkpoint_blocks(model: WanTransformer3DModel) -> None:
    """Keep only each block's input for the backward pass, which computes the rest again, in the role of the forward."""

    layers = _adapted_layers(model)

    def run(block: nn.Module, *inputs: Any) -> Any:
        adapter = layers[0].active_adapters[0] if layers and not layers[0].disable_adapters else None
        return checkpoint(
            block.__call__, *inputs, use_reentrant=False, context_fn=lambda: (nullcontext(), _adapter(layers, adapter))
        )

    model.enable_gradient_checkpointing(run)


def _adapted_layers(model: nn.Module) -> list[Any]:
    # By attribute and not by class, so that a full run needs no peft.
    return [module for module in model.modules() if hasattr(module, "lora_A")]


@contextmanager
def _adapter(layers: Sequence[Any], name: str | None) -> Iterator[None]:
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
