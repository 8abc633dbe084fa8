import os
import subprocess
import sys

import pytest
import torch

from avd_trainer.runtime.threads import describe_threads, spin_briefly


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ({}, "10000"),
        ({"OMP_WAIT_POLICY": "ACTIVE"}, None),
        ({"GOMP_SPINCOUNT": "1000"}, "1000"),
    ],
)
def test_threads_spin_briefly_unless_a_person_chose(
    monkeypatch: pytest.MonkeyPatch, before: dict[str, str], after: str | None
) -> None:
    for name in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in before.items():
        monkeypatch.setenv(name, value)
    spin_briefly()
    assert os.environ.get("GOMP_SPINCOUNT") == after


def test_the_command_chooses_before_pytorch_is_there() -> None:
    """Later it would change nothing: OpenMP reads it when it is loaded."""
    code = """
import os, sys
import avd_trainer.commands.app as commands
from avd_trainer.__main__ import main
def app():
    assert "torch" not in sys.modules
    print(os.environ["GOMP_SPINCOUNT"])
commands.app = app
main()
"""
    environment = {k: v for k, v in os.environ.items() if k not in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")}
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert printed.stdout == "10000\n", printed.stderr


def test_it_is_said_how_many_there_are_and_how_they_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "with one thread" in describe_threads()
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)
    for name in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT"):
        monkeypatch.delenv(name, raising=False)
    assert "with 4 threads (OpenMP decides how they wait)" in describe_threads()
    monkeypatch.setenv("GOMP_SPINCOUNT", "10000")
    assert "with 4 threads (GOMP_SPINCOUNT=10000)" in describe_threads()
