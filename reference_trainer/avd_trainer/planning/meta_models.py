"""Transformers without memory: built as the trainer builds them, on the meta device, which has shapes and no values."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from functools import cache, partial
from typing import Any, Literal, NamedTuple

import torch
import torch.autograd.forward_ad as forward_ad
import torch.nn.functional as F
from diffusers import WanTransformer3DModel
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from avd_trainer.config.sections import LoRAConfig
from avd_trainer.models.architecture import image_input
from avd_trainer.models.condition import Condition
from avd_trainer.models.image_encoder import IMAGE_TOKENS
from avd_trainer.models.sharding import materialise
from avd_trainer.models.transformer import DTYPES, VelocityModel, computes_in_float32, prepare, without_memory
from avd_trainer.planning.description import LatentShape, Run

META = torch.device("meta")
BASE = "base"
"""The frozen model that the teacher is, and that all adapters share."""


class MetaModel(NamedTuple):
    """A transformer as :func:`avd_trainer.models.roles.load_models` builds it, to be made without memory.

    Attributes:
        name: ``base``, which is frozen, or the role that trains all of its weights.
        architecture: Its keyword arguments, as JSON.
        adapters: Roles and their adapters.
        precision: What it computes in.
        checkpointing: Whether blocks keep their inputs only.
    """

    name: str
    architecture: str
    adapters: tuple[tuple[str, LoRAConfig], ...]
    precision: Literal["float32", "bfloat16"]
    checkpointing: bool

    @property
    def trainable(self) -> bool:
        """Whether all of its weights are trained."""
        return self.name != BASE

    @property
    def layers(self) -> int:
        """Transformer blocks."""
        return int(json.loads(self.architecture)["num_layers"])

    def with_layers(self, layers: int) -> MetaModel:
        """The same with another number of blocks."""
        architecture = json.loads(self.architecture) | {"num_layers": layers}
        return self._replace(architecture=json.dumps(architecture, sort_keys=True))

    def build(self) -> WanTransformer3DModel:
        """The module on the meta device, its parameters in the types in which they are stored."""
        model = self._build()
        materialise(model, META)
        return model

    def build_gathered(self, role: str | None, device: torch.device = META) -> VelocityModel:
        """The model in a role, its parameters empty and in the types in which it computes: as FSDP2 gathers them.

        On the meta device its blocks run the kernels of a GPU, in shapes.

        Args:
            role: Whose adapter is on; None for none.
            device: Where.
        """
        model = self._build()
        dtype = DTYPES[self.precision]
        for name, parameter in model.named_parameters():
            parameter.data = parameter.data.to(torch.float32 if computes_in_float32(name) else dtype)
        materialise(model, device)
        if device == META:
            for block in model.blocks:
                # In the block and not around the model: a checkpointed block runs again in the backward pass.
                block.forward = partial(_with_gpu_kernels, block.forward)
        adapter = role if role in dict(self.adapters) else None
        return VelocityModel(model, adapter, dtype)

    def when_trained(self, role: str) -> tuple[MetaModel, str]:
        """A model and a role that run alike with gradient: two full models, or two adapters of one kind, are one."""
        adapters = dict(self.adapters)
        alike = next((name for name, lora in self.adapters if lora == adapters.get(role)), role)
        return (self._replace(name="student") if self.trainable else self), alike

    def is_crossed(self, role: str) -> bool:
        """Whether this role is frozen, so that a gradient crosses it on the way to its input or goes nowhere."""
        return not self.trainable and role not in dict(self.adapters)

    def when_asked(self, role: str) -> MetaModel:
        """A model that runs alike without gradient, where only an adapter that is on makes a difference."""
        adapters = tuple((name, lora) for name, lora in self.adapters if name == role)
        return self._replace(name=BASE, adapters=adapters, checkpointing=False)

    def _build(self) -> WanTransformer3DModel:
        """Without memory for its parameters; its buffers have their values."""
        model = without_memory(json.loads(self.architecture))
        prepare(
            model,
            dict(self.adapters),
            DTYPES[self.precision],
            trainable=self.trainable,
            checkpointing=self.checkpointing,
        )
        return model


def meta_models(run: Run) -> dict[str, MetaModel]:
    """The transformer of each role; of roles that share one it is the same.

    A model that has a role's averaged weights runs as a frozen one does, and is counted with the averages.
    """
    followed = [(role.followed_by, role.adapter) for role in run.roles if role.followed_by is not None]
    adapted = [(role.name, role.adapter) for role in run.roles] + followed
    adapters = tuple((name, adapter) for name, adapter in adapted if adapter is not None)
    own = (run.precision, run.checkpointing)
    base = MetaModel(BASE, run.architecture, adapters, *own)
    return {name: base for name, _ in followed} | {
        role.name: MetaModel(role.name, run.architecture, (), *own) if role.owns_weights else base
        for role in run.roles
        if role.built is None
    }


class ParameterShape(NamedTuple):
    """A parameter as it is stored.

    Attributes:
        group: What FSDP2 gathers with it.
        shape: Of the whole.
        itemsize: Bytes of a number.
        trained_in: The role whose optimizer steps on it; None for a frozen one.
    """

    group: str
    shape: tuple[int, ...]
    itemsize: int
    trained_in: str | None

    def sharded(self, shards: int) -> int:
        """Numbers in a rank's shard, which is cut along the first dimension and padded to equal size."""
        first, *rest = self.shape or (1,)
        return math.ceil(first / shards) * math.prod(rest)


@cache
def parameter_shapes(model: MetaModel) -> tuple[ParameterShape, ...]:
    """All parameters of a model."""
    return tuple(_parameter(model, name, parameter) for name, parameter in model.build().named_parameters())


def trained_shapes(run: Run) -> dict[str, list[ParameterShape]]:
    """What is trained in each role that has an optimizer."""
    stored = [shape for model in set(meta_models(run).values()) for shape in parameter_shapes(model)]
    built = [ParameterShape("root", shape, 4, role.name) for role in run.roles for shape in role.built or ()]
    return {role.name: [shape for shape in stored + built if shape.trained_in == role.name] for role in run.trained}


@cache
def tables(model: MetaModel) -> int:
    """Bytes of a model's buffers, such as rotary tables."""
    return sum(buffer.nbytes for buffer in model.with_layers(1).build().buffers())


def empty_inputs(
    model: MetaModel, batch: int, latent_shape: LatentShape, text_length: int, device: torch.device = META
) -> tuple[Tensor, Tensor, Condition]:
    """``x_t`` ``[B, C, F, H, W]``, timesteps ``[B]`` and the condition of a forward, in float32, of zeros."""
    architecture = json.loads(model.architecture)
    x_t = torch.zeros(batch, *latent_shape, device=device)
    condition = Condition(torch.zeros(batch, text_length, architecture["text_dim"], device=device))
    image = image_input(architecture)
    if image is not None:
        condition = replace(
            condition,
            image_latents=torch.zeros(batch, image.channels, *latent_shape[1:], device=device),
            image_embedding=None
            if image.embedding_dim is None
            else torch.zeros(batch, IMAGE_TOKENS, image.embedding_dim, device=device),
        )
    return x_t, torch.zeros(batch, device=device), condition


def over_layers(count: Callable[[MetaModel], tuple[int, ...]], model: MetaModel) -> tuple[int, ...]:
    """Extrapolate what ``count`` says of a model with fewer blocks to all of them.

    Two and three blocks say what any number takes: each further one adds as much as the third. The first is another
    matter: where the embeddings are frozen, nothing flows back through its input.
    """
    if model.layers <= 3:
        return count(model)
    two, three = count(model.with_layers(2)), count(model.with_layers(3))
    return tuple(a + (model.layers - 2) * (b - a) for a, b in zip(two, three, strict=True))


def _parameter(model: MetaModel, name: str, parameter: nn.Parameter) -> ParameterShape:
    # The groups that FSDP2 gathers as one.
    group = (
        ".".join(name.split(".")[:2]) if name.startswith("blocks.") else "time" if computes_in_float32(name) else "root"
    )
    adapter = next((role for role, _ in model.adapters if f".{role}." in name and ".lora_" in name), None)
    trained_in = model.name if model.trainable else adapter
    return ParameterShape(group, tuple(parameter.shape), parameter.itemsize, trained_in)


_FLASH = torch.ops.aten._scaled_dot_product_flash_attention


class _GPUKernels(TorchFunctionMode):
    """Stands in for what PyTorch computes by one kernel on a GPU.

    On the meta device it would take them apart: attention into a matrix of all tokens by all tokens, and a norm into
    copies of its input in float32. A forward derivative has them taken apart anywhere.
    """

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func not in (F.scaled_dot_product_attention, F.rms_norm) or _have_direction(*args, *kwargs.values()):
            return func(*args, **kwargs)
        if func is F.scaled_dot_product_attention:
            query, key, value = [*args, *(kwargs[name] for name in ("query", "key", "value")[len(args) :])][:3]
            return _FLASH(query, key, value)[0]
        return _RMSNorm.apply(args[0], kwargs["weight"])  # type: ignore[no-untyped-call]


def _have_direction(*inputs: Any) -> bool:
    """Whether a forward derivative is taken, which these kernels have none of."""
    tensors = (value for value in inputs if isinstance(value, Tensor))
    return any(forward_ad.unpack_dual(tensor).tangent is not None for tensor in tensors)  # type: ignore[no-untyped-call]


class _RMSNorm(torch.autograd.Function):
    """Shapes of the fused kernel, which keeps its input and a number for each token."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight, x.new_empty((*x.shape[:-1], 1), dtype=torch.float32))
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor]:
        x, weight, _ = ctx.saved_tensors
        return torch.empty_like(x), torch.empty_like(weight)


def _with_gpu_kernels(forward: Callable[..., Tensor], *inputs: Any) -> Tensor:
    with _GPUKernels():
        return forward(*inputs)
