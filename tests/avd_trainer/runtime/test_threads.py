import os
import subprocess
import sys

import pytest
import torch

from avd_trainer.runtime.threads import describe_threads, wait_asleep


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ({}, "PASSIVE"),
        ({"OMP_WAIT_POLICY": "ACTIVE"}, "ACTIVE"),
        ({"GOMP_SPINCOUNT": "1000"}, None),
    ],
)
def test_threads_sleep_unless_a_person_chose(
    monkeypatch: pytest.MonkeyPatch, before: dict[str, str], after: str | None
) -> None:
    for name in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in before.items():
        monkeypatch.setenv(name, value)
    wait_asleep()
    assert os.environ.get("OMP_WAIT_POLICY") == after


def test_the_command_chooses_before_pytorch_is_there() -> None:
    """Later it would change nothing: OpenMP reads it when it is loaded."""
    code = """
import os, sys
import avd_trainer.commands.app as commands
from avd_trainer.__main__ import main
def app():
    assert "torch" not in sys.modules
    print(os.environ["OMP_WAIT_POLICY"])
commands.app = app
main()
"""
    environment = {k: v for k, v in os.environ.items() if k not in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")}
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert printed.stdout == "PASSIVE\n", printed.stderr


def test_it_is_said_how_many_there_are_and_how_they_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "with one thread" in describe_threads()
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)
    monkeypatch.delenv("GOMP_SPINCOUNT", raising=False)
    monkeypatch.setenv("OMP_WAIT_POLICY", "PASSIVE")
    assert "with 4 threads that sleep while they wait" in describe_threads()
    monkeypatch.setenv("OMP_WAIT_POLICY", "ACTIVE")
    assert "with 4 threads that spin while they wait" in describe_threads()
