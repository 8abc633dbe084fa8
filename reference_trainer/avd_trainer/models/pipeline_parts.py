"""Names of pipelines, and parts of them that could not be loaded."""

from __future__ import annotations

from avd_trainer.runtime.errors import UserError

TINY = "tiny"
"""Stands for the codec and the text embedding of the tiny preset, which have no weights, where a pipeline is named."""
WAN = "Wan-AI/Wan2.1-T2V-1.3B-Diffusers"
"""The least pipeline of Wan2.1; all of them have the same VAE and text encoder."""


def part_not_loaded(source: str, part: str, error: Exception) -> UserError:
    """What to raise where a part of a pipeline cannot be loaded, with what to do."""
    # The libraries raise OSError, ValueError, SafetensorError, errors of the hub's HTTP library and more for files that
    # are missing, damaged or of another model.
    reason = str(error).strip().partition("\n")[0]
    return UserError(
        f"the {part} of {source} cannot be loaded ({type(error).__name__}: {reason}). Pass a Wan pipeline in "
        f"diffusers' layout that holds {part}/ with safetensors weights, such as {WAN}; "
        "where there is no network, run 'hf download' for it elsewhere and pass the folder."
    )
