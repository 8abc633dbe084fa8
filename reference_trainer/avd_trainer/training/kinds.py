"""Which command's run a folder holds."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

CONFIG = "config.yaml"

RunKind = Literal["avd train", "avd train-interpolator"]


def kind_of_run(folder: Path) -> RunKind | None:
    """The command whose run is in a folder, by its ``config.yaml``; None if there is none, or it is neither's."""
    try:
        values = OmegaConf.to_container(OmegaConf.create((folder / CONFIG).read_text()))
    except (OSError, ValueError, OmegaConfBaseException, YAMLError):
        return None
    return kind_of_config(values) if isinstance(values, dict) else None


def kind_of_config(values: Mapping[Any, Any]) -> RunKind | None:
    """The command whose complete configuration this is; None if it is neither's."""
    if "teacher" in values:
        return "avd train"
    return "avd train-interpolator" if "widths" in values else None
