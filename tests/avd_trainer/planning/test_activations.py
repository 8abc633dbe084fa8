"""Activations, against real forwards of the same blocks."""

from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from avd_trainer.models.codecs.latent_space import latent_shape_of
from avd_trainer.models.condition import Condition
from avd_trainer.models.transformer import build_transformer
from avd_trainer.planning.activations import LiveTensors, training_activations
from avd_trainer.planning.description import describe
from avd_trainer.planning.meta_models import MetaModel, meta_models
from planned_runs import (
    ADAPTERS,
    ARCHITECTURE,
    SHAPE,
    SMALL,
    SMALL_SHAPE,
    SMALL_TEXT,
    config,
    fuse_rms_norm,
    nbytes,
)


def student_of(architecture: dict[str, Any], **changes: Any) -> MetaModel:
    return meta_models(describe(config(**changes), architecture, SHAPE, gpus=1))["student"]


def saved_for_backward(forward: Callable[[], Tensor], known: Iterable[Tensor]) -> int:
    """Bytes of what autograd keeps, and of the output; each storage once, those of ``known`` not at all."""
    known = {tensor.untyped_storage()._cdata for tensor in known}
    kept: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in known:
            kept[storage._cdata] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        keep(forward())
    return sum(storage.nbytes() for storage in kept.values())


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_block_keeps_as_much_on_the_meta_device_as_in_memory(monkeypatch: pytest.MonkeyPatch, precision: str) -> None:
    def saved(block: nn.Module, device: str) -> int:
        dtype = getattr(torch, precision)
        tokens, text, time = (torch.zeros(2, n, 128, device=device, dtype=dtype) for n in (30, 5, 6))
        table = torch.zeros(1, 30, 1, 32, device=device)
        known = [*block.parameters(), table]
        return saved_for_backward(lambda: block(tokens.requires_grad_(), text, time, (table, table)), known)

    real = build_transformer(SMALL)
    meta = student_of(dict(real.config), precision=precision).build_gathered(None).module
    # Only the GPU's kernel keeps the seeds of attention's dropout.
    seeds = 2 * (2 + 1) * 8
    planned = saved(meta.blocks[0], "meta") - seeds
    fuse_rms_norm(monkeypatch)
    assert planned == saved(real.blocks[0].to(getattr(torch, precision)), "cpu")


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_model_keeps_as_much_as_planned(monkeypatch: pytest.MonkeyPatch, checkpointing: bool) -> None:
    """Extrapolated from fewer blocks, beside a real forward of four."""
    model = build_transformer(SMALL).train()
    student = student_of(dict(model.config), parallel={"activation_checkpointing": checkpointing})
    planned = training_activations(student, "student", 2, SMALL_SHAPE, SMALL_TEXT[0])
    fuse_rms_norm(monkeypatch)
    if checkpointing:
        model.enable_gradient_checkpointing()
    inputs = torch.randn(2, *SMALL_SHAPE), torch.full((2,), 900.0), torch.randn(2, *SMALL_TEXT)
    known = [*model.parameters(), *model.buffers(), *inputs]
    real = saved_for_backward(lambda: model(*inputs, return_dict=False)[0], known)
    # Autograd does not see that checkpoints hold the rotary tables for when they run a block again.
    tables = nbytes(model.rope(inputs[0])) if checkpointing else 0
    assert planned.kept == pytest.approx(real + tables, rel=1e-3)
    assert planned.backward >= planned.forward >= planned.kept


@pytest.mark.parametrize("changes", [{}, ADAPTERS], ids=["full", "adapters"])
def test_few_blocks_say_what_many_take(changes: dict[str, Any]) -> None:
    """On full-size clips, whose activations outweigh everything that does not grow with the number of blocks."""
    shape = latent_shape_of("832x480x81", "wan")
    student = student_of(ARCHITECTURE | {"num_layers": 4}, precision="bfloat16", **changes)
    model = student.build_gathered("student")
    x_t, timesteps, text = (torch.empty(1, *rest, device="meta") for rest in (shape, (), (512, 4096)))
    for parameter in model.module.parameters():
        if parameter.requires_grad:
            parameter.register_post_accumulate_grad_hook(lambda parameter: setattr(parameter, "grad", None))
    with LiveTensors([*model.module.parameters(), *model.module.buffers(), x_t, timesteps, text]) as live:
        velocity = model(x_t, timesteps, Condition(text))
        kept, forward = live.now, live.peak
        torch.autograd.backward(velocity, torch.empty_like(velocity))
    assert training_activations(student, "student", 1, shape, 512) == (kept, forward, live.peak)


def test_live_tensors_are_counted_once_and_forgotten() -> None:
    known = torch.empty(100, device="meta")
    with LiveTensors([known]) as live:
        known.view(10, 10)
        first = known + 1
        assert live.now == 400
        second = first.reshape(10, 10).t()
        assert live.now == 400
        del first
        assert live.now == 400
        del second
        assert live.now == 0
    assert live.peak == 400
