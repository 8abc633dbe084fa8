"""Commands and figures of the recipe: the command line has them, and the plan says them."""

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest
from rich.console import Console
from typer.main import get_command

from avd_trainer.commands.app import app
from avd_trainer.config.loading import load_config
from avd_trainer.planning.plan import Plan, make_plan
from avd_trainer.planning.render import render
from avd_trainer.training.config import TrainConfig

DOCS = Path(__file__).parents[1] / "docs"
PAGES = ("recipe.md", "memory.md")
MODULE = ["-m", "avd_trainer"]


def commands(page: str) -> Iterator[list[str]]:
    """Arguments of ``avd`` in the blocks of a page, with or without ``torchrun``."""
    for block in re.findall(r"^```\n(.*?)^```", (DOCS / page).read_text(), re.DOTALL | re.MULTILINE):
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            if words[:1] == ["avd"]:
                yield words[1:]
            elif words[:1] == ["torchrun"]:
                start = next(i for i in range(len(words)) if words[i : i + 2] == MODULE)
                yield words[start + 2 :]


@pytest.mark.parametrize(("page", "command"), [(page, command) for page in PAGES for command in commands(page)])
def test_the_command_line_has_every_command(page: str, command: list[str]) -> None:
    # Parses and runs nothing; an unknown option, a missing argument or a wrong type raises.
    parsed, arguments, names = get_command(app), command, []
    while hasattr(parsed, "commands"):
        names.append(arguments[0])
        parsed, arguments = parsed.commands[arguments[0]], arguments[1:]
    context = parsed.make_context(" ".join(names), list(arguments))
    if names[0] in ("train", "plan"):
        options = context.params
        data = {"data": {"kind": "shards", "path": "data/clips"}}
        load_config(TrainConfig, options["preset"], options["set_"], data, method=options["method"])


def test_the_recipe_has_commands() -> None:
    assert len(list(commands("recipe.md"))) > 10
    assert ["data", "inspect", "data/clips"] in list(commands("recipe.md"))


def wan_run(*overrides: str) -> TrainConfig:
    data = {"data": {"kind": "shards", "path": "not/there"}}
    return load_config(TrainConfig, "wan2.1-1.3b", list(overrides), data)


@pytest.fixture(scope="module")
def plan() -> Plan:
    return make_plan(wan_run(), gpus=8)


def test_figures_are_the_plans(plan: Plan) -> None:
    page = (DOCS / "recipe.md").read_text()
    console = Console(width=200, record=True)
    console.print(render(plan))
    printed = console.export_text()
    for figure in ("96.5 s", "4.47 days", "858 GPU hours", "83.9 GB", "278.1 GB", "164 TFLOP", "4,000 updates"):
        assert figure in printed, figure
        assert figure in page, figure
    assert "15.7 GB of 80 (13.2 in tensors)" in printed
    assert "15.7 GB of 80, 13.2 in tensors" in page


def test_figures_of_the_smoke_run_are_the_plans() -> None:
    page = (DOCS / "recipe.md").read_text()
    plan = make_plan(wan_run("max_steps=20", "checkpoint.every=10", "samples.every=10"), gpus=8)
    assert f"{60 * plan.time.hours:.0f} minutes" in page
    assert f"{(plan.disk.together - plan.disk.data) / 1e9:.1f} GB, removed afterwards" in page
