"""Names of pipelines, and how parts of them are loaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from avd_trainer.runtime.errors import UserError

TINY = "tiny"
"""Stands for the codec and the text embedding of the tiny preset, which have no weights, where a pipeline is named."""
WAN = "Wan-AI/Wan2.1-T2V-1.3B-Diffusers"
"""The least pipeline of Wan2.1; all of them have the same VAE and text encoder."""


def transformers_library(part: str) -> Any:
    """The library, imported only here: it takes seconds, and training does without it."""
    try:
        import transformers
    except ImportError as error:
        raise UserError(f'Wan\'s {part} needs transformers. Run pip install "avd-core[wan]".') from error
    return transformers


def has_part(source: str, part: str) -> bool:
    """Whether a pipeline has an optional part, by its ``model_index.json``.

    Args:
        source: A folder that diffusers saved, or the name of one on the Hugging Face hub.
        part: Such as ``image_encoder``.

    Raises:
        UserError: If there is no such pipeline.
    """
    from diffusers import DiffusionPipeline

    try:
        index = DiffusionPipeline.load_config(source)
    except Exception as error:
        raise part_not_loaded(source, "model_index.json", error) from error
    return (index.get(part) or [None])[0] is not None


def load_part(kind: Any, source: str, part: str, **options: Any) -> Any:
    """A part of a pipeline, read by the library that it is of.

    Args:
        kind: The class, of diffusers or transformers, whose ``from_pretrained`` reads it.
        source: A folder that diffusers saved, or the name of one on the Hugging Face hub.
        part: The subfolder, such as ``text_encoder``.
        options: Further arguments of ``from_pretrained``.

    Raises:
        UserError: If it cannot be loaded.
    """
    try:
        if Path(source).is_dir() and not any((Path(source) / part).glob("*.json")):
            raise FileNotFoundError(f"there is no {part}/*.json")  # diffusers takes another part's for it
        return kind.from_pretrained(source, subfolder=part, **options)
    except Exception as error:
        raise part_not_loaded(source, part, error) from error


def part_not_loaded(source: str, part: str, error: Exception) -> UserError:
    """What to raise where a part of a pipeline cannot be loaded, with what to do."""
    # The libraries raise OSError, ValueError, SafetensorError, errors of the hub's HTTP library and more for files that
    # are missing, damaged or of another model.
    reason = str(error).strip().partition("\n")[0]
    return UserError(
        f"the {part} of {source} cannot be loaded ({type(error).__name__}: {reason}). Pass a Wan pipeline in "
        f"diffusers' layout that holds {part}/ with safetensors weights, such as {WAN}, or "
        "Wan-AI/Wan2.1-I2V-14B-480P-Diffusers for image to video; where there is no network, run 'hf download' for it "
        "elsewhere and pass the folder."
    )
