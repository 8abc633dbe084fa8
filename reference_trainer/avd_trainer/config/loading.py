"""Reading a configuration: presets, files, overrides, and errors that a person can act on."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from difflib import get_close_matches
from importlib import resources
from itertools import takewhile
from pathlib import Path
from typing import Any, TypeVar, get_args

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import BaseModel, ValidationError
from yaml import YAMLError

from avd_trainer.runtime.errors import UserError

DEFAULT_METHOD = "avd"
"""The method of a preset that has several, where none is asked for."""
EXTENDS = "extends"
"""Key of a preset or file that names what it changes: a preset, ``PRESET/METHOD``, or of a file ``NAME``, which is
``NAME.yaml`` beside it."""
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


def default_method(methods: tuple[str, ...]) -> str:
    """Which of a preset's methods is taken where none is asked for."""
    return DEFAULT_METHOD if DEFAULT_METHOD in methods else methods[0]


def describe_preset(preset: str, method: str) -> str:
    """The first sentence of the comment that a preset's file begins with."""
    return first_sentence(_preset_file(preset, method).read_text())


def first_sentence(text: str) -> str:
    """The first sentence of the comment that a YAML file begins with; empty without one."""
    lines = takewhile(lambda line: line.startswith("#"), text.splitlines())
    comment = " ".join(line.removeprefix("#").strip() for line in lines)
    return re.split(r"(?<=\.)\s+(?=[A-Z])", comment)[0]  # "et al. 2026" ends no sentence


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
    if any(override.startswith("method.kind=") for override in overrides or []):
        raise ConfigError(
            "--set method.kind leaves the values of another method behind. Choose a method by --method KIND."
        )
    try:
        config = _read(source, method)
        config.pop(COMMAND, None)
        for key, value in {
            **(missing or {}),
            **{str(key): value for key, value in config.items()},
            **(replace or {}),
        }.items():
            config[key] = value
        merged = OmegaConf.merge(config, parse_overrides(overrides or []))
        values = OmegaConf.to_container(merged, resolve=True)
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
        lines = [_describe(item, schema, values) for item in error.errors()]
        raise ConfigError(f"{source} is not a valid configuration:\n" + "\n".join(lines)) from error


def save_config(config: BaseModel, path: Path, command: str) -> None:
    """Write a configuration as YAML, complete with defaults, and which command wrote it."""
    path.write_text(to_yaml({COMMAND: command, **config.model_dump(mode="json")}))


def read_saved(path: Path) -> dict[str, Any]:
    """The values of a file that :func:`save_config` wrote, not validated.

    Raises:
        ConfigError: If it cannot be read, or is no such file.
    """
    try:
        values = read_values(path)
    except ConfigError as error:
        raise ConfigError(f"{error} Choose a new --output.") from error
    return {key: value for key, value in values.items() if key != COMMAND}


def read_values(path: Path) -> dict[str, Any]:
    """The values of a YAML file as it is: not validated, without those of what it extends.

    Raises:
        ConfigError: If it cannot be read, or holds no keys and values.
    """
    try:
        values = OmegaConf.to_container(OmegaConf.create(path.read_text()))
    except (OSError, ValueError, OmegaConfBaseException, YAMLError) as error:
        raise ConfigError(f"{path} cannot be read: {error}.") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: expected keys and values.")
    return {str(key): value for key, value in values.items()}


def to_yaml(values: Mapping[str, Any]) -> str:
    """YAML as a configuration's file has it."""
    return OmegaConf.to_yaml(OmegaConf.create(dict(values)))


def parse_overrides(overrides: list[str]) -> DictConfig:
    """The values of ``key=value`` strings with dots in the key.

    Raises:
        ConfigError: If one is no key and value, or its value no YAML.
    """
    for override in overrides:
        key, equals, value = override.partition("=")
        if not key or not equals:
            raise ConfigError(f"--set {override}: expected KEY=VALUE, such as --set max_steps=100.")
        try:
            OmegaConf.from_dotlist([override])
        except YAMLError as error:
            raise ConfigError(
                f"--set {override}: {value} is no value in YAML. Quote it, or close its brackets."
            ) from error
    return OmegaConf.from_dotlist(overrides)


def _read(source: str, method: str | None) -> DictConfig:
    known = presets()
    if source in known:
        return _read_preset(source, _choose(source, known[source], method))
    path = Path(source)
    if not path.is_file():
        raise ConfigError(
            f"{source!r} is neither a preset ({', '.join(known)}) nor a YAML file. Check the name or the path."
            + nearest(source, known)
        )
    config = _read_file(path, ())
    own = OmegaConf.select(config, "method.kind")
    if method is not None and own != method:
        raise ConfigError(f"{source} is of method {own}, and --method says {method}. Leave --method out for a file.")
    return config


def _choose(preset: str, methods: tuple[str, ...], method: str | None) -> str:
    if method is None:
        return default_method(methods)
    name = method.replace("-", "_")
    if name not in methods:
        raise ConfigError(
            f"Preset {preset} has no values for method {method!r}. It has {', '.join(methods)}.{nearest(name, methods)}"
        )
    return name


def nearest(name: str, names: Iterable[str]) -> str:
    """A question that says which of some names was meant, to end a message with; nothing where none is near."""
    close = get_close_matches(name, list(names), n=1)
    return f" Did you mean {close[0]}?" if close else ""


def _read_preset(preset: str, method: str) -> DictConfig:
    return _parse(_preset_file(preset, method).read_text(), f"{preset}/{method}")


def _read_file(path: Path, before: tuple[Path, ...]) -> DictConfig:
    """The values of a file, on top of those of what it extends; ``before`` are the files that extend it."""
    if path in before:
        ring = " -> ".join(each.stem for each in (*before, path))
        raise ConfigError(f"{path} extends itself: {ring}. Leave one of these out.")
    try:
        text = path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} cannot be read: {error}.") from error

    def beside(name: str) -> DictConfig | None:
        other = path.parent / f"{name}.yaml"
        return _read_file(other, (*before, path)) if "/" not in name and other.is_file() else None

    return _parse(text, str(path), beside)


def _parse(text: str, source: str, beside: Callable[[str], DictConfig | None] = lambda name: None) -> DictConfig:
    """The values of a file, on top of those of what it extends: another one ``beside`` it, or a preset."""
    config = OmegaConf.create(text)
    if not isinstance(config, DictConfig):
        raise ConfigError(f"{source}: expected keys and values, got a list.")
    base = config.pop(EXTENDS, None)
    if base is None:
        return config
    values = beside(str(base))
    if values is None:
        preset, _, method = str(base).partition("/")
        if method not in presets().get(preset, ()):
            every = ", ".join(f"{name}/{kind}" for name, kinds in presets().items() for kind in kinds)
            raise ConfigError(f"{source}: extends {base!r}, expected one of {every}, or the name of a file beside it.")
        values = _read_preset(preset, method)
    merged = OmegaConf.merge(values, config)
    assert isinstance(merged, DictConfig)
    return merged


def _presets() -> Any:
    return resources.files("avd_trainer") / "presets"


def _preset_file(preset: str, method: str) -> Any:
    return _presets() / preset / f"{method}.yaml"


def _stem(file: Any) -> str:
    return str(file.name).removesuffix(".yaml")


def _describe(item: Any, schema: type[BaseModel], values: Any) -> str:
    keys = [str(part) for part in item["loc"]]
    if keys and keys[0] in _UNIONS:
        del keys[1:2]
    path = ".".join(keys) or "(the whole)"
    message = item["msg"].removeprefix("Value error, ")
    if item["type"] == "missing":
        hint = ". Pass --data DIR, a folder that `avd data encode` made" if path == "data" else ""
        return f"  {path}: {message}{hint}"
    if item["type"] == "extra_forbidden":
        return f"  {path}: there is no such field{_suggest(path, list(_paths(schema, values)))}"
    if item["type"] == "union_tag_invalid":
        kinds = ", ".join(re.findall(r"'([^']+)'", item["ctx"]["expected_tags"]))
        return f"  {path}.kind: expected one of {kinds}, got {item['ctx']['tag']!r}"
    if isinstance(
        item["input"], Mapping | BaseModel
    ):  # of a rule for a whole section, whose message says what is wrong
        return f"  {path}: {message}"
    got = "nothing (null)" if item["input"] is None else repr(item["input"])
    return f"  {path}: {message}, got {got}"


def _suggest(path: str, known: list[str]) -> str:
    """What a mistyped key may have been meant for: one beside it, or one of its name further down."""
    section, dot, name = path.rpartition(".")
    beside = [other.rpartition(".")[2] for other in known if other.rpartition(".")[0] == section]
    if below := [other for other in known if other.startswith(section + dot) and other.endswith(f".{name}")]:
        return f": did you mean {' or '.join(below)}?"
    if close := get_close_matches(name, beside, n=1):
        return f": did you mean {section}{dot}{close[0]}?"
    return f". There are: {', '.join(sorted(beside))}"


def _paths(schema: type[BaseModel], values: Any, prefix: str = "") -> Iterator[str]:
    """The dotted keys of a configuration; of sections of several kinds, those of the kind that ``values`` name."""
    for name, field in schema.model_fields.items():
        yield prefix + name
        chosen = values.get(name) if isinstance(values, Mapping) else None
        sections = list(_sections(field.annotation))
        for section in sections:
            kind = section.model_fields.get("kind") if len(sections) > 1 else None
            if kind is None or not isinstance(chosen, Mapping) or kind.default == chosen.get("kind"):
                yield from _paths(section, chosen, f"{prefix}{name}.")


def _sections(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for part in get_args(annotation):
        yield from _sections(part)
