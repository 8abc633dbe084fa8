"""Figures of the recipe are the plan's; its commands are checked with those of all pages."""

from pathlib import Path

import pytest
from rich.console import Console

from avd_trainer.config.loading import load_config
from avd_trainer.planning.plan import Plan, make_plan
from avd_trainer.planning.render import render
from avd_trainer.training.config import TrainConfig

DOCS = Path(__file__).parents[1] / "docs"


def wan_run(*overrides: str) -> TrainConfig:
    data = {"data": {"kind": "shards", "path": "not/there"}}
    return load_config(TrainConfig, "wan2.1-1.3b", list(overrides), data)


@pytest.fixture(scope="module")
def plan() -> Plan:
    return make_plan(wan_run(), gpus=8)


def test_figures_are_the_plans(plan: Plan) -> None:
    page = " ".join((DOCS / "recipe.md").read_text().split())
    console = Console(width=200, record=True)
    console.print(render(plan))
    printed = console.export_text()
    for figure in ("96.5 s", "4.47 days", "858 GPU hours", "83.9 GB", "278.1 GB", "164 TFLOP", "4,000 updates"):
        assert figure in printed, figure
        assert figure in page, figure
    assert "15.7 GB of 80 (13.2 in tensors)" in printed
    assert "15.7 GB of 80, 13.2 in tensors" in page


def test_figures_of_the_smoke_run_are_the_plans() -> None:
    page = " ".join((DOCS / "recipe.md").read_text().split())
    plan = make_plan(wan_run("max_steps=20", "checkpoint.every=10", "samples.every=10"), gpus=8)
    assert f"{60 * plan.time.hours:.0f} minutes" in page
    assert f"{(plan.disk.together - plan.disk.data) / 1e9:.1f} GB, removed afterwards" in page
