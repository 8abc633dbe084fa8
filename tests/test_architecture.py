"""The smallest method of docs/architecture.md is one: its two files, put in place, are all that it takes."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import avd_trainer

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
QUICK = ("--max-steps", "2", "--set", "batch_size=2", "--set", "data.clips=4", "--set", "data.held_out=2")
COMMANDS = """
import json, sys
from avd_trainer.commands.app import app
for arguments in json.loads(sys.argv[1]):
    assert not app(arguments, standalone_mode=False)
    print("\\f")
"""
"""Do the commands of ``avd`` that are given, and print a form feed after each."""


def block(language: str) -> str:
    (found,) = re.findall(rf"```{language}\n(.*?)```", PAGE, re.DOTALL)
    return str(found)


def test_the_smallest_method_takes_two_files(tmp_path: Path) -> None:
    package = tmp_path / "avd_trainer"
    shutil.copytree(Path(avd_trainer.__file__).parent, package, ignore=shutil.ignore_patterns("__pycache__"))
    (package / "methods" / "plain_regression.py").write_text(block("python"))
    (package / "presets" / "tiny" / "plain_regression.yaml").write_text(block("yaml"))

    # In a process of its own: this one has the package as it is. One for all, since imports take longer than the rest.
    commands = [
        ["methods"],
        ["plan", "tiny", "--method", "plain_regression"],
        ["train", "tiny", "--method", "plain_regression", "--output", "run", *QUICK],
    ]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT)]), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", COMMANDS, json.dumps(commands)]
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    methods, plan, _ = done.stdout.split("\f\n", 2)
    assert "plain_regression" in methods
    assert "student update" in plan
    steps = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [step["skipped"] for step in steps] == [0, 0]
    assert all(step["loss"] > 0 for step in steps)
    assert (tmp_path / "run" / "student" / "diffusion_pytorch_model.safetensors").exists()


def test_every_room_is_described() -> None:
    rooms = {folder.parent.name for folder in Path(avd_trainer.__file__).parent.glob("*/__init__.py")}
    assert rooms <= set(re.findall(r"^\| `(\w+)` \|", PAGE, re.MULTILINE))
