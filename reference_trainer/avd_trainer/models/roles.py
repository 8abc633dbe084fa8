"""Who takes part in a run: roles, and the models that play them, sharded over the ranks."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from diffusers import WanTransformer3DModel
from torch import nn
from torch.distributed.fsdp import fully_shard

from avd_trainer.config.sections import LoRAConfig, OptimizerConfig, ParallelConfig
from avd_trainer.models.lora import start_adapter
from avd_trainer.models.sharding import checkpoint_blocks, compile_blocks, materialise, shard
from avd_trainer.models.transformer import DTYPES, VelocityModel, prepare, without_memory
from avd_trainer.models.weight_files import is_on_hub
from avd_trainer.models.weights import TransformerWeights, check_fit, load_into, open_weights
from avd_trainer.runtime.ranks import Ranks


@dataclass(frozen=True)
class Frozen:
    """The transformer of the run's ``teacher`` as it was loaded; it is not trained."""


@dataclass(frozen=True)
class Trained:
    """A transformer that starts from the run's ``teacher``.

    Attributes:
        optimizer: Options of its optimizer.
        lora: Train adapters on a base that all such roles share with the frozen one; None trains all weights.
        weights: What to start from in place of the teacher, if all weights are trained.
        own_moments: Parts of the method's turns whose optimizer has moments of its own. Adam divides a step by the size
            of the gradients it has seen, so where losses whose gradients differ in size take turns, with shared
            moments the smaller one hardly moves anything.
    """

    optimizer: OptimizerConfig
    lora: LoRAConfig | None = None
    weights: str | None = None
    own_moments: tuple[str, ...] = ()


def own_moments(role: Role) -> tuple[str, ...]:
    """The parts of a trained role's turns that have an optimizer of their own."""
    return role.own_moments if isinstance(role, Trained) else ()


class Reads(NamedTuple):
    """Features of a transformer's blocks that a built module reads.

    Attributes:
        role: Whose they are.
        blocks: How many blocks' outputs it is given, of a number of blocks.
        times: How often it is asked before its backward pass.
    """

    role: str
    blocks: Callable[[int], int]
    times: int


@dataclass(frozen=True)
class Built:
    """A module that the method builds, with random first weights that depend on the run's seed.

    Attributes:
        optimizer: Options of its optimizer.
        reads: The features that it is trained on, if any; for planning.
        build: Makes the module from the latent shape ``(C, F, H, W)`` of a clip and the keyword arguments of the run's
            transformers (empty if there are none), on the CPU, with draws from PyTorch's global generator.
    """

    optimizer: OptimizerConfig
    build: Callable[[Sequence[int], Mapping[str, Any]], nn.Module]
    reads: Reads | None = None


@dataclass(frozen=True)
class Average:
    """An exponential moving average of a trained role's weights.

    Attributes:
        of: The role whose weights are averaged.
        decay: For each optimizer step of that role that was not skipped, in [0, 1).
        asked: Whether the method asks a model that has the averaged weights. It is frozen, and follows by itself: where
            the role trains adapters, it is one more adapter on their base, or else a transformer of its own.
        warmup: Whether the decay starts low and rises with the number of updates to ``decay``, as for an average that
            is only exported, which should forget the first weights soon.
    """

    of: str
    decay: float
    asked: bool = False
    warmup: bool = True


Role = Frozen | Trained | Built | Average
Roles = Mapping[str, Role]


class Model(Protocol):
    """What plays a role. The method calls it, and the engine's optimizer changes it."""

    def __call__(self, *inputs: Any) -> Any: ...
    def named_parameters(self) -> Mapping[str, nn.Parameter] | Iterable[tuple[str, nn.Parameter]]:
        """The parameters of this role that are trained, by name."""


def trained_parameters(model: Model) -> dict[str, nn.Parameter]:
    """The parameters of a role that are trained, by name; empty for a frozen one."""
    return {name: parameter for name, parameter in dict(model.named_parameters()).items() if parameter.requires_grad}


def check_roles(roles: Roles, architecture: Mapping[str, Any]) -> None:
    """Refuse what can be refused before weights and data are read: weights that do not fit, blocks that are not there.

    Weights on the hub are not looked at; nothing is downloaded.

    Args:
        roles: The models that take part.
        architecture: Keyword arguments of their transformers.

    Raises:
        UserError: If weights are missing, damaged or of another architecture, or a module reads blocks beyond the last.
    """
    for role in roles.values():
        if isinstance(role, Built) and role.reads is not None:
            role.reads.blocks(architecture["num_layers"])
        if isinstance(role, Trained) and role.weights is not None and not is_on_hub(role.weights):
            with open_weights(role.weights, config=architecture) as own:
                check_fit(without_memory(dict(architecture)), own)


def load_models(
    roles: Roles,
    ranks: Ranks,
    *,
    teacher: str | None,
    latent_shape: Sequence[int],
    precision: str,
    parallel: ParallelConfig,
    seed: int,
) -> dict[str, Model]:
    """Build, shard and fill the models of a run.

    No rank ever holds a whole transformer: modules are built without memory and sharded, then each rank reads its part
    of the files.

    Args:
        roles: The models that take part. Averages belong to the engine, and get a model if the method asks one: it has
            no weights of worth until the engine keeps the averages in it.
        ranks: The processes of the run.
        teacher: What frozen and trained transformers start from; None if a method has none.
        latent_shape: ``(C, F, H, W)`` of a clip, which built modules may depend on.
        precision: What transformers compute in, ``float32`` or ``bfloat16``.
        parallel: Activation checkpointing and compilation.
        seed: Of first weights.

    Raises:
        UserError: If weights are missing, damaged or of another architecture.
    """
    dtype = DTYPES[precision]
    architecture: Mapping[str, Any] = {}
    if teacher is not None:
        with open_weights(teacher) as weights:
            architecture = weights.config
    models: dict[str, Model] = {
        name: _build_own(build_whole(role, latent_shape, architecture, seed), dtype, parallel, ranks)
        for name, role in roles.items()
        if isinstance(role, Built)
    }
    averages = {name: role.of for name, role in roles.items() if isinstance(role, Average) and role.asked}
    # An average that is asked is built as the role that it follows.
    played = {**roles, **{name: roles[of] for name, of in averages.items()}}
    from_teacher = {name: role for name, role in played.items() if isinstance(role, Frozen | Trained)}
    if not from_teacher:
        return models
    assert teacher is not None, "a configuration whose method needs a teacher has one"
    adapters = {name: role.lora for name, role in from_teacher.items() if isinstance(role, Trained) and role.lora}
    full = {name: role for name, role in from_teacher.items() if isinstance(role, Trained) and role.lora is None}
    with open_weights(teacher) as weights:
        if len(full) < len(from_teacher):
            base = _build(weights, adapters, dtype, parallel, ranks, seed, trainable=False)
            for name in from_teacher.keys() - full.keys():
                models[name] = VelocityModel(base, name if name in adapters else None, dtype)
        for name, role in full.items():
            module = _build(weights, {}, dtype, parallel, ranks, seed, trainable=True)
            if role.weights is not None:
                with open_weights(role.weights, config=weights.config) as own:
                    load_into(module, own)
            models[name] = VelocityModel(module, None, dtype)
    for name in averages:
        for parameter in averaged_weights(models[name]):
            parameter.requires_grad_(False)
    return models


def averaged_weights(model: Model) -> list[nn.Parameter]:
    """Where the weights of an average that is asked are, in the order of the trained ones that it follows."""
    assert isinstance(model, VelocityModel), "built modules have no copy that could be asked"
    return list(model.own_parameters().values())


def build_whole(role: Built, latent_shape: Sequence[int], architecture: Mapping[str, Any], seed: int) -> nn.Module:
    """A built module with its first weights, on the CPU, the same on any number of ranks."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return role.build(latent_shape, architecture)


def _build_own(module: nn.Module, dtype: torch.dtype, parallel: ParallelConfig, ranks: Ranks) -> Model:
    module = module.to(ranks.device)
    if isinstance(module, WanTransformer3DModel):
        if parallel.activation_checkpointing:
            checkpoint_blocks(module)
        if parallel.compile:
            compile_blocks(module)
        shard(module, dtype, ranks)
        return VelocityModel(module, None, dtype)
    fully_shard(module, mesh=ranks.mesh)
    return module


def _build(
    weights: TransformerWeights,
    adapters: dict[str, LoRAConfig],
    dtype: torch.dtype,
    parallel: ParallelConfig,
    ranks: Ranks,
    seed: int,
    *,
    trainable: bool,
) -> WanTransformer3DModel:
    model = without_memory(weights.config)
    prepare(model, adapters, dtype, trainable=trainable, checkpointing=parallel.activation_checkpointing)
    if parallel.compile:
        compile_blocks(model)
    shard(model, dtype, ranks)
    materialise(model, ranks.device)
    load_into(model, weights)
    for name, parameter in model.named_parameters():
        if ".lora_" in name:
            start_adapter(name, parameter, seed)
    return model
