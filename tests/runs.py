"""Runs small enough for a second, and what they leave behind: one layer, latents of 3 frames of 4 x 4."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from diffusers import WanTransformer3DModel
from torch import Tensor

from avd_trainer.config.sections import ArchitectureConfig
from avd_trainer.data.in_memory import CaptionedLatents, InMemoryData
from avd_trainer.data.order import ShuffledOrder
from avd_trainer.data.sources import TrainingData, load_data
from avd_trainer.methods.registry import load_method
from avd_trainer.models.condition import Condition
from avd_trainer.models.roles import Model, load_models
from avd_trainer.models.text_encoders.hashed import HashTextEmbedding
from avd_trainer.runtime.draws import seed_of
from avd_trainer.runtime.ranks import Ranks
from avd_trainer.training.checkpoint import list_checkpoints
from avd_trainer.training.config import TrainConfig
from avd_trainer.training.trainer import Trainer

MakeConfig = Callable[..., TrainConfig]
MakeTrainer = Callable[..., Trainer]

ARCHITECTURE = ArchitectureConfig(
    num_attention_heads=1, attention_head_dim=12, ffn_dim=16, num_layers=1, freq_dim=8, text_dim=6
)
EMBED = HashTextEmbedding(4, 6)
"""Of prompts, as that architecture takes them."""
LATENT_SHAPE = (16, 3, 4, 4)
LORA = {"rank": 2, "alpha": 2.0}

_HEAD = {"width": 32, "optimizer": {"lr": 1e-3, "betas": [0.0, 0.9]}}
_DISTILLATION = {role: {"optimizer": {"lr": 1e-3}} for role in ("student", "online")}
_METHODS: dict[str, dict[str, Any]] = {
    "avd": _DISTILLATION,
    "dmd": _DISTILLATION,
    "vpae": {**_DISTILLATION, "head": _HEAD, "online": {**_DISTILLATION["online"], "lora": None}},
    "dmd2": {**_DISTILLATION, "head": _HEAD},
    "rcm": _DISTILLATION,
    "scm": {"student": _DISTILLATION["student"]},
    "data_forcing": _DISTILLATION,
    "regression": {"student": _DISTILLATION["student"]},
    "lcm": {"student": _DISTILLATION["student"]},
    "pcm": {"student": _DISTILLATION["student"]},
    "dcm": {"student": _DISTILLATION["student"], "detail": {"head": {**_HEAD, "kind": "light"}}},
    "flow_matching": {"architecture": ARCHITECTURE.model_dump()},
    "frame_interpolation": {"widths": [8, 8, 8], "optimizer": {"lr": 1e-2}},
}


def tiny_config(
    teacher: Path | str, kind: str = "avd", method: Mapping[str, Any] | None = None, **changes: Any
) -> TrainConfig:
    """A run of a method.

    Args:
        teacher: Where the method's transformers start from, if it has a teacher.
        kind: The method.
        method: Values of its section, merged over small ones.
        changes: Other sections and values, in place of small ones.
    """
    values: dict[str, Any] = {"data": {"kind": "shapes"}, "max_steps": 3, "batch_size": 2}
    if load_method(kind).Config.needs_teacher:
        values["teacher"] = str(teacher)
    section = _merge(_METHODS[kind], method or {})
    return TrainConfig.model_validate({**values, "method": {"kind": kind, **section}, **changes})


def ten_clips() -> CaptionedLatents:
    """Random latents of that shape, and captions."""
    draws = torch.Generator().manual_seed(1)
    return CaptionedLatents(torch.randn(10, *LATENT_SHAPE, generator=draws), [f"clip {n}" for n in range(10)])


def in_memory(
    latents: CaptionedLatents | Tensor, embed: HashTextEmbedding = EMBED, *, image: bool = False
) -> InMemoryData:
    """Clips as examples; bare latents get empty captions."""
    clips = CaptionedLatents(latents, [""] * len(latents)) if isinstance(latents, Tensor) else latents
    return InMemoryData(clips, embed, image=image)


def both(clips: InMemoryData) -> TrainingData:
    """What a run reads, with the captions of its clips as prompts."""
    return TrainingData(clips, clips)


def load_data_of(config: TrainConfig) -> TrainingData:
    """What a run reads, as ``avd train`` loads it."""
    return load_data(
        config.data,
        config.prompts,
        teacher=config.teacher,
        architecture=config.method.transformer_config(config.teacher),
        text=config.method.needs_text,
        held_out=config.method.held_out_clips,
    )


def load_models_of(config: TrainConfig, ranks: Ranks) -> dict[str, Model]:
    """The models of a run, as the engine loads them."""
    return load_models(
        config.method.roles(config.student_weights),
        ranks,
        teacher=config.teacher,
        latent_shape=LATENT_SHAPE,
        precision=config.precision,
        parallel=config.parallel,
        seed=config.seed,
    )


def order_of(name: str, count: int = 10, seed: int = 0) -> ShuffledOrder:
    """In which order the engine reads ``prompts`` or ``clips``, of which there are so many."""
    return ShuffledOrder(count, seed_of(seed, "order", name))


def first_step(trainer: Trainer) -> dict[str, Tensor]:
    """The metrics of a trainer's next step."""
    return next(trainer.run())


def step_gradients(trainer: Trainer, metrics: dict[str, Tensor] | None = None) -> Tensor:
    """What the main role's optimizer is given in the first step, whose metrics are added to ``metrics``."""
    seen: list[Tensor] = []

    def look(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        (group,) = optimizer.param_groups
        seen.append(torch.cat([p.grad.full_tensor().flatten() for p in group["params"]]))

    trainer.optimizers[trainer.main_role, ""].register_step_pre_hook(look)
    (metrics if metrics is not None else {}).update(first_step(trainer))
    return seen[0]


def model_inputs(text_dim: int) -> tuple[Tensor, Tensor, Condition]:
    """Noised clips, timesteps and condition for a forward."""
    draws = torch.Generator().manual_seed(2)
    x_t, text = torch.randn(2, *LATENT_SHAPE, generator=draws), torch.randn(2, 4, text_dim, generator=draws)
    return x_t, torch.tensor([757.0, 300.0]), Condition(text)


@torch.no_grad()
def student_velocity(trainer: Trainer, weights: str, inputs: tuple[Tensor, Tensor, Condition]) -> Tensor:
    """What a trainer's student predicts, with its averaged weights (``ema``) or its last (``student``)."""
    with trainer.averages["ema"].average_parameters() if weights == "ema" else nullcontext():
        velocity: Tensor = trainer.models["student"](*inputs)
    return velocity


def weights(model: Any) -> Tensor:
    """All weights of a model, adapters included, in one copy."""
    module = getattr(model, "module", model)
    parameters = (parameter.detach() for parameter in module.parameters())
    return torch.cat([(p.full_tensor() if hasattr(p, "full_tensor") else p).flatten() for p in parameters])


# --- What a run leaves


def exported(folder: Path) -> dict[str, Tensor]:
    """The weights of an exported transformer, as a person loads it."""
    return dict(WanTransformer3DModel.from_pretrained(folder).named_parameters())


def assert_same_tensors(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """The same tensors by name, to the bit."""
    assert actual.keys() == expected.keys()
    assert all(torch.equal(actual[name], expected[name]) for name in expected)


def saved_steps(folder: Path) -> list[int]:
    """Steps of the checkpoints in a run's folder."""
    return [step for step, _ in list_checkpoints(folder / "checkpoints")]


def curve(folder: Path) -> list[dict[str, Any]]:
    """What each step of a run logged."""
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def files(folder: Path) -> dict[str, bytes]:
    """Content of all files by name."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def outcome(folder: Path, role: str = "student") -> dict[str, bytes]:
    """What a run leaves that does not depend on how often it was taken up."""
    product = (f"{role}/diffusion_pytorch_model.safetensors", f"{role}/config.json")
    others = ("findings.json", "evaluation.json")
    names = ["metrics.jsonl", "config.yaml", *product, *(name for name in others if (folder / name).exists())]
    return {name: (folder / name).read_bytes() for name in names}


def _merge(values: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(values)
    for key, value in changes.items():
        nested = isinstance(value, Mapping) and isinstance(merged.get(key), Mapping)
        merged[key] = _merge(merged[key], value) if nested else value
    return merged
