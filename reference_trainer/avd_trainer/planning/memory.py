"""How much memory a run needs on each GPU, from shapes alone.

Models are built on the meta device, which has shapes and no memory, and run there: their activations are counted, not
estimated. What FSDP2 holds besides, and what lies outside PyTorch's allocator, is computed; docs/memory.md says how.
"""

from __future__ import annotations

import json
import math
import weakref
from bisect import bisect_left
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from diffusers import WanTransformer3DModel
from omegaconf import OmegaConf
from pydantic import BaseModel, ConfigDict, ValidationError
from rich.table import Table
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

from avd_trainer.config.sections import LoRAConfig, ShapesData, ShardsData, VideosData
from avd_trainer.data.in_memory import encode_shapes
from avd_trainer.data.moving_shapes import MovingShapes
from avd_trainer.data.shards import ShardDataset
from avd_trainer.models.codecs.block_dct import BlockDCTCodec
from avd_trainer.models.samplers import guided_velocity
from avd_trainer.models.text_encoders.hashed import TEXT_LENGTH
from avd_trainer.models.transformer import DTYPES, VelocityModel, computes_in_float32, empty_transformer, prepare
from avd_trainer.models.weights import BUNDLED, open_weights
from avd_trainer.runtime.errors import UserError
from avd_trainer.training.config import TrainConfig

GB = 2**30
"""Bytes of a GB, as graphics cards are sold: a card of 80 GB has 80 times this."""

CONTEXT = 0.8 * GB
"""Allowance for what CUDA and its libraries take before the first tensor."""
NCCL = 1.0 * GB
"""Allowance for NCCL's buffers, where there are several GPUs."""
FRAGMENTATION = 0.05
"""Allowance for gaps between tensors, as a share of them."""
LATENTS_IN_FLIGHT = 8
"""Tensors of a latent's size per sample that the losses hold at once: noise, predictions, their differences."""

# The known models differ in these; the rest is diffusers' default.
_ARCHITECTURES: dict[str, dict[str, Any]] = {
    "Wan-AI/Wan2.1-T2V-1.3B-Diffusers": {"num_attention_heads": 12, "ffn_dim": 8960, "num_layers": 30},
    "Wan-AI/Wan2.1-T2V-14B-Diffusers": {"num_attention_heads": 40, "ffn_dim": 13824, "num_layers": 40},
}
_COMMON = {"attention_head_dim": 128, "freq_dim": 256, "text_dim": 4096, "in_channels": 16, "patch_size": [1, 2, 2]}

_MOST_GPUS = 512
_META = torch.device("meta")


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


class Phase(_Frozen):
    """What one GPU holds at the worst moment of a phase of a step, in bytes."""

    name: str
    """What is done."""
    frozen_weights: int
    """The teacher, or the base that adapters share; this GPU's shard, in the compute precision."""
    trained_weights: int
    """Student and online model, or their adapters; float32 shards."""
    gradients: int
    """Of the model that is trained in this phase; float32 shards."""
    optimizer: int
    """Both optimizers' moments; float32 shards."""
    ema: int
    """The average of the student's weights, and while sampling the weights that it stands in for."""
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


class Change(_Frozen):
    """Something to change, and what it would bring. Includes the harmless ones named before it."""

    description: str
    """In words."""
    settings: tuple[str, ...]
    """As ``key=value`` for ``--set``."""
    gpus: int
    """Number of GPUs."""
    latent_shape: tuple[int, int, int, int]
    """Size of a clip."""
    needed: int
    """Bytes per GPU with all of that."""
    fits: bool
    """Whether that is enough."""


class MemoryPlan(_Frozen):
    """Memory of a run on each of its GPUs."""

    gpus: int
    """Number of GPUs."""
    gpu_memory: float
    """Memory of one, in GB of 2^30 bytes."""
    phases: tuple[Phase, ...]
    """The phases of a step that can be the worst one."""
    changes: tuple[Change, ...] = ()
    """What to change where it does not fit, in order of least harm."""

    @property
    def peak(self) -> Phase:
        """The phase that needs most."""
        return max(self.phases, key=lambda phase: phase.needed)

    @property
    def fits(self) -> bool:
        """Whether a GPU has what the worst phase needs."""
        return self.peak.needed <= self.gpu_memory * GB


def plan(
    config: TrainConfig,
    architecture: Mapping[str, Any],
    latent_shape: Sequence[int],
    *,
    gpus: int,
    gpu_memory: float,
    text_length: int = 512,
) -> MemoryPlan:
    """Say what a run needs on each GPU, and what to change if that is too much.

    Takes seconds and little memory for models of any size; reads no weights.

    Args:
        config: The run.
        architecture: Keyword arguments of ``WanTransformer3DModel``, for example of :func:`find_architecture`.
        latent_shape: ``(C, F, H, W)`` of a clip.
        gpus: Number of GPUs, one rank on each.
        gpu_memory: Memory of one GPU, in GB of 2^30 bytes.
        text_length: Tokens of a prompt. Wan2.1: 512.

    Raises:
        UserError: If the batch or ``parallel.replicate`` does not fit the number of GPUs, or the clip the model.
    """
    run = _Run(
        config,
        json.dumps(dict(architecture), sort_keys=True),
        _check_shape(latent_shape, architecture),
        gpus,
        text_length,
    )
    phases = tuple(_phases(run))
    result = MemoryPlan(gpus=gpus, gpu_memory=gpu_memory, phases=phases)
    return result if result.fits else result.model_copy(update={"changes": tuple(_changes(run, gpu_memory))})


def find_architecture(teacher: str) -> dict[str, Any]:
    """The architecture of a teacher that is on this machine, or of a known one on the Hugging Face hub.

    Args:
        teacher: As in ``TrainConfig.teacher``. Nothing is downloaded.

    Raises:
        UserError: If it is neither.
    """
    if teacher in _ARCHITECTURES and not Path(teacher).exists():
        return _COMMON | _ARCHITECTURES[teacher]
    if not teacher.startswith(BUNDLED) and not Path(teacher.partition("#")[0]).exists():
        raise UserError(
            f"{teacher} is not on this machine, and its architecture is not among the known ones "
            f"({', '.join(_ARCHITECTURES)}). Download it first, or set teacher to one of these."
        )
    with open_weights(teacher) as weights:
        return weights.config


def find_latent_shape(config: TrainConfig) -> tuple[int, int, int, int]:
    """The size ``(C, F, H, W)`` of a run's clips; where the data is not there yet, that of Wan2.1's 832x480x81."""
    data = config.data
    if isinstance(data, ShardsData):
        latent = ShardDataset(data.path)[0].latent if data.path.exists() else None
        return tuple(latent.shape) if latent is not None else wan_latent_shape("832x480x81")
    assert isinstance(data, ShapesData | VideosData)  # videos are brought to the size of shapes
    return tuple(encode_shapes(MovingShapes(1, 0), BlockDCTCodec()).latents.shape[1:])


def find_text_length(config: TrainConfig) -> int:
    """Tokens of a prompt of a run; where the data is not there yet, Wan2.1's 512."""
    data = config.prompts or config.data
    if not isinstance(data, ShardsData):
        return TEXT_LENGTH
    return ShardDataset(data.path).text_length if data.path.exists() else 512


def wan_latent_shape(size: str) -> tuple[int, int, int, int]:
    """The latent ``(16, F, H, W)`` of a video, given as ``WIDTHxHEIGHTxFRAMES``.

    Raises:
        UserError: If Wan2.1 cannot encode that size.
    """
    parts = size.lower().split("x")
    if len(parts) == 3 and all(part.isdigit() and int(part) > 0 for part in parts):
        width, height, frames = map(int, parts)
        if width % 16 == 0 and height % 16 == 0 and frames % 4 == 1:
            return 16, 1 + (frames - 1) // 4, height // 8, width // 8
    raise UserError(
        f"{size!r} is no size for Wan2.1: expected WIDTHxHEIGHTxFRAMES, width and height divisible by 16 and 1 + 4 n "
        "frames, for example 832x480x81."
    )


def render(result: MemoryPlan) -> Table:
    """A plan as a table for the terminal: parts by phase, the verdict, and what to change."""
    peak = result.peak
    table = Table(
        title=f"GB on each of {result.gpus} GPU(s) of {result.gpu_memory:g} GB",
        caption="\n".join(_describe(result)),
        caption_justify="left",
        caption_style="",
        show_footer=True,
    )
    table.add_column("", footer="together")
    for phase in result.phases:
        style = "bold" if phase is peak else ""
        table.add_column(phase.name, footer=_gb(phase.needed), justify="right", style=style)
    for part in PARTS:
        table.add_row(part.replace("_", " "), *(_gb(getattr(phase, part)) for phase in result.phases))
    return table


class Activations(NamedTuple):
    """Bytes that a model's forward and backward take, weights and gradients of weights left out."""

    kept: int
    """After the forward pass: for the backward pass, and the output."""
    forward: int
    """At most, in the forward pass."""
    backward: int
    """At most, in the backward pass."""


class MetaModel(NamedTuple):
    """A transformer as :func:`avd_trainer.models.roles.load_models` builds it, to be made without memory.

    Attributes:
        name: ``base``, which is frozen, or the role that trains all of its weights.
        architecture: Its keyword arguments, as JSON.
        adapters: Roles and their adapters.
        precision: What it computes in.
        checkpointing: Whether blocks keep their inputs only.
    """

    name: Literal["base", "student", "online"]
    architecture: str
    adapters: tuple[tuple[str, LoRAConfig], ...]
    precision: Literal["float32", "bfloat16"]
    checkpointing: bool

    @property
    def trainable(self) -> bool:
        """Whether all of its weights are trained."""
        return self.name != "base"

    def build(self, layers: int | None = None) -> WanTransformer3DModel:
        """The module on the meta device, its parameters in the types in which they are stored.

        Args:
            layers: How many blocks in place of its own number.
        """
        architecture = json.loads(self.architecture)
        if layers is not None:
            architecture["num_layers"] = layers
        model = empty_transformer(architecture, _META)
        prepare(
            model,
            dict(self.adapters),
            DTYPES[self.precision],
            trainable=self.trainable,
            checkpointing=self.checkpointing,
        )
        return model

    def build_gathered(self, role: str | None, layers: int | None = None) -> VelocityModel:
        """The model in a role, its parameters in the types in which it computes, with the kernels of a GPU.

        Args:
            role: Whose adapter is on; None for none.
            layers: How many blocks in place of its own number.
        """
        model = self.build(layers)
        dtype = DTYPES[self.precision]
        for name, parameter in model.named_parameters():
            parameter.data = parameter.data.to(torch.float32 if computes_in_float32(name) else dtype)
        for block in model.blocks:
            # In the block and not around the model: a checkpointed block runs again in the backward pass.
            block.forward = partial(_with_gpu_kernels, block.forward)
        adapter = role if role in dict(self.adapters) else None
        return VelocityModel(model, adapter, dtype)


def meta_models(config: TrainConfig, architecture: Mapping[str, Any]) -> dict[str, MetaModel]:
    """The transformer of each role (student, teacher, online); of roles that share one it is the same."""
    return _roles(config, json.dumps(dict(architecture), sort_keys=True))


def training_activations(
    model: MetaModel, role: str, batch: int, latent_shape: tuple[int, int, int, int], text_length: int
) -> Activations:
    """What a forward with gradient and its backward take.

    Args:
        model: The transformer.
        role: Who runs: its adapter is on.
        batch: Examples.
        latent_shape: ``(C, F, H, W)`` of one.
        text_length: Tokens of a prompt.
    """
    # What runs alike is run once: two full models, or two adapters of one kind.
    adapters = dict(model.adapters)
    alike = next((name for name, lora in model.adapters if lora == adapters.get(role)), role)
    model = model._replace(name="student") if model.trainable else model
    return _over_layers(partial(_run_training, model, alike, batch, latent_shape, text_length), model)


class _Run(NamedTuple):
    config: TrainConfig
    architecture: str
    latent_shape: tuple[int, int, int, int]
    gpus: int
    text_length: int


class _Parameter(NamedTuple):
    group: str
    shape: tuple[int, ...]
    itemsize: int
    trained_in: str | None

    def sharded(self, shards: int) -> int:
        """Numbers in a rank's shard, which is cut along the first dimension and padded to equal size."""
        first, *rest = self.shape or (1,)
        return math.ceil(first / shards) * math.prod(rest)


def _phases(run: _Run) -> Iterator[Phase]:
    config, shards = run.config, _shards(run)
    share, micro = _batches(run)
    roles = _roles(config, run.architecture)
    models = set(roles.values())
    stored = [parameter for model in models for parameter in _parameters(model)]
    trained = {role: [p for p in stored if p.trained_in == role] for role in ("student", "online")}
    weights = {role: sum(4 * p.sharded(shards) for p in parameters) for role, parameters in trained.items()}
    size = (run.latent_shape, run.text_length)
    step = _step_data(run, share, micro) + sum(map(_tables, models))

    def phase(name: str, *, gradients: int, activations: int, buffers: int, copies: int = 1) -> Phase:
        phase = Phase(
            name=name,
            frozen_weights=sum(p.itemsize * p.sharded(shards) for p in stored if p.trained_in is None),
            trained_weights=sum(weights.values()),
            gradients=gradients,
            # Two moments, and a number of steps for each parameter.
            optimizer=2 * sum(weights.values()) + 4 * sum(map(len, trained.values())),
            ema=copies * weights["student"],
            activations=activations,
            buffers=buffers + step,
            reserve=0,
        )
        reserve = CONTEXT + (NCCL if run.gpus > 1 else 0) + FRAGMENTATION * phase.needed
        return phase.model_copy(update={"reserve": int(reserve)})

    student = training_activations(roles["student"], "student", micro, *size)
    online = training_activations(roles["online"], "online", micro, *size)
    guided = _inference(roles["teacher"], config.guidance_scale, micro, *size)
    yield phase(
        "teacher's answer",
        # Before the first backward pass there are none.
        gradients=weights["student"] if share > micro else 0,
        activations=student.kept + guided,
        buffers=_gathered(roles["teacher"], shards),
    )
    yield phase(
        "student's update",
        gradients=weights["student"],
        activations=student.backward,
        buffers=_gathered(roles["student"], shards) + _scattered(roles["student"], "student"),
    )
    yield phase(
        "online update",
        gradients=weights["online"],
        activations=online.backward,
        buffers=_gathered(roles["online"], shards) + _scattered(roles["online"], "online"),
    )
    if config.samples.every is not None:
        yield phase(
            "sampling",
            gradients=0,
            activations=_inference(roles["student"], 1.0, config.samples.count, *size, role="student"),
            buffers=_gathered(roles["student"], shards),
            copies=2,
        )


def _changes(run: _Run, gpu_memory: float) -> Iterator[Change]:
    def change(description: str, run: _Run, settings: Sequence[str]) -> Change:
        needed = max(phase.needed for phase in _phases(run))
        return Change(
            description=description,
            settings=tuple(settings),
            gpus=run.gpus,
            latent_shape=run.latent_shape,
            needed=needed,
            fits=needed <= gpu_memory * GB,
        )

    config = run.config
    harmless = [("micro_batch_size=1", "one sample at a time")] if _batches(run).micro > 1 else []
    if not config.parallel.activation_checkpointing:
        harmless.append(("parallel.activation_checkpointing=true", "activation checkpointing"))
    adapters = [
        (f"{role}_lora.rank={LoRAConfig().rank}", f"LoRA for the {name}")
        for role, name in (("online", "online model"), ("student", "student"))
        if getattr(config, f"{role}_lora") is None
    ]
    settings: list[str] = []
    words: list[str] = []
    before_adapters: tuple[_Run, list[str]] = run, []
    found = False
    for setting, word in [*harmless, *adapters]:
        changed = _apply(config, [*settings, setting])
        if changed is None:
            continue
        settings, words = [*settings, setting], [*words, word]
        run = run._replace(config=changed)
        step = change(", ".join(words), run, settings)
        yield step
        if (setting, word) in harmless:
            before_adapters = run, settings
        if found := step.fits:
            break
    if more := _more_gpus(*before_adapters, change):
        yield more
    if not found and (shorter := _fewer_frames(run, settings, words, change)):
        yield shorter


_MakeChange = Callable[[str, _Run, Sequence[str]], Change]


def _more_gpus(run: _Run, settings: Sequence[str], change: _MakeChange) -> Change | None:
    """The least number of GPUs that is enough without touching what is trained."""
    batch_size = run.config.batch_size

    def with_gpus(gpus: int) -> Change:
        own = [*settings, f"batch_size={gpus}"] if gpus > batch_size else list(settings)
        config = run.config.model_copy(update={"batch_size": max(gpus, batch_size)})
        words = f"{gpus} GPUs" + (f" and a batch of {gpus}" if gpus > batch_size else "")
        return change(words, run._replace(config=config, gpus=gpus), own)

    numbers = range(2 * run.gpus, _MOST_GPUS + 1, run.gpus)
    # A number that divides the batch leaves the run as it is; beyond, the batch grows to one sample for each.
    dividing = [number for number in numbers if batch_size % number == 0]
    return _first_that_fits(dividing, with_gpus) or _first_that_fits([n for n in numbers if n > batch_size], with_gpus)


def _fewer_frames(run: _Run, settings: Sequence[str], words: Sequence[str], change: _MakeChange) -> Change | None:
    """The longest clips that fit."""
    channels, frames, *size = run.latent_shape

    def with_frames(number: int) -> Change:
        word = f"clips of {number} latent frames in place of {frames}, encoded anew"
        return change(", ".join([*words, word]), run._replace(latent_shape=(channels, number, *size)), settings)

    return _first_that_fits(range(frames - 1, 0, -1), with_frames)


def _first_that_fits(numbers: Sequence[int], change: Callable[[int], Change]) -> Change | None:
    """By bisection: of ``numbers`` each takes no more than those before it."""
    place = bisect_left(numbers, True, key=lambda number: change(number).fits)
    return change(numbers[place]) if place < len(numbers) else None


def _apply(config: TrainConfig, settings: Sequence[str]) -> TrainConfig | None:
    """The configuration with these settings, or None where they contradict it."""
    values = OmegaConf.merge(OmegaConf.create(config.model_dump(mode="json")), OmegaConf.from_dotlist(list(settings)))
    try:
        return TrainConfig.model_validate(OmegaConf.to_container(values))
    except ValidationError:
        return None


def _roles(config: TrainConfig, architecture: str) -> dict[str, MetaModel]:
    lora = {"student": config.student_lora, "online": config.online_lora}
    adapters = tuple((role, options) for role, options in lora.items() if options is not None)
    own = (config.precision, config.parallel.activation_checkpointing)
    base = MetaModel("base", architecture, adapters, *own)
    full = {role: MetaModel(role, architecture, (), *own) for role, options in lora.items() if options is None}
    return {"teacher": base} | {role: full.get(role, base) for role in lora}


def _shards(run: _Run) -> int:
    replicate = run.config.parallel.replicate
    if run.gpus < 1 or run.gpus % replicate:
        raise UserError(
            f"parallel.replicate is {replicate}, which does not divide {run.gpus} GPU(s). Choose a divisor."
        )
    return run.gpus // replicate


class _Batches(NamedTuple):
    share: int
    """Examples of a rank in an update."""
    micro: int
    """Examples of a forward."""


def _batches(run: _Run) -> _Batches:
    share, rest = divmod(run.config.batch_size, run.gpus)
    micro = run.config.micro_batch_size or share
    if rest or share % micro:
        raise UserError(
            f"batch_size {run.config.batch_size} cannot be shared out among {run.gpus} GPU(s) in forwards of "
            f"{run.config.micro_batch_size or 'equal'} sample(s). Choose a multiple, or another number of GPUs."
        )
    return _Batches(share, micro)


def _check_shape(shape: Sequence[int], architecture: Mapping[str, Any]) -> tuple[int, int, int, int]:
    channels, patch = architecture["in_channels"], architecture["patch_size"]
    if len(shape) != 4 or shape[0] != channels or any(n < 1 or n % p for n, p in zip(shape[1:], patch, strict=True)):
        raise UserError(
            f"a clip's latent has the shape {list(shape)}, expected [C, F, H, W] with {channels} channels and the rest "
            f"divisible by the model's patches of {list(patch)}. Choose another size."
        )
    return tuple(shape)


@cache
def _parameters(model: MetaModel) -> list[_Parameter]:
    return [_parameter(model, name, parameter) for name, parameter in model.build().named_parameters()]


def _parameter(model: MetaModel, name: str, parameter: nn.Parameter) -> _Parameter:
    # The groups that FSDP2 gathers as one.
    group = (
        ".".join(name.split(".")[:2]) if name.startswith("blocks.") else "time" if computes_in_float32(name) else "root"
    )
    adapter = next((role for role, _ in model.adapters if f".{role}." in name and ".lora_" in name), None)
    trained_in = model.name if model.trainable else adapter
    return _Parameter(group, tuple(parameter.shape), parameter.itemsize, trained_in)


def _gathered(model: MetaModel, shards: int) -> int:
    """Weights of a model that FSDP2 has put together while a block runs."""
    itemsize = DTYPES[model.precision].itemsize
    sizes = dict.fromkeys((p.group for p in _parameters(model)), 0)
    for p in _parameters(model):
        sizes[p.group] += p.sharded(shards) * shards * (4 if p.group == "time" else itemsize)
    block = max((size for group, size in sizes.items() if group.startswith("blocks.")), default=0)
    # With several shards the next block, or the message that this one came in, is there besides, and what this rank
    # sends. A single rank copies a block when it needs it.
    copies = 1 if shards == 1 else 2 + 1 / shards
    return int(sizes["root"] + sizes["time"] + copies * block)


def _scattered(model: MetaModel, role: str) -> int:
    """A block's gradients as computed, and in float32 those of the block before it, on their way to the shards."""
    sizes: dict[str, int] = {}
    for p in _parameters(model):
        if p.trained_in == role and p.group.startswith("blocks."):
            sizes[p.group] = sizes.get(p.group, 0) + math.prod(p.shape)
    return max(sizes.values(), default=0) * (DTYPES[model.precision].itemsize + 4)


@cache
def _tables(model: MetaModel) -> int:
    return sum(buffer.nbytes for buffer in model.build(layers=1).buffers())


def _step_data(run: _Run, share: int, micro: int) -> int:
    text = 4 * run.text_length * json.loads(run.architecture)["text_dim"]
    latent = 4 * math.prod(run.latent_shape)
    # The step's samples and their prompts; the clips' prompts, and the negative one.
    return share * (text + latent) + micro * text + text + micro * LATENTS_IN_FLIGHT * latent


def _inference(
    model: MetaModel,
    guidance: float,
    batch: int,
    latent_shape: tuple[int, int, int, int],
    text_length: int,
    role: str | None = None,
) -> int:
    """What a forward without gradient takes at most."""
    # Without gradient only an adapter that is on makes a difference.
    adapters = tuple((name, lora) for name, lora in model.adapters if name == role)
    model = model._replace(name="base", adapters=adapters, checkpointing=False)
    measure = partial(_run_inference, model, role, guidance, batch, latent_shape, text_length)
    return _over_layers(measure, model).forward


def _over_layers(measure: Callable[[int], Activations], model: MetaModel) -> Activations:
    """Two and three blocks say what any number takes: each further one keeps as much as the third.

    The first is another matter: where the embeddings are frozen, nothing flows back through its input.
    """
    layers = json.loads(model.architecture)["num_layers"]
    if layers <= 3:
        return measure(layers)
    two, three = measure(2), measure(3)
    return Activations(*(a + (layers - 2) * (b - a) for a, b in zip(two, three, strict=True)))


@cache
def _run_training(
    model: MetaModel, role: str, batch: int, latent_shape: tuple[int, ...], text_length: int, layers: int
) -> Activations:
    velocity_model = model.build_gathered(role, layers)
    module = velocity_model.module
    inputs = _inputs(module, batch, latent_shape, text_length)
    adapter = velocity_model.adapter
    for name, parameter in module.named_parameters():
        # The other role's adapter takes no part; gradients are counted elsewhere.
        if parameter.requires_grad and (adapter is None or f".{adapter}." in name):
            parameter.register_post_accumulate_grad_hook(_drop_gradient)
    with LiveTensors([*module.parameters(), *module.buffers(), *inputs]) as live:
        velocity = velocity_model(*inputs)
        kept, forward = live.now, live.peak
        velocity.backward(torch.empty_like(velocity))
    return Activations(kept, forward, live.peak)


@cache
def _run_inference(
    model: MetaModel,
    role: str | None,
    guidance: float,
    batch: int,
    latent_shape: tuple[int, ...],
    text_length: int,
    layers: int,
) -> Activations:
    velocity_model = model.build_gathered(role, layers)
    module = velocity_model.module
    x_t, timesteps, text = _inputs(module, batch, latent_shape, text_length)
    with LiveTensors([*module.parameters(), *module.buffers(), x_t, timesteps, text]) as live, torch.no_grad():
        guided_velocity(velocity_model, x_t, timesteps, text, text[0], guidance)
    return Activations(0, live.peak, 0)


def _inputs(module: WanTransformer3DModel, batch: int, latent_shape: Sequence[int], text_length: int) -> list[Tensor]:
    shapes = [(batch, *latent_shape), (batch,), (batch, text_length, module.config.text_dim)]
    return [torch.empty(shape, device=_META) for shape in shapes]


def _drop_gradient(parameter: Tensor) -> None:
    parameter.grad = None


class LiveTensors(TorchDispatchMode):
    """Counts the bytes of tensors that are made within and are still in use; each storage once, views not at all.

    Args:
        known: Tensors not to count.

    Attributes:
        now: Bytes in use.
        peak: The most that were.
    """

    def __init__(self, known: Sequence[Tensor] = ()) -> None:
        super().__init__()
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


_FLASH = torch.ops.aten._scaled_dot_product_flash_attention
_FLASH_BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_backward.default


class _GPUKernels(TorchFunctionMode):
    """Stands in for what PyTorch computes by one kernel on a GPU.

    On the meta device it would take them apart: attention into a matrix of all tokens by all tokens, and a norm into
    copies of its input in float32.
    """

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            query, key, value = [*args, *(kwargs[name] for name in ("query", "key", "value")[len(args) :])][:3]
            return _FLASH(query, key, value)[0]
        if func is F.rms_norm:
            return _RMSNorm.apply(args[0], kwargs["weight"])
        return func(*args, **kwargs)


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


def _describe(result: MemoryPlan) -> Iterator[str]:
    peak = result.peak
    verdict = "It fits" if result.fits else "It does not fit"
    yield (
        f"{verdict}: the worst moment is {peak.name}, with {_gb(peak.needed)} GB of {result.gpu_memory:g} "
        f"({_gb(peak.allocated)} in tensors)."
    )
    if result.changes:
        yield "What would change that:"
    for change in result.changes:
        settings = " ".join(f"--set {setting}" for setting in change.settings)
        enough = "fits" if change.fits else "too much"
        yield f"  {change.description}: {_gb(change.needed)} GB, {enough}" + (f" ({settings})" if settings else "")


def _gb(size: int) -> str:
    return f"{size / GB:.1f}"
