"""The three models of a run, sharded over its ranks: student, frozen teacher, online model."""

from __future__ import annotations

from typing import NamedTuple

from diffusers import WanTransformer3DModel

from avd_trainer.config.run import TrainConfig
from avd_trainer.config.sections import LoRAConfig
from avd_trainer.models.lora import start_adapter
from avd_trainer.models.sharding import materialise, shard
from avd_trainer.models.transformer import DTYPES, VelocityModel, prepare, without_memory
from avd_trainer.models.weights import TransformerWeights, load_into, open_weights
from avd_trainer.runtime.ranks import Ranks


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


def _build(
    weights: TransformerWeights, adapters: dict[str, LoRAConfig], config: TrainConfig, ranks: Ranks, *, trainable: bool
) -> WanTransformer3DModel:
    model = without_memory(weights.config)
    dtype = DTYPES[config.precision]
    prepare(model, adapters, dtype, trainable=trainable, checkpointing=config.parallel.activation_checkpointing)
    if config.parallel.compile:
        model.compile_repeated_blocks()
    shard(model, dtype, ranks)
    materialise(model, ranks.device)
    load_into(model, weights)
    for name, parameter in model.named_parameters():
        if ".lora_" in name:
            start_adapter(name, parameter, config.seed)
    return model
