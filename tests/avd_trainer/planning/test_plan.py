"""The plan as a person sees it."""

import io
import re
from pathlib import Path

import pytest
import torch
from rich.console import Console
from typer.testing import CliRunner

from avd_trainer.commands.app import app
from avd_trainer.config.loading import load_config
from avd_trainer.planning.memory import GB
from avd_trainer.planning.plan import Plan, make_plan
from avd_trainer.planning.render import render
from avd_trainer.training.config import TrainConfig


def tiny_plan(*overrides: str, gpu_memory: float = 80.0) -> Plan:
    return make_plan(load_config(TrainConfig, "tiny", list(overrides)), gpu_memory=gpu_memory)


def rendered(plan: Plan) -> str:
    console = Console(width=160, file=io.StringIO(), record=True)
    console.print(render(plan))
    return console.export_text()


def test_a_plan_that_fits_names_no_changes() -> None:
    plan = tiny_plan()
    assert plan.fits
    assert plan.changes == ()
    assert tiny_plan(gpu_memory=plan.worst.needed / GB).fits


def test_a_size_is_of_the_models_latent_space() -> None:
    tiny = load_config(TrainConfig, "tiny")
    assert make_plan(tiny, size="40x24x9").run.latent_shape == (16, 3, 6, 10)
    wan = load_config(TrainConfig, "wan2.1-1.3b", [], {"data": {"kind": "shards", "path": "not/there"}})
    assert make_plan(wan, size="64x32x9").run.latent_shape == (16, 3, 4, 8)


def test_the_plan_shows_parts_verdict_changes_time_and_disk() -> None:
    text = rendered(tiny_plan(gpu_memory=0.5))
    for words in (
        "frozen weights",
        "online update",
        "does not fit",
        "--set method.online.lora.rank=64",
        "1 GPU(s) of 0.5 GB",
        "Time on 1 x H100",
        "200 updates",
        "computed, at an assumed utilisation of 0.4",
        "checkpoint",
        "none on disk",
    ):
        assert words in text
    assert "It fits" in rendered(tiny_plan())


def test_a_plan_warns_of_data_forcing_from_the_teacher_itself() -> None:
    plans = [
        make_plan(load_config(TrainConfig, "tiny", overrides, method="data_forcing"))
        for overrides in ([], ["student_weights=runs/dmd2/student"])
    ]
    assert ["warning: data_forcing starts from the teacher itself" in rendered(plan) for plan in plans] == [True, False]


def test_the_page_says_what_methods_need_for_14b() -> None:
    """Of the methods that are quick to plan; the others take most of a minute."""
    page = (Path(__file__).parents[3] / "docs" / "memory.md").read_text()
    table = page.partition("| `wan2.1-14b` |")[2].partition("\n\n")[0].splitlines()[2:]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table]
    assert len(rows) > 6
    for methods, *told in rows:
        for method in set(re.findall(r"`(\w+)`", methods)) & {"lcm", "scm", "avd", "dmd", "data_forcing", "rcm"}:
            data = {"data": {"kind": "shards", "path": "not/there"}}
            config = load_config(TrainConfig, "wan2.1-14b", [], data, method=method)
            # Memory without end, so that no changes are looked for.
            needed = [make_plan(config, gpus=gpus, gpu_memory=1e6).worst.needed / GB for gpus in (8, 24)]
            assert told[:2] == [f"**{each:.1f}**" if each > 80 else f"{each:.1f}" for each in needed], method
            assert told[2].startswith("as ") == (needed[0] <= 80), method


def plan_command(*arguments: str) -> str:
    result = CliRunner().invoke(app, ["plan", "tiny", *arguments])
    assert result.exit_code == 0, result.output
    return " ".join(result.output.split())


def test_the_speed_of_a_gpu_can_be_said() -> None:
    assert "assumed utilisation of 0.5 of 312 TFLOP/s" in plan_command("--peak-tflops", "312", "--utilisation", "0.5")


def test_without_a_gpu_nothing_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    printed = plan_command("--measure")
    assert "There is no GPU here to measure: times are computed." in printed
    assert "assumed utilisation" in printed
