"""What the pages name is there: commands with their options, links, keys of a configuration, files and metrics."""

import json
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import pytest
from pydantic import BaseModel
from typer.main import get_command

from avd_trainer.commands.app import app
from avd_trainer.config.loading import load_config, presets
from avd_trainer.data.preparation.recipe import RecipeHead
from avd_trainer.data.preparation.registry import list_stages, load_stage
from avd_trainer.training.config import TrainConfig

ROOT = Path(__file__).parents[1]
PAGES = sorted(path.relative_to(ROOT).as_posix() for path in [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
TOP_LEVEL = ("avd_core", "integrations", "reference_trainer", "tests", "benchmarks", "docs", ".ci", ".github")
MODULE = ["-m", "avd_trainer"]
# Have an entry for each sample, so golden curves leave them out.
LISTS = {
    *("regression/sample_losses", "regression/means", "regression/weights", "regression/timesteps"),
    *("regression/judged", "regression/deviations"),
}


def read(page: str) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


def blocks(page: str) -> list[str]:
    return re.findall(r"^ *```[\w{}]*\n(.*?)^ *```", read(page), re.DOTALL | re.MULTILINE)


def prose(page: str) -> str:
    return re.sub(r"^ *```.*?^ *```", "", read(page), flags=re.DOTALL | re.MULTILINE)


def inline_code(page: str) -> list[str]:
    return re.findall(r"`([^`]+)`", prose(page))


@pytest.mark.parametrize("page", PAGES)
def test_code_in_the_text_is_not_split_over_lines(page: str) -> None:
    # Whoever searches for a command or a formula, or copies it from the source, finds it whole.
    assert [line for line in prose(page).splitlines() if line.count("`") % 2] == []


def commands(page: str) -> Iterator[list[str]]:
    """Arguments of ``avd`` in the blocks of a page, with or without ``torchrun``."""
    for block in blocks(page):
        for line in block.replace("\\\n", " ").splitlines():
            if not re.match(r"\s*(\.venv/bin/)?avd |.*torchrun .*-m avd_trainer ", line):
                continue
            words = shlex.split(line, comments=True)
            start = next((i + 2 for i in range(len(words)) if words[i : i + 2] == MODULE), 1)
            yield words[start:]


@pytest.mark.parametrize(("page", "command"), [(page, command) for page in PAGES for command in commands(page)])
def test_the_command_line_has_every_command(page: str, command: list[str]) -> None:
    # Parses and runs nothing; an unknown option, a missing argument or a wrong type raises.
    parsed, arguments, names = get_command(app), command, []
    while hasattr(parsed, "commands"):
        words = 2 if " ".join(arguments[:2]) in parsed.commands else 1  # avd evaluate vbench
        names.append(" ".join(arguments[:words]))
        parsed, arguments = parsed.commands[names[-1]], arguments[words:]
    options = parsed.make_context(" ".join(names), list(arguments)).params
    if names[0] in ("train", "plan") and options["preset"] in presets():
        data = {"data": {"kind": "shards", "path": "data/clips"}}
        load_config(TrainConfig, options["preset"], options["set_"], data, method=options["method"])


def test_the_pages_have_commands() -> None:
    assert sum(len(list(commands(page))) for page in PAGES) > 40
    assert ["data", "inspect", "data/clips"] in list(commands("docs/recipe.md"))


@pytest.mark.parametrize("page", PAGES)
def test_commands_in_the_text_exist(page: str) -> None:
    known: Any = get_command(app)
    for code in inline_code(page):
        words = code.split()
        if words[0] == "avd" and len(words) > 1 and words[1][0].islower():
            assert words[1] in known.commands, code


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page: str) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", read(page)):
        if "://" in target:
            continue
        name, _, anchor = target.partition("#")
        file = (ROOT / page).parent / name if name else ROOT / page
        assert file.is_file(), target  # the site has no folders
        if anchor:
            assert anchor in anchors(file), target


def anchors(page: Path) -> set[str]:
    """Those that GitHub gives the headings of a page."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES)
def test_files_that_are_named_exist(page: str) -> None:
    for code in inline_code(page):
        placeholder = re.search(r"[A-Z]{4}", code)
        if re.fullmatch(r"[\w./-]+/[\w./-]+", code) and code.split("/")[0] in TOP_LEVEL and not placeholder:
            assert (ROOT / code).exists(), code


def keys(model: type[BaseModel], prefix: str = "") -> Iterator[str]:
    """All keys of a configuration, with dots; where a value is of one of several kinds, those of each."""
    for name, field in model.model_fields.items():
        yield prefix + name
        for section in sections(field.annotation):
            yield from keys(section, f"{prefix}{name}.")


def keys_of_recipes() -> Iterator[str]:
    """Of data preparation: a section for each stage."""
    yield from keys(RecipeHead)
    for name in list_stages():
        yield from keys(load_stage(name).Settings, f"{name}.")


def sections(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for part in get_args(annotation):
        yield from sections(part)


# Pages of the hosts name the hosts' own keys.
@pytest.mark.parametrize("page", [page for page in PAGES if not page.startswith("docs/hosts")])
def test_keys_of_a_configuration_exist(page: str) -> None:
    known = set(keys(TrainConfig)) | set(keys_of_recipes())
    for code in inline_code(page):
        named = re.match(r"([a-z_]+)((\.(?!(?:py|json|jsonl|md|yaml|txt|gif)\b)[a-z_]+)+)(=|$)", code)
        if named and (named[4] or named[1] in TrainConfig.model_fields):
            assert named[1] + named[2] in known, code


@pytest.mark.parametrize("page", [page for page in PAGES if page not in ("README.md", "CHANGELOG.md")])
def test_one_page_says_what_has_not_run_on_a_gpu(page: str) -> None:
    # Hosts' pages say it of their host alone. Elsewhere it would stay true in one place and not in the other.
    text = " ".join(read(page).split())
    assert not re.search(r"on a GPU yet|no GPU was at hand|(?:not|never) (?:been )?(?:run|tried) on a GPU", text), (
        "link to README.md#what-has-not-been-run"
    )


def test_all_metrics_are_explained() -> None:
    golden = json.loads((ROOT / "tests" / "assets" / "golden" / "avd.json").read_text())
    table = re.findall(r"^\| `([a-z_]+(?:/[a-z_]+)?)` \|", read("docs/monitoring.md"), re.MULTILINE)
    assert sorted(table) == sorted({name for step in golden for name in step} | LISTS)
