"""What the command line says before any work, and how fast: without PyTorch."""

import subprocess
import sys

import pytest
from typer.testing import CliRunner

from avd_trainer.commands.app import app
from avd_trainer.commands.sample import describe_rates
from avd_trainer.config.loading import presets


def run(*arguments: str) -> tuple[int, str]:
    """Exit status and everything that was printed, in one line without frames."""
    result = CliRunner().invoke(app, arguments)
    return result.exit_code, " ".join(result.output.replace("│", " ").split())


@pytest.mark.parametrize(
    "arguments",
    [["--help"], ["-h"], ["--version"], ["methods"], ["presets"], ["plan", "--help"], ["train", "-h"], ["demo", "-h"],
     ["data", "encode", "-h"], ["analyze", "similarity", "-h"], ["sample", "-h"], ["export", "-h"],
     ["study", "-h"], ["evaluate", "vbench", "generate", "-h"]],
)  # fmt: skip
def test_asking_for_help_imports_no_torch(arguments: list[str]) -> None:
    """In a process of its own: here PyTorch is there already."""
    code = f"""
import sys
from avd_trainer.commands.app import app
try:
    app({arguments!r})
except SystemExit as end:
    assert not end.code, end.code
print("imported:", [name for name in ("torch", "numpy", "diffusers", "avd_core") if name in sys.modules])
"""
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert printed.returncode == 0, printed.stderr
    assert printed.stdout.splitlines()[-1] == "imported: []"


def test_version_names_what_a_report_of_a_fault_needs() -> None:
    status, printed = run("--version")
    assert status == 0
    assert printed.startswith("avd-core ")
    assert "torch " in printed
    assert "Python 3." in printed


@pytest.mark.parametrize("command", ["train", "plan", "calibrate"])
def test_help_names_all_presets(command: str) -> None:
    _, printed = run(command, "-h")
    words = printed.translate(str.maketrans(",;(", "   ")).split()
    assert set(presets()) <= set(words)


def test_presets_are_listed_with_their_methods() -> None:
    status, printed = run("presets")
    assert status == 0
    for name, methods in presets().items():
        assert name in printed
        for method in methods:
            assert method in printed
    assert printed.count("(default)") == sum(len(methods) > 1 for methods in presets().values())


def test_the_output_of_an_export_is_not_that_of_a_run() -> None:
    _, printed = run("export", "-h")
    assert "Folder of the pipeline" in printed
    assert "the run writes" not in printed


@pytest.mark.parametrize(
    ("rates", "words"),
    [
        ((1, 1, 1, 1), "4 steps on all frames"),
        ((2, 2, 1, 1), "2 steps on every 2nd frame, 2 on all frames"),
        ((4, 2, 1, 1), "1 step on every 4th frame, 1 on every 2nd frame, 2 on all frames"),
    ],
)
def test_the_rates_of_steps_are_told_in_words(rates: tuple[int, ...], words: str) -> None:
    assert describe_rates(rates) == words
