"""What a stage needs that may not be at hand, and how to get it."""

from __future__ import annotations

import re
from importlib.util import find_spec
from pathlib import Path

HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
CONFIG = "config.json"


def package_missing(stage: str, module: str, extra: str) -> str | None:
    """Whether a package cannot be imported, and which extra has it."""
    if find_spec(module):
        return None
    return f'{stage} needs the package {module}: pip install "avd-core[{extra}]". Or leave {stage} out of the recipe.'


def weights_missing(stage: str, setting: str, model: str, config: str = CONFIG) -> str | None:
    """Whether the weights of a model are neither a folder nor in the cache of the Hugging Face hub.

    Args:
        stage: Who needs them.
        setting: Which of its settings names them.
        model: A folder, or an id of the hub.
        config: A file in it that is small and always there.
    """
    from huggingface_hub import try_to_load_from_cache

    at_hand = (Path(model) / config).is_file()
    if not at_hand and HUB_ID.fullmatch(model):
        at_hand = isinstance(try_to_load_from_cache(model, config), str)
    if at_hand:
        return None
    get = f"Get them with: hf download {model}. Or name" if HUB_ID.fullmatch(model) else "Name"
    return (
        f"{stage} needs the weights {model}, which are not on this machine. {get} a folder that has them by "
        f"{stage}.{setting}, or leave {stage} out of the recipe."
    )
