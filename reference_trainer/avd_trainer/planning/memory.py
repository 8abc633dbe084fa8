"""How much memory a run needs on each GPU, phase by phase.

Activations are counted by running the models on the meta device. What FSDP2 holds besides, and what lies outside
PyTorch's allocator, is computed; docs/memory.md says how.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator

from pydantic import BaseModel, ConfigDict

from avd_trainer.methods.base import Call
from avd_trainer.models.image_encoder import IMAGE_TOKENS
from avd_trainer.models.roles import Reads
from avd_trainer.models.transformer import DTYPES
from avd_trainer.planning.activations import derivative_activations, inference_activations, training_activations
from avd_trainer.planning.description import Role, Run
from avd_trainer.planning.meta_models import MetaModel, meta_models, parameter_shapes, tables, trained_shapes

GB = 2**30
"""Bytes of a GB, as graphics cards are sold: a card of 80 GB has 80 times this."""

CONTEXT = 0.8 * GB
"""Allowance for what CUDA and its libraries take before the first tensor."""
NCCL = 1.0 * GB
"""Allowance for NCCL's buffers, where there are several GPUs."""
FRAGMENTATION = 0.05
"""Allowance for gaps between tensors, as a share of them."""
LATENTS_IN_FLIGHT = 8
"""Tensors of a latent's size per example that the losses hold at once: noise, predictions, their differences."""


class Phase(BaseModel):
    """What one GPU holds at the worst moment of a phase of a step, in bytes."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    name: str
    """What is done."""
    frozen_weights: int
    """Of frozen models and of the base that adapters share; this GPU's shard, in the compute precision."""
    trained_weights: int
    """Of all trained models, or their adapters; float32 shards."""
    gradients: int
    """Of the model that is trained in this phase; float32 shards."""
    optimizer: int
    """All optimizers' moments; float32 shards."""
    ema: int
    """Averages of weights, and while sampling the weights that they stand in for."""
    activations: int
    """What is kept for the backward pass and what is computed on the way, attention's workspace included."""
    buffers: int
    """Weights gathered from all shards, gradients before they are scattered, latents, text, rotary tables."""
    reserve: int
    """Allowance for what lies outside PyTorch's allocator or between its tensors."""

    @property
    def allocated(self) -> int:
        """Bytes in tensors: what ``torch.cuda.max_memory_allocated`` would say."""
        return self.needed - self.reserve

    @property
    def needed(self) -> int:
        """Bytes that the GPU must have."""
        return sum(getattr(self, part) for part in PARTS)


PARTS = tuple(name for name in Phase.model_fields if name != "name")
"""The parts of a phase, in the order in which they are shown."""


def plan_memory(run: Run) -> tuple[Phase, ...]:
    """The phases of a step that can be the worst one, on each GPU of a run.

    Takes seconds and little memory for models of any size; reads no weights.
    """
    return tuple(_phases(run))


def worst(phases: tuple[Phase, ...]) -> Phase:
    """The phase that needs most."""
    return max(phases, key=lambda phase: phase.needed)


def _phases(run: Run) -> Iterator[Phase]:
    models, micro = meta_models(run), run.batches.micro
    size = (run.latent_shape, run.text_length)
    weights = {
        role: sum(4 * shape.sharded(run.shards) for shape in shapes) for role, shapes in trained_shapes(run).items()
    }
    for call in run.calls:
        if call.differentiated:
            yield _phase(
                run,
                f"{call.role} derivative",
                gradients=weights[call.role] if run.batches.share > micro else 0,
                activations=derivative_activations(models[call.role], call.role, micro, *size),
                buffers=_gathered(models[call.role], run.shards),
            )
    answers = tuple(_answer(run, call, weights) for call in run.calls if call.beside)
    if answers:
        yield worst(answers)
    for role in run.trained:
        if role.built is not None:
            yield _built_update(run, role, weights[role.name])
            continue
        model = models[role.name]
        yield _phase(
            run,
            f"{role.name} update",
            gradients=weights[role.name],
            activations=training_activations(model, role.name, micro, *size).backward,
            buffers=_gathered(model, run.shards) + _scattered(model, role.name),
        )
    if run.sampled:
        yield _phase(
            run,
            "sampling",
            activations=inference_activations(models[run.main], run.main, run.sampled, *size),
            buffers=_gathered(models[run.main], run.shards),
            copies=2,
        )


def _built_update(run: Run, role: Role, gradients: int) -> Phase:
    """A module of the method's own is trained, perhaps on the features of a transformer."""
    activations, buffers = 0, 2 * sum(4 * math.prod(shape) for shape in role.built or ())  # weights, gradients
    if role.reads is not None:
        model, micro = meta_models(run)[role.reads.role], run.batches.micro
        asked = inference_activations(model, role.reads.role, micro, run.latent_shape, run.text_length)
        activations = asked + role.reads.times * _features(run, role.reads)
        buffers += _gathered(model, run.shards)
    return _phase(run, f"{role.name} update", gradients=gradients, activations=activations, buffers=buffers)


def _features(run: Run, reads: Reads) -> int:
    """What a module keeps for its backward pass of the features that it reads at once: these, and normalised ones."""
    architecture = json.loads(run.architecture)
    tokens = math.prod(n // p for n, p in zip(run.latent_shape[1:], architecture["patch_size"], strict=True))
    width = architecture["num_attention_heads"] * architecture["attention_head_dim"]
    features: int = reads.blocks(architecture["num_layers"]) * run.batches.micro * tokens * width
    return 2 * 4 * features


def _answer(run: Run, call: Call, weights: dict[str, int]) -> Phase:
    """A model is asked while the graph of another waits."""
    assert call.beside is not None
    models, (share, micro) = meta_models(run), run.batches
    size = (run.latent_shape, run.text_length)
    kept = training_activations(models[call.beside], call.beside, micro, *size).kept
    if call.backward:  # the gradient crosses it on the way to what it was asked about
        asked = training_activations(models[call.role], call.role, micro, *size).backward
        readers = (role.reads for role in run.roles if role.reads is not None and role.reads.role == call.role)
        asked += sum(_features(run, reads) for reads in readers)
    else:
        asked = inference_activations(models[call.role], call.role, micro, *size, guidance_scale=call.guidance_scale)
    return _phase(
        run,
        f"{call.role} answer",
        # Before the first backward pass there are none.
        gradients=weights[call.beside] if share > micro else 0,
        activations=kept + asked,
        buffers=_gathered(models[call.role], run.shards),
    )


def _phase(run: Run, name: str, *, activations: int, buffers: int, gradients: int = 0, copies: int = 1) -> Phase:
    """A phase, and what is there in each of them; ``copies`` are those of averaged weights."""
    models = set(meta_models(run).values())
    trained = trained_shapes(run)
    weights = {role: sum(4 * shape.sharded(run.shards) for shape in shapes) for role, shapes in trained.items()}
    phase = Phase(
        name=name,
        frozen_weights=sum(
            shape.itemsize * shape.sharded(run.shards)
            for model in models
            for shape in parameter_shapes(model)
            if shape.trained_in is None
        ),
        trained_weights=sum(weights.values()),
        gradients=gradients,
        # Two moments, and a number of steps for each parameter.
        optimizer=sum(role.optimizers * (2 * weights[role.name] + 4 * len(trained[role.name])) for role in run.trained),
        ema=copies * sum(weights[role.name] for role in run.trained if role.averaged),
        activations=activations,
        buffers=buffers + _step_data(run) + sum(map(tables, models)),
        reserve=0,
    )
    reserve = CONTEXT + (NCCL if run.gpus > 1 else 0) + FRAGMENTATION * phase.needed
    return phase.model_copy(update={"reserve": int(reserve)})


def _gathered(model: MetaModel, shards: int) -> int:
    """Weights of a model that FSDP2 has put together while a block runs."""
    itemsize = DTYPES[model.precision].itemsize
    shapes = parameter_shapes(model)
    sizes = dict.fromkeys((shape.group for shape in shapes), 0)
    for shape in shapes:
        sizes[shape.group] += shape.sharded(shards) * shards * (4 if shape.group == "time" else itemsize)
    block = max((size for group, size in sizes.items() if group.startswith("blocks.")), default=0)
    # With several shards the next block, or the message that this one came in, is there besides, and what this rank
    # sends. A single rank copies a block when it needs it.
    copies = 1 if shards == 1 else 2 + 1 / shards
    return int(sizes["root"] + sizes["time"] + copies * block)


def _scattered(model: MetaModel, role: str) -> int:
    """A block's gradients as computed, and in float32 those of the block before it, on their way to the shards."""
    sizes: dict[str, int] = {}
    for shape in parameter_shapes(model):
        if shape.trained_in == role and shape.group.startswith("blocks."):
            sizes[shape.group] = sizes.get(shape.group, 0) + math.prod(shape.shape)
    return max(sizes.values(), default=0) * (DTYPES[model.precision].itemsize + 4)


def _step_data(run: Run) -> int:
    share, micro = run.batches
    text = 4 * run.text_length * run.text_dim
    latent = 4 * math.prod(run.latent_shape)
    condition = text + image_bytes(run)
    # The step's samples and their conditions; the clips' conditions, and the negative prompt.
    return share * (condition + latent) + micro * condition + text + micro * LATENTS_IN_FLIGHT * latent


def image_bytes(run: Run) -> int:
    """What an example holds of its first frame, in float32; 0 for text to video."""
    if run.image is None:
        return 0
    latents = run.image.channels * math.prod(run.latent_shape[1:])
    return 4 * (latents + IMAGE_TOKENS * (run.image.embedding_dim or 0))
