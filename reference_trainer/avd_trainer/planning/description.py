"""What a plan has to know of a run: who takes part, how often each is asked, and how large everything is.

The one file of this room that reads a configuration. Memory, time and disk are computed from what :func:`describe`
gives, so that a method with other roles needs another description and nothing else.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from diffusers import WanTransformer3DModel

from avd_trainer.config.sections import CheckpointConfig, LoRAConfig, ShapesData, ShardsData, VideosData
from avd_trainer.data.in_memory import encode_shapes
from avd_trainer.data.moving_shapes import MovingShapes
from avd_trainer.data.shard_reading import ShardDataset
from avd_trainer.methods.base import Call, MethodConfig
from avd_trainer.models.architecture import ImageInput, image_input, latent_channels
from avd_trainer.models.codecs.block_dct import BlockDCTCodec
from avd_trainer.models.codecs.latent_space import SIZES, latent_shape_of
from avd_trainer.models.roles import Average, Built, Frozen, Reads, Trained
from avd_trainer.models.text_encoders.hashed import TEXT_LENGTH
from avd_trainer.models.weight_files import BUNDLED
from avd_trainer.models.weights import open_weights
from avd_trainer.runtime.errors import UserError
from avd_trainer.training.config import TrainConfig

WAN_TEXT_LENGTH = 512
"""Tokens of a prompt where the data is not there yet."""

_14B = {"num_attention_heads": 40, "ffn_dim": 13824, "num_layers": 40}
_IMAGE = {"in_channels": 36, "image_dim": 1280, "added_kv_proj_dim": 5120}

# The known models differ in these; the rest is diffusers' default.
_ARCHITECTURES: dict[str, dict[str, Any]] = {
    "Wan-AI/Wan2.1-T2V-1.3B-Diffusers": {"num_attention_heads": 12, "ffn_dim": 8960, "num_layers": 30},
    "Wan-AI/Wan2.1-T2V-14B-Diffusers": _14B,
    "Wan-AI/Wan2.1-I2V-14B-480P-Diffusers": _14B | _IMAGE,
    "Wan-AI/Wan2.1-I2V-14B-720P-Diffusers": _14B | _IMAGE,
}

_COMMON = {
    "attention_head_dim": 128,
    "freq_dim": 256,
    "text_dim": 4096,
    "in_channels": 16,
    "out_channels": 16,
    "patch_size": [1, 2, 2],
}

_TITLES = {"online": "online model"}

LatentShape = tuple[int, int, int, int]
"""``(C, F, H, W)``."""


class Role(NamedTuple):
    """A model that takes part.

    Attributes:
        name: As in the method: ``student``, ``teacher``, ``online``.
        title: In words.
        trained: Whether an optimizer steps on it.
        adapter: What is trained where it is not all weights; a base is then shared with the frozen models.
        averaged: Whether an average of what is trained is kept, and sampled from.
        adapter_setting: The key that would give it adapters; None where it cannot have any.
        followed_by: The role of a model that has the averaged weights; None where none is asked.
        built: Shapes of its parameters where it is a module of the method's own; None for a transformer.
        reads: The features that such a module is trained on.
        optimizers: How many of them step on it, each with moments of its own.
    """

    name: str
    title: str
    trained: bool = False
    adapter: LoRAConfig | None = None
    averaged: bool = False
    adapter_setting: str | None = None
    followed_by: str | None = None
    built: tuple[tuple[int, ...], ...] | None = None
    reads: Reads | None = None
    optimizers: int = 1

    @property
    def owns_weights(self) -> bool:
        """Whether it is a model of its own: all of its weights are trained."""
        return self.trained and self.adapter is None


class Batches(NamedTuple):
    """How an update is shared out.

    Attributes:
        share: Examples of a GPU in an update.
        micro: Examples of a forward.
    """

    share: int
    micro: int


class Run(NamedTuple):
    """A run on so many GPUs.

    Attributes:
        roles: Who takes part; those that share weights with a frozen model need one.
        main: The role that the run is about: what is sampled and exported.
        product_bytes: Of a number in what the run leaves of it: students are written in float32, others in bfloat16.
        calls: Who is asked how often in an update.
        steps: Updates.
        batch_size: Examples per update, over all GPUs.
        micro_batch_size: Examples of a forward; None for all of a GPU's share.
        can_accumulate: Whether a share may be run in parts.
        precision: What the models compute in.
        checkpointing: Whether blocks keep their inputs only, and compute the rest again.
        replicate: Groups of GPUs that each hold all shards.
        sampled: Clips that are sampled at once while training; 0 for none.
        checkpoint: When to save, and what to keep.
        clip_folders: Where encoded clips are, or will be; empty where clips are made when the run starts.
        architecture: Keyword arguments of ``WanTransformer3DModel``, as JSON.
        latent_shape: Of a clip.
        text_length: Tokens of a prompt.
        gpus: Number of GPUs, one rank on each.
    """

    roles: tuple[Role, ...]
    main: str
    product_bytes: int
    calls: tuple[Call, ...]
    steps: int
    batch_size: int
    micro_batch_size: int | None
    can_accumulate: bool
    precision: Literal["float32", "bfloat16"]
    checkpointing: bool
    replicate: int
    sampled: int
    checkpoint: CheckpointConfig
    clip_folders: tuple[Path, ...]
    architecture: str
    latent_shape: LatentShape
    text_length: int
    gpus: int

    @property
    def text_dim(self) -> int:
        """Width of a prompt's tokens."""
        return int(json.loads(self.architecture)["text_dim"])

    @property
    def image(self) -> ImageInput | None:
        """What the models read of an image; None for text to video."""
        return image_input(json.loads(self.architecture))

    @property
    def trained(self) -> tuple[Role, ...]:
        """Roles with an optimizer."""
        return tuple(role for role in self.roles if role.trained)

    @property
    def shards(self) -> int:
        """Over how many GPUs a model is spread.

        Raises:
            UserError: If ``parallel.replicate`` does not divide the number of GPUs.
        """
        if self.gpus < 1 or self.gpus % self.replicate:
            raise UserError(
                f"parallel.replicate is {self.replicate}, which does not divide {self.gpus} GPU(s). Choose a divisor."
            )
        return self.gpus // self.replicate

    @property
    def batches(self) -> Batches:
        """How an update is shared out.

        Raises:
            UserError: If it cannot be, in equal parts.
        """
        share, rest = divmod(self.batch_size, self.gpus)
        micro = self.micro_batch_size or share
        if rest or share % micro:
            raise UserError(
                f"batch_size {self.batch_size} cannot be shared out among {self.gpus} GPU(s) in forwards of "
                f"{self.micro_batch_size or 'equal'} example(s). Choose a multiple, or another number of GPUs."
            )
        return Batches(share, micro)


def describe(
    config: TrainConfig,
    architecture: Mapping[str, Any],
    latent_shape: Sequence[int],
    *,
    gpus: int,
    text_length: int = WAN_TEXT_LENGTH,
) -> Run:
    """What a plan has to know of a run.

    Args:
        config: The run.
        architecture: Keyword arguments of ``WanTransformer3DModel``, for example of :func:`find_architecture`.
        latent_shape: ``(C, F, H, W)`` of a clip.
        gpus: Number of GPUs, one rank on each.
        text_length: Tokens of a prompt.

    Raises:
        UserError: If the clip does not fit the model, or the batch or ``parallel.replicate`` the number of GPUs.
    """
    run = Run(
        roles=tuple(_roles(config, architecture, latent_shape)),
        main=config.method.main_role,
        product_bytes=2 if isinstance(config.method.roles()[config.method.main_role], Built) else 4,
        calls=tuple(config.method.calls(config.max_steps)),
        steps=config.max_steps,
        batch_size=config.batch_size,
        micro_batch_size=config.micro_batch_size,
        can_accumulate=_can_accumulate(config.method),
        precision=config.precision,
        checkpointing=config.parallel.activation_checkpointing,
        replicate=config.parallel.replicate,
        sampled=0 if config.samples.every is None else config.samples.count,
        checkpoint=config.checkpoint,
        clip_folders=config.data.path if isinstance(config.data, ShardsData) else (),
        architecture=json.dumps(dict(architecture), sort_keys=True),
        latent_shape=_check_shape(latent_shape, architecture),
        text_length=text_length,
        gpus=gpus,
    )
    _ = run.shards, run.batches  # what cannot be started cannot be planned
    return run


def architecture_of(config: TrainConfig) -> dict[str, Any]:
    """The architecture of a run's transformers. Nothing is downloaded.

    Raises:
        UserError: If it is not known here, or the method trains no transformer.
    """
    if config.teacher is not None:
        return find_architecture(config.teacher)
    own = config.method.transformer_config(None)
    if own is None:
        raise UserError(
            f"Method {config.method.kind} trains its {config.method.main_role}, which is no transformer, and a plan "
            "is of transformers. Choose another --method; docs/interpolator.md says what the interpolator needs."
        )
    return own


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


def find_latent_shape(config: TrainConfig) -> tuple[int, ...]:
    """The size ``(C, F, H, W)`` of a run's clips; where the data is not there yet, that of Wan2.1's 832x480x81."""
    data = config.data
    if isinstance(data, ShardsData):
        latent = ShardDataset(*data.path)[0].latent if are_there(data.path) else None
        return latent_shape_of(SIZES["wan"], "wan") if latent is None else tuple(latent.shape)
    assert isinstance(data, ShapesData | VideosData)  # videos are brought to the size of shapes
    return tuple(encode_shapes(MovingShapes(1, 0), BlockDCTCodec()).latents.shape[1:])


def find_text_length(config: TrainConfig) -> int:
    """Tokens of a prompt of a run; where the data is not there yet, Wan2.1's 512."""
    data = config.prompts or config.data
    if not isinstance(data, ShardsData):
        return TEXT_LENGTH
    return ShardDataset(*data.path).text_length if are_there(data.path) else WAN_TEXT_LENGTH


def are_there(folders: Sequence[Path]) -> bool:
    """Whether data was made already: all of its folders exist."""
    return bool(folders) and all(folder.exists() for folder in folders)


def _roles(config: TrainConfig, architecture: Mapping[str, Any], latent_shape: Sequence[int]) -> Iterator[Role]:
    roles = config.method.roles(config.student_weights)
    averaged = {role.of for role in roles.values() if isinstance(role, Average)}
    asked = {role.of: name for name, role in roles.items() if isinstance(role, Average) and role.asked}
    for name, role in roles.items():
        if isinstance(role, Built):
            with torch.device("meta"):
                module = role.build(latent_shape, architecture)
            shapes = tuple(tuple(parameter.shape) for parameter in module.parameters())
            built = None if isinstance(module, WanTransformer3DModel) else shapes
            yield Role(name, name, trained=True, averaged=name in averaged, built=built, reads=role.reads)
        if isinstance(role, Frozen):
            yield Role(name, name)
        if isinstance(role, Trained):
            # Adapters are of the teacher's weights, so a model with weights of its own cannot have any.
            own = role.weights is None and name in type(config.method).model_fields
            setting = f"method.{name}.lora" if own else None
            title = _TITLES.get(name, name)
            count = 1 + len(role.own_moments)
            yield Role(name, title, True, role.lora, name in averaged, setting, asked.get(name), optimizers=count)


def _can_accumulate(method: MethodConfig) -> bool:
    try:
        method.check_accumulation()
    except ValueError:
        return False
    return True


def _check_shape(shape: Sequence[int], architecture: Mapping[str, Any]) -> LatentShape:
    channels, patch = latent_channels(architecture), architecture["patch_size"]
    if len(shape) != 4 or shape[0] != channels or any(n < 1 or n % p for n, p in zip(shape[1:], patch, strict=True)):
        raise UserError(
            f"a clip's latent has the shape {list(shape)}, expected [C, F, H, W] with {channels} channels and the rest "
            f"divisible by the model's patches of {list(patch)}. Choose another size."
        )
    channels, frames, height, width = shape
    return channels, frames, height, width
