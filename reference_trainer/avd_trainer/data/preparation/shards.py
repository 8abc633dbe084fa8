"""The clips that are kept, as the shards that training reads."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from avd_trainer.data.encode import ClipFormat
from avd_trainer.data.encoders import load_text_encoder, negative_prompt_for
from avd_trainer.data.preparation.journal import Journal
from avd_trainer.data.preparation.recipe import Recipe
from avd_trainer.data.preparation.selection import Clip
from avd_trainer.data.preparation.stage import Done, Values
from avd_trainer.data.preparation.worker import arrays_path
from avd_trainer.data.schema import Encoding, ImageTokens
from avd_trainer.data.shard_writing import ShardWriter
from avd_trainer.models.codecs.latent_space import LatentSpace
from avd_trainer.models.pipeline_parts import TINY
from avd_trainer.runtime.errors import UserError

MAKERS = ("framing", "caption", "latents", "text")
"""Stages without which there are no shards."""
OF_MODEL = ("latents", "first_frame", "text")
"""Stages that encode for a model."""
_NOT_OF_RESULTS = {"time_limit"}


def expect_encodable(recipe: Recipe) -> None:
    """See that clips of a recipe fit its model, before anything runs.

    Raises:
        UserError: If they do not, or if captions, latents and text embeddings are not of one model.
    """
    if "latents" not in recipe.stages:
        return
    if missing := [name for name in MAKERS if name not in recipe.stages]:
        raise UserError(f"The recipe makes latents, and lacks {', '.join(missing)}. Add it, or set latents to off.")
    models = {name: getattr(recipe.stages[name].settings, "model", "") for name in OF_MODEL if name in recipe.stages}
    if len(set(models.values())) > 1:
        named = ", ".join(f"{name}.model is {model}" for name, model in models.items())
        raise UserError(f"{named}; data is made for one model. Name the same in each.")
    model = models["latents"]
    space: LatentSpace = "block-dct-4" if model == TINY else "wan"
    for height, width in getattr(recipe.stages["framing"].settings, "sizes", ()):
        ClipFormat(recipe.head.clip.frames, height, width, recipe.head.clip.fps).check(space)


def write_shards(
    journal: Journal, recipe: Recipe, clips: Sequence[Clip], output: Path, on_clip: Callable[[], None] = lambda: None
) -> Mapping[Path, int]:
    """Write a data set for each size of clips: into ``output`` itself, or a folder in it for each of several sizes.

    The same clips and recipe give the same bytes, whatever happened on the way.

    Args:
        journal: With all that stages found.
        recipe: With the stages :data:`MAKERS`.
        clips: That are kept, at least one, in order of id.
        output: Folder of the data set.
        on_clip: Called for each clip.

    Returns:
        Folders, with the number of clips in each.

    Raises:
        UserError: If the folder holds shards already or cannot be written.
    """
    by_size: dict[tuple[int, int], list[Clip]] = {}
    for clip in clips:
        height, width = _results(journal, recipe, clip, ["latents"])["latents"]["size"]
        by_size.setdefault((height, width), []).append(clip)
    written = {}
    for (height, width), of_size in sorted(by_size.items()):
        folder = output / f"{height}x{width}" if len(by_size) > 1 else output
        first = _results(journal, recipe, of_size[0], list(recipe.stages))
        encoding = Encoding(first["latents"]["latent_space"], first["latents"]["codec"], recipe.head.clip.fps)
        length, dim = first["text"]["length"], first["text"]["dim"]
        image = ImageTokens(**first["first_frame"]) if "first_frame" in recipe.stages else None
        with ShardWriter(
            folder, text_length=length, text_dim=dim, encoding=encoding, image=image, provenance=True
        ) as writer:
            writer.set_unconditional(*_unconditional(journal.folder, recipe))
            for clip in of_size:
                results = _results(journal, recipe, clip, list(recipe.stages))
                writer.add(
                    _arrays(journal.folder, recipe, "latents", clip)["latent"],
                    _arrays(journal.folder, recipe, "text", clip)["embedding"],
                    results["caption"]["caption"],
                    f"{clip.path}, {clip.span.start / 1000:g} to {clip.span.end / 1000:g} s",
                    **({} if image is None else _arrays(journal.folder, recipe, "first_frame", clip)),
                    provenance=json.dumps(provenance(recipe, clip, results)),
                )
                on_clip()
            written[folder] = writer.rows
    return written


def provenance(recipe: Recipe, clip: Clip, results: Mapping[str, Values]) -> dict[str, Any]:
    """Where a clip comes from and how it was made: file, SHA-256, span in milliseconds, licence, versions, and for each
    stage its version, its settings, and what it decided on."""
    stages = {}
    for name, chosen in recipe.stages.items():
        score = chosen.stage.score
        stages[name] = {
            "version": chosen.stage.version,
            "settings": chosen.settings.model_dump(mode="json", exclude=_NOT_OF_RESULTS),
            **({} if score is None else {"score": results[name][score.key]}),
        }
    return {
        "file": clip.path,
        "sha256": clip.sha256,
        "span": list(clip.span),
        "licence": clip.licence,
        "clip": recipe.head.clip.model_dump(mode="json"),
        "stages": stages,
        "avd_core": version("avd-core"),
    }


def fingerprint(recipe: Recipe, clips: Sequence[Clip]) -> str:
    """Changes with what :func:`write_shards` would write."""
    parts = [recipe.to_yaml(), version("avd-core"), *(json.dumps(clip) for clip in clips)]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def _results(journal: Journal, recipe: Recipe, clip: Clip, stages: Sequence[str]) -> dict[str, Values]:
    results = {}
    for name in stages:
        chosen = recipe.stages[name]
        outcome = journal.outcome(name, chosen.digest, clip.key(chosen))
        assert isinstance(outcome, Done), f"{clip.id} is kept without a result of {name}"
        results[name] = outcome.values
    return results


def _arrays(folder: Path, recipe: Recipe, stage: str, clip: Clip) -> dict[str, Tensor]:
    path = arrays_path(folder, stage, recipe.stages[stage].digest, clip.key(recipe.stages[stage]))
    try:
        return load_file(path)
    except Exception as error:  # safetensors' own errors, and those of the file system
        raise UserError(f"{path} cannot be read: {error}. Remove it, and run the same command again.") from error


def _unconditional(folder: Path, recipe: Recipe) -> tuple[Tensor, str]:
    """Embedding of the negative prompt, and the prompt; kept, since its encoder is large."""
    settings: Any = recipe.stages["text"].settings
    prompt = negative_prompt_for(settings.model, settings.negative_prompt)
    key = hashlib.sha256(prompt.encode()).hexdigest()
    path = arrays_path(folder, "unconditional", recipe.stages["text"].digest, key)
    if not path.is_file():
        with torch.no_grad():
            embedding = load_text_encoder(settings.model)([prompt])[0].float().cpu().contiguous()
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(".part")
        save_file({"embedding": embedding}, part)
        part.replace(path)
    return load_file(path)["embedding"], prompt
