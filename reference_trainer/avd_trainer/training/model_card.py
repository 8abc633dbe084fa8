"""The README.md of an exported student: what the Hub and a person have to know before they use it."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from avd_core.sampling import SamplerKind
from avd_trainer.config.loading import to_yaml
from avd_trainer.config.sections import ShapesData
from avd_trainer.methods.registry import list_methods
from avd_trainer.models.architecture import image_input
from avd_trainer.models.codecs.latent_space import LATENT_SPACES, SPATIAL_STRIDES, TEMPORAL_STRIDE
from avd_trainer.models.weight_files import is_on_hub
from avd_trainer.training.config import TrainConfig
from avd_trainer.training.export import SavedRun, Weights
from avd_trainer.training.sample_clips import frames_per_second

CARD = "README.md"

_RECIPE = ("method", "max_steps", "batch_size", "precision", "max_gradient_norm", "seed")
"""Values of a run that a reader can use; the others are of the machine that it ran on."""

_NO_MEASURES = (
    "None are stated. `avd evaluate` measures clips of this student, and `avd export --measures` puts its table here."
)

_STEP_TO_STEP: Mapping[SamplerKind, str] = {
    "re-noise": "predict the clean clip, then noise it anew for the next step (the LCM sampler)",
    "ode": "follow the predicted velocity to the next step (Euler's method)",
}


def model_card(
    saved: SavedRun,
    weights: Weights,
    name: str,
    usage: str,
    *,
    adapters: bool,
    library: str | None,
    measures: str | None = None,
) -> str:
    """Write it: metadata for the Hub, facts, how to use the files, recipe, measures, licence.

    Args:
        saved: The checkpoint that was exported.
        weights: Which of its weights.
        name: The title.
        usage: Markdown: how programs use the very files beside the card.
        adapters: Whether those files are adapters, and not a whole model.
        library: The Hub's name of the library that loads them, if it has one.
        measures: What was measured of the student, in Markdown; None if nothing was.
    """
    config = saved.config
    metadata = {key: value for key, value in _metadata(saved, adapters, library).items() if value is not None}
    recipe = {key: value for key, value in config.model_dump(mode="json").items() if key in _RECIPE}
    if config.student_weights is not None:
        recipe["student_weights"] = public_name(config.student_weights)
    parts = [
        f"---\n{to_yaml(metadata)}---",
        f"# {name}",
        _about(saved, weights, adapters),
        usage.strip(),
        f"## Recipe\n\n```yaml\n{to_yaml(recipe)}```",
        f"## Measures\n\n{_NO_MEASURES if measures is None else _below(measures).strip()}",
        _licence(config),
    ]
    return "\n\n".join(parts) + "\n"


def _below(text: str) -> str:
    """Markdown whose headings are two levels lower."""
    return re.sub("^#", "###", text, flags=re.MULTILINE)


def clip_size(saved: SavedRun) -> tuple[int, int, int]:
    """Width, height in pixels, and frames of the clips that a run was trained on."""
    _, frames, height, width = saved.state["latent_shape"]
    stride = SPATIAL_STRIDES[saved.encoding.latent_space]
    return stride * width, stride * height, 1 + TEMPORAL_STRIDE * (frames - 1)


def public_name(source: str) -> str:
    """A model or folder without the path to it, which is nobody's business; a name on the hub stays whole."""
    return source if is_on_hub(source) else Path(source).name


def _metadata(saved: SavedRun, adapters: bool, library: str | None) -> dict[str, Any]:
    teacher = saved.config.teacher
    on_hub = teacher is not None and is_on_hub(teacher)
    image = image_input(saved.architecture) is not None
    return {
        "license": "other",
        "license_name": "to-be-stated",
        "library_name": library,
        "pipeline_tag": "image-to-video" if image else "text-to-video",
        "base_model": teacher if on_hub else None,
        "base_model_relation": None if not on_hub else "adapter" if adapters else "finetune",
        "tags": ["distillation", "few-step", saved.config.method.kind, *(["lora"] if adapters else [])],
    }


def _about(saved: SavedRun, weights: Weights, adapters: bool) -> str:
    config = saved.config
    (method,) = (each for each in list_methods() if each.kind == config.method.kind)
    width, height, frames = clip_size(saved)
    fps = frames_per_second(config.samples, saved.encoding)
    kind = "averaged weights" if weights == "ema" else "last weights"
    step, steps = saved.state["step"], saved.timesteps
    guided = getattr(config.method, "guidance_scale", 1.0) > 1
    learned = ". The student has learned the teacher's guided prediction" if guided else ""
    rows = {
        "few steps": f"{len(steps)}, at timesteps {numbers(steps)} of 1000",
        "from step to step": _STEP_TO_STEP[config.sampled_by],
        "timestep shift": "none beside these timesteps",
        "guidance": f"none: scale 1, no negative prompt{learned}",
        "clips": f"{width} x {height} pixels, {frames} frames, {fps:g} frames per second",
        "latents": LATENT_SPACES[saved.encoding.latent_space],
        "weights": f"{kind} after step {step} of {config.max_steps}",
    }
    if saved.lora is not None:
        merged = "" if adapters else ", merged into these weights"
        rows["LoRA"] = f"rank {saved.lora.rank}, alpha {saved.lora.alpha:g}{merged}"
    teacher = public_name(config.teacher or "")
    table = "\n".join(f"| {key} | {value} |" for key, value in rows.items())
    return (
        f"A student of `{teacher}` that makes a clip in {len(steps)} step{'s' if len(steps) > 1 else ''}, distilled by "
        f"`{method.kind}` ({method.paper}): {method.summary}\n\n| | |\n|---|---|\n{table}"
    )


def numbers(values: list[float], scale: float = 1.0) -> str:
    """Values with commas, as short as they are exact."""
    return ", ".join(f"{scale * value:g}" for value in values)


def _licence(config: TrainConfig) -> str:
    return (
        "## Licence\n\n"
        "To be stated by whoever publishes these weights, here and as `license` above. It depends on what they were "
        f"made from: the teacher, `{public_name(config.teacher or '')}`, and the data, {' and '.join(_data(config))}."
    )


def _data(config: TrainConfig) -> Iterator[str]:
    for source in (config.data, config.prompts):
        if isinstance(source, ShapesData):
            yield "generated moving shapes"
        elif source is not None:
            paths = source.path if isinstance(source.path, tuple) else (source.path,)
            yield ", ".join(f"`{path.name}`" for path in paths)
