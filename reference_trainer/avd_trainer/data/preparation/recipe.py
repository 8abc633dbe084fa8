"""Which stages run, with which settings, and what is kept: a YAML file with a section for each stage.

Sections stand in the order in which stages run and decide. A file may extend another one; ``off`` in place of a section
leaves the stage out.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any, NamedTuple, cast

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import Field, create_model

from avd_trainer.config.loading import EXTENDS, ConfigError, parse_overrides, read_values, to_yaml, validate
from avd_trainer.config.sections import Section
from avd_trainer.data.preparation.registry import list_stages, load_stage
from avd_trainer.data.preparation.stage import SPAN, ClipSettings, ClipStage, Stage, StageSettings, digest

_RECIPES = Path(__file__).parent / "recipes"


class RecipeHead(Section):
    """What a recipe says besides its stages."""

    clip: ClipSettings = ClipSettings()
    """The clips that training sees."""
    decode_limit: float = Field(default=120.0, gt=0)
    """Seconds for decoding one clip. A file whose decoder takes longer is left, and does not stop the rest."""
    memory_gb: float = Field(default=8.0, gt=0)
    """Most memory of a worker process, in 10^9 bytes, beside the weights that its stages have loaded. What takes more
    is ended, recorded as failed, and does not stop the rest. Up to a sixteenth of it keeps frames of clips while a file
    is searched for cuts, of those stages that run in the same pass as the search. A clip of the recipe ``paper`` takes
    19 MB with its models on the CPU, so that 0.5 GB hold two minutes, and six without them; what comes later in a file
    is decoded a second time."""


class Chosen(NamedTuple):
    """A stage of a recipe.

    Attributes:
        stage: Its class.
        settings: Its section.
        digest: Key of its results.
        reads_caption: Whether these depend on ``Row.caption``, by itself or by what it reads.
    """

    stage: type[Stage[Any]]
    settings: StageSettings
    digest: str
    reads_caption: bool = False

    @property
    def wants_gpu(self) -> bool:
        """Whether it wants a GPU where there is one."""
        return self.stage.wants_gpu(self.settings)

    def key(self, row: str, caption: str) -> str:
        """Of its results for a row; another one for another caption, if they depend on that."""
        return f"{row}-{hashlib.sha256(caption.encode()).hexdigest()[:16]}" if self.reads_caption else row


class Recipe(NamedTuple):
    """What is done with each video.

    Attributes:
        head: What is not of one stage.
        stages: By name, in the order in which they run and decide.
    """

    head: RecipeHead
    stages: Mapping[str, Chosen]

    def limit(self, setting: str, stage: str) -> float:
        """Value of a limit that :class:`Failed` names: of a stage, or of the head."""
        return float(getattr(self.stages[stage].settings if setting == "time_limit" else self.head, setting))

    def of_files(self) -> Iterator[Chosen]:
        """The stages of whole files."""
        return (chosen for chosen in self.stages.values() if not issubclass(chosen.stage, ClipStage))

    def of_clips(self, *, survivors: bool) -> Iterator[Chosen]:
        """The stages of clips: those of all clips, or those of the clips that the selection keeps."""
        return (
            chosen
            for chosen in self.stages.values()
            if issubclass(chosen.stage, ClipStage) and chosen.stage.of_survivors == survivors
        )

    def to_yaml(self) -> str:
        """The whole recipe, complete with defaults; :func:`load_recipe` reads it again."""
        sections = {name: chosen.settings.model_dump(mode="json") for name, chosen in self.stages.items()}
        return to_yaml({**self.head.model_dump(mode="json"), **sections})


def bundled_recipes() -> tuple[str, ...]:
    """Names of the recipes that come with the package."""
    return tuple(sorted(file.stem for file in _RECIPES.glob("*.yaml")))


def load_recipe(source: str | Path, overrides: Sequence[str] | Mapping[str, Any] = ()) -> Recipe:
    """Read a recipe, apply overrides, validate.

    Args:
        source: One of :func:`bundled_recipes`, or the path of a YAML file.
        overrides: ``key=value`` with dots in the key, such as ``aesthetics.keep=0.4``; the value is YAML. Or the same
            as nested mappings.

    Raises:
        ConfigError: With one line per wrong field.
    """
    values = _read(source, ())
    on_top = overrides if isinstance(overrides, Mapping) else parse_overrides(list(overrides))
    try:
        merged = OmegaConf.to_container(OmegaConf.merge(values, on_top), resolve=True)
    except (OmegaConfBaseException, ValueError) as error:
        raise ConfigError(f"{source}: {error}") from error
    assert isinstance(merged, dict)
    values = {str(key): value for key, value in merged.items()}
    names = [name for name in values if name not in RecipeHead.model_fields]
    for name in names:
        if name not in list_stages():
            raise ConfigError(f"{source}: there is no stage {name}{_suggest(name)}.")
    stages = {name: load_stage(name) for name in names if values[name] is not False}
    return build_recipe(stages, {key: value for key, value in values.items() if value is not False}, str(source))


def build_recipe(stages: Mapping[str, type[Stage[Any]]], values: Mapping[str, Any], source: str = "recipe") -> Recipe:
    """Validate the values of a recipe.

    Args:
        stages: Classes by name, in the recipe's order.
        values: Of :class:`RecipeHead`, and the settings of stages; what is left out or None has defaults.
        source: For messages.

    Raises:
        ConfigError: With one line per wrong field, or if a stage reads another one that does not come before it.
    """
    fields: dict[str, Any] = {name: (stage.Settings, stage.Settings()) for name, stage in stages.items()}
    schema = create_model("Recipe", __base__=RecipeHead, **fields)
    config = validate(schema, {key: value for key, value in values.items() if value is not None}, source)
    head = RecipeHead(**{name: getattr(config, name) for name in RecipeHead.model_fields})
    if SPAN not in stages:
        raise ConfigError(f"{source} lacks the stage {SPAN}, which says which clips a file has. Add it.")
    chosen: dict[str, Chosen] = {}
    for name, stage in stages.items():
        if late := [read for read in stage.reads if read not in chosen]:
            raise ConfigError(
                f"{source}: {name} reads what {' and '.join(late)} found. Put {'it' if len(late) == 1 else 'them'} "
                f"above {name}, or leave {name} out by `{name}: off`."
            )
        settings = cast(StageSettings, getattr(config, name))
        digests = {read: chosen[read].digest for read in stage.reads}
        reads_caption = stage.reads_caption(settings) or any(chosen[read].reads_caption for read in stage.reads)
        chosen[name] = Chosen(stage, settings, digest(stage, settings, head.clip, digests), reads_caption)
    return Recipe(head, chosen)


def _read(source: str | Path, before: tuple[Path, ...]) -> Any:
    """The values of a recipe on top of those of what it extends; ``before`` are those that extend it."""
    path = _RECIPES / f"{source}.yaml" if source in bundled_recipes() else Path(source)
    if not path.is_file():
        raise ConfigError(
            f"{source} is neither a recipe ({', '.join(bundled_recipes())}) nor a YAML file. Check the name or path."
        )
    if path in before:
        ring = " -> ".join(each.stem for each in (*before, path))
        raise ConfigError(f"{path} extends itself: {ring}. Leave one of these out.")
    values = read_values(path)
    base = values.pop(EXTENDS, None)
    if base is None:
        return OmegaConf.create(values)
    beside = path.parent / f"{base}.yaml"
    return OmegaConf.merge(_read(beside if beside.is_file() else str(base), (*before, path)), OmegaConf.create(values))


def _suggest(name: str) -> str:
    close = get_close_matches(name, list_stages(), n=1)
    return f": did you mean {close[0]}?" if close else f"; there are {', '.join(list_stages())}"
