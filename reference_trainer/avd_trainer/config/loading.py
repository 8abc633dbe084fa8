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

from avd_trainer.runtime.errors import UserError

DEFAULT_METHOD = "avd"
"""The method of a preset that has several, where none is asked for."""
EXTENDS = "extends"
"""Key of a preset or file whose value, ``PRESET/METHOD``, names the preset that it changes."""
COMMAND = "command"
"""Key of a run's ``config.yaml`` that says which command wrote it. No option: a configuration is read without it."""

# Fields whose value is of one of several kinds: the kind stands in the path of an error, and is no key.
_UNIONS = ("data", "method")

Config = TypeVar("Config", bound=BaseModel)


class ConfigError(UserError):
    """A configuration that cannot be used; the message names the field and the remedy."""


def presets() -> dict[str, tuple[str, ...]]:
    """Names of the presets that come with the package, each with the methods that it has values for."""
    folders = sorted((folder for folder in _presets().iterdir() if folder.is_dir()), key=lambda folder: folder.name)
    return {folder.name: tuple(sorted(_stem(file) for file in folder.iterdir())) for folder in folders}


def load_config(
    schema: type[Config],
    source: str,
    overrides: list[str] | None = None,
    replace: Mapping[str, Any] | None = None,
    missing: Mapping[str, Any] | None = None,
    *,
    method: str | None = None,
) -> Config:
    """Read a preset or a YAML file, apply overrides, validate.

    Args:
        schema: Which configuration to read.
        source: A preset's name, or the path of a YAML file.
        overrides: ``key=value`` with dots in the key, for example ``"method.regression.weight=0.5"``; the value is
            YAML.
        replace: Top-level values to replace before that.
        missing: Top-level values to take where there are none.
        method: Which method's values of a preset; None for the preset's default. A file says itself.

    Raises:
        ConfigError: With one line per wrong field.
    """
    try:
        config = _read(source, method)
        config.pop(COMMAND, None)
        for key, value in {**(missing or {}), **config, **(replace or {})}.items():
            config[key] = value
        config = OmegaConf.merge(config, OmegaConf.from_dotlist(list(overrides or [])))
        values = OmegaConf.to_container(config, resolve=True)
    except ConfigError:
        raise
    except (OmegaConfBaseException, YAMLError, ValueError) as error:
        raise ConfigError(f"{source}: {error}") from error
    return validate(schema, values, source)


def validate(schema: type[Config], values: Any, source: str) -> Config:
    """Build a configuration, with an error that a person can act on."""
    try:
        return schema.model_validate(values)
    except ValidationError as error:
        lines = [_describe(item) for item in error.errors()]
        raise ConfigError(f"{source} is not a valid configuration:\n" + "\n".join(lines)) from error


def save_config(config: BaseModel, path: Path, command: str) -> None:
    """Write a configuration as YAML, complete with defaults, and which command wrote it."""
    path.write_text(OmegaConf.to_yaml(OmegaConf.create({COMMAND: command, **config.model_dump(mode="json")})))


def _read(source: str, method: str | None) -> DictConfig:
    known = presets()
    if source in known:
        return _read_preset(source, _choose(source, known[source], method))
    path = Path(source)
    if not path.is_file():
        raise ConfigError(
            f"{source!r} is neither a preset ({', '.join(known)}) nor a YAML file. Check the name or the path."
        )
    try:
        config = _parse(path.read_text(), source)
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{source} cannot be read: {error}.") from error
    own = OmegaConf.select(config, "method.kind")
    if method is not None and own != method:
        raise ConfigError(f"{source} is of method {own}, and --method says {method}. Leave --method out for a file.")
    return config


def _choose(preset: str, methods: tuple[str, ...], method: str | None) -> str:
    if method is None:
        return DEFAULT_METHOD if DEFAULT_METHOD in methods else methods[0]
    if method not in methods:
        raise ConfigError(f"Preset {preset} has no values for method {method!r}. It has {', '.join(methods)}.")
    return method


def _read_preset(preset: str, method: str) -> DictConfig:
    return _parse((_presets() / preset / f"{method}.yaml").read_text(), f"{preset}/{method}")


def _parse(text: str, source: str) -> DictConfig:
    """The values of a file, on top of those of the preset that it extends."""
    config = OmegaConf.create(text)
    if not isinstance(config, DictConfig):
        raise ConfigError(f"{source}: expected keys and values, got a list.")
    base = config.pop(EXTENDS, None)
    if base is None:
        return config
    preset, _, method = str(base).partition("/")
    if method not in presets().get(preset, ()):
        every = ", ".join(f"{name}/{kind}" for name, kinds in presets().items() for kind in kinds)
        raise ConfigError(f"{source}: extends {base!r}, expected one of {every}.")
    merged = OmegaConf.merge(_read_preset(preset, method), config)
    assert isinstance(merged, DictConfig)
    return merged


def _presets() -> Any:
    return resources.files("avd_trainer") / "presets"


def _stem(file: Any) -> str:
    return str(file.name).removesuffix(".yaml")


def _describe(item: Any) -> str:
    keys = [str(part) for part in item["loc"]]
    if keys and keys[0] in _UNIONS:
        del keys[1:2]
    path = ".".join(keys) or "(the whole)"
    message = item["msg"].removeprefix("Value error, ")
    if item["type"] == "missing":
        hint = ". Pass --data DIR, a folder that `avd data encode` made" if path == "data" else ""
        return f"  {path}: {message}{hint}"
    if item["type"] == "extra_forbidden":
        return f"  {path}: there is no such field"
    return f"  {path}: {message}, got {item['input']!r}"
