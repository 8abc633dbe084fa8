"""Floating-point operations of a model's passes, and of an update, counted on the meta device.

A multiplication and an addition are two operations. Matrix products, convolutions and attention are counted, as
``torch.utils.flop_counter`` counts them; norms, activations and the optimizer are not: they cost memory traffic, not
arithmetic.
"""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import torch
from torch.utils.flop_counter import FlopCounterMode

from avd_trainer.methods.base import Call
from avd_trainer.planning.description import LatentShape, Run
from avd_trainer.planning.meta_models import MetaModel, empty_inputs, meta_models, over_layers


class Operations(NamedTuple):
    """Operations of one example, as executed: what is computed again counts again."""

    forward: int
    """In passes without a backward pass."""
    training: int
    """In passes with one."""


def forward_operations(model: MetaModel, role: str, latent_shape: LatentShape, text_length: int) -> int:
    """Operations of a forward of one example.

    Args:
        model: The transformer.
        role: Who runs: its adapter is on.
        latent_shape: ``(C, F, H, W)`` of the example.
        text_length: Tokens of a prompt.
    """
    arguments = (role, latent_shape, text_length)
    return over_layers(lambda short: _count(short, *arguments), model.when_asked(role))[0]


def training_operations(
    model: MetaModel, role: str, latent_shape: LatentShape, text_length: int, *, recomputation: bool = True
) -> int:
    """Operations of a forward with gradient and its backward; arguments as for :func:`forward_operations`.

    ``recomputation=False`` counts nothing twice: neither what activation checkpointing computes again nor the scores
    of attention, which the backward kernel does. That is what a model FLOPs utilisation is of.
    """
    if not recomputation:
        model = model._replace(checkpointing=False)
    model, role = model.when_trained(role)
    options = {"backward": True, "recomputation": recomputation}
    return over_layers(lambda short: _count(short, role, latent_shape, text_length, **options), model)[0]


def update_operations(run: Run) -> Operations:
    """Operations of one example in an update, means over what is drawn."""
    models = meta_models(run)
    forward = training = 0.0
    for call in run.calls:
        if call.backward:
            training += call.forwards * _operations(call, models[call.role], run)
        else:
            forward += call.forwards * _operations(call, models[call.role], run)
    return Operations(round(forward), round(training))


def _operations(call: Call, model: MetaModel, run: Run) -> int:
    count = training_operations if call.backward else forward_operations
    return count(model, call.role, run.latent_shape, run.text_length)


@cache
def _count(
    model: MetaModel,
    role: str,
    latent_shape: LatentShape,
    text_length: int,
    *,
    backward: bool = False,
    recomputation: bool = True,
) -> tuple[int]:
    velocity_model = model.build_gathered(role)
    inputs = empty_inputs(model, 1, latent_shape, text_length)
    inputs[0].requires_grad_(backward and model.is_crossed(role))
    with FlopCounterMode(display=False) as counter, torch.set_grad_enabled(backward):
        velocity = velocity_model(*inputs)
        if backward:
            torch.autograd.backward(velocity, torch.empty_like(velocity))
    counts = counter.get_flop_counts()["Global"]
    total = sum(counts.values())
    if not recomputation:
        # One of the five products of attention's backward kernel.
        total -= counts.get(torch.ops.aten._scaled_dot_product_flash_attention_backward, 0) // 5
    return (int(total),)
