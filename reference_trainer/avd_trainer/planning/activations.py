"""What a forward and a backward pass hold besides weights, counted on the meta device."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

from avd_trainer.models.forward_derivative import directional_derivative
from avd_trainer.models.samplers import guided_velocity
from avd_trainer.planning.description import LatentShape
from avd_trainer.planning.meta_models import MetaModel, empty_inputs, over_layers


class Activations(NamedTuple):
    """Bytes that a model's forward and backward take, weights and gradients of weights left out."""

    kept: int
    """After the forward pass: for the backward pass, and the output."""
    forward: int
    """At most, in the forward pass."""
    backward: int
    """At most, in the backward pass."""


def training_activations(
    model: MetaModel, role: str, batch: int, latent_shape: LatentShape, text_length: int
) -> Activations:
    """What a forward with gradient and its backward take.

    Args:
        model: The transformer.
        role: Who runs: its adapter is on.
        batch: Examples.
        latent_shape: ``(C, F, H, W)`` of one.
        text_length: Tokens of a prompt.
    """
    model, role = model.when_trained(role)
    return Activations(*over_layers(lambda short: _run_training(short, role, batch, latent_shape, text_length), model))


def inference_activations(
    model: MetaModel, role: str, batch: int, latent_shape: LatentShape, text_length: int, guidance_scale: float = 1.0
) -> int:
    """Bytes that a forward without gradient takes at most; arguments as for :func:`training_activations`.

    ``guidance_scale`` is that of classifier-free guidance, which runs twice the batch; 1 for none.
    """
    arguments = (role, guidance_scale, batch, latent_shape, text_length)
    return over_layers(lambda short: _run_inference(short, *arguments), model.when_asked(role))[0]


def derivative_activations(model: MetaModel, role: str, batch: int, latent_shape: LatentShape, text_length: int) -> int:
    """Bytes that a forward with its forward derivative takes at most; arguments as for :func:`training_activations`."""
    arguments = (role, batch, latent_shape, text_length)
    return over_layers(lambda short: _run_derivative(short, *arguments), model.when_asked(role))[0]


class LiveTensors(TorchDispatchMode):
    """Counts the bytes of tensors that are made within and are still in use; each storage once, views not at all.

    Args:
        known: Tensors not to count.

    Attributes:
        now: Bytes in use.
        peak: The most that were.
    """

    def __init__(self, known: Sequence[Tensor] = ()) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = self.peak = 0
        self._seen = WeakIdKeyDictionary()
        for tensor in known:
            self._seen[tensor.untyped_storage()] = True

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        for value in tree_leaves(result):
            if isinstance(value, Tensor):
                self._add(value.untyped_storage())
        # The kernel of flash attention's backward pass sums the queries' gradient in float32.
        workspace = 4 * args[1].numel() if func is _FLASH_BACKWARD else 0
        self.peak = max(self.peak, self.now + workspace)
        return result

    def _add(self, storage: torch.UntypedStorage) -> None:
        if storage not in self._seen:
            self._seen[storage] = True
            self.now += storage.nbytes()
            weakref.finalize(storage, self._remove, storage.nbytes())

    def _remove(self, nbytes: int) -> None:
        self.now -= nbytes


_FLASH_BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_backward.default


@cache
def _run_training(model: MetaModel, role: str, batch: int, latent_shape: LatentShape, text_length: int) -> Activations:
    velocity_model = model.build_gathered(role)
    module = velocity_model.module
    x_t, timesteps, condition = empty_inputs(model, batch, latent_shape, text_length)
    x_t.requires_grad_(model.is_crossed(role))
    # The other role's adapter takes no part; gradients are counted elsewhere.
    for parameter in velocity_model.parameters():
        parameter.register_post_accumulate_grad_hook(_drop_gradient)  # type: ignore[no-untyped-call]
    known = [*module.parameters(), *module.buffers(), x_t, timesteps, *condition.tensors]
    with LiveTensors(known) as live:
        velocity = velocity_model(x_t, timesteps, condition)
        kept, forward = live.now, live.peak
        torch.autograd.backward(velocity, torch.empty_like(velocity))
    return Activations(kept, forward, live.peak)


@cache
def _run_inference(
    model: MetaModel,
    role: str,
    guidance_scale: float,
    batch: int,
    latent_shape: LatentShape,
    text_length: int,
) -> tuple[int]:
    velocity_model = model.build_gathered(role)
    module = velocity_model.module
    x_t, timesteps, condition = empty_inputs(model, batch, latent_shape, text_length)
    known = [*module.parameters(), *module.buffers(), x_t, timesteps, *condition.tensors]
    with LiveTensors(known) as live, torch.no_grad():
        guided_velocity(velocity_model, x_t, timesteps, condition, condition.text[0], guidance_scale)
    return (live.peak,)


@cache
def _run_derivative(model: MetaModel, role: str, batch: int, latent_shape: LatentShape, text_length: int) -> tuple[int]:
    velocity_model = model.build_gathered(role)
    module = velocity_model.module
    x_t, timesteps, condition = empty_inputs(model, batch, latent_shape, text_length)
    directions = (torch.empty_like(x_t), torch.empty_like(timesteps))
    known = [*module.parameters(), *module.buffers(), x_t, timesteps, *directions, *condition.tensors]
    with LiveTensors(known) as live:
        directional_derivative(lambda x, t: velocity_model(x, t, condition), (x_t, timesteps), directions)
    return (live.peak,)


def _drop_gradient(parameter: Tensor) -> None:
    parameter.grad = None
