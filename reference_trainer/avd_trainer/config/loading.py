"""Reading a configuration: presets, files, overrides, and errors that a person can act on."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any, TypeVar

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import BaseModel, ValidationError
from yaml import YAMLError

from avd_trainer.config.run import InterpolatorConfig, TeacherConfig, TrainConfig
from avd_trainer.runtime.errors import UserError


class ConfigError(UserError):
    """A configuration that cannot be used; the message names the field and the remedy."""


Config = TypeVar("Config", TrainConfig, InterpolatorConfig, TeacherConfig)


def presets(kind: type[Config]) -> list[str]:
    """Names of the presets that come with the package."""
    return sorted(f.name.removesuffix(".yaml") for f in _preset_folder(kind).iterdir() if f.name.endswith(".yaml"))


def load_config(
    kind: type[Config],
    source: str,
    overrides: list[str] | None = None,
    replace: Mapping[str, Any] | None = None,
    missing: Mapping[str, Any] | None = None,
) -> Config:
    """Read a preset or a YAML file, apply overrides, validate.

    Args:
        kind: Which configuration to read.
        source: A preset's name, or the path of a YAML file.
        overrides: ``key=value`` with dots in the key, for example ``"objective.regression.weight=0.5"``; the value is
            YAML.
        replace: Top-level values to replace before that.
        missing: Top-level values to take where there are none.

    Raises:
        ConfigError: With one line per wrong field.
    """
    try:
        config = OmegaConf.create(_read(kind, source))
        if not isinstance(config, DictConfig):
            raise ConfigError(f"{source}: expected keys and values, got a list.")
        for key, value in {**(missing or {}), **config, **(replace or {})}.items():
            config[key] = value
        config = OmegaConf.merge(config, OmegaConf.from_dotlist(list(overrides or [])))
        values = OmegaConf.to_container(config, resolve=True)
    except ConfigError:
        raise
    except (OmegaConfBaseException, YAMLError, ValueError) as error:
        raise ConfigError(f"{source}: {error}") from error
    return validate(kind, values, source)


def validate(kind: type[Config], values: Any, source: str) -> Config:
    """Build a configuration, with an error that a person can act on."""
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        lines = [_describe(item) for item in error.errors()]
        raise ConfigError(f"{source} is not a valid configuration:\n" + "\n".join(lines)) from error


def save_config(config: BaseModel, path: Path) -> None:
    """Write a configuration as YAML, complete with defaults."""
    path.write_text(OmegaConf.to_yaml(OmegaConf.create(config.model_dump(mode="json"))))


def _read(kind: type[Config], source: str) -> str:
    preset = _preset_folder(kind) / f"{source}.yaml"
    if source in presets(kind):
        return preset.read_text()
    path = Path(source)
    if not path.is_file():
        raise ConfigError(
            f"{source!r} is neither a preset ({', '.join(presets(kind))}) nor a YAML file. Check the name or the path."
        )
    try:
        return path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{source} cannot be read: {error}.") from error


def _preset_folder(kind: type[Config]) -> Any:
    folders = {TrainConfig: "train", InterpolatorConfig: "interpolator", TeacherConfig: "teacher"}
    return resources.files("avd_trainer") / "presets" / folders[kind]


def _describe(item: Any) -> str:
    # A discriminated union adds its tag to the path, which is no key that a person could set.
    path = ".".join(str(part) for part in item["loc"] if part not in ("shapes", "videos", "shards")) or "(the whole)"
    message = item["msg"].removeprefix("Value error, ")
    if item["type"] == "missing":
        hint = ". Pass --data DIR, a folder that `avd data encode` made" if path == "data" else ""
        return f"  {path}: {message}{hint}"
    if item["type"] == "extra_forbidden":
        return f"  {path}: there is no such field"
    return f"  {path}: {message}, got {item['input']!r}"
