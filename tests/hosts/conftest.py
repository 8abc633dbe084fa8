"""Adapters inside real hosts: ``AVD_HOSTS=DIR pytest -m hosts``, with what ``prepare.py`` has put into DIR."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from prepare import packages_of

ROOT = Path(__file__).resolve().parents[2]
PROGRAMS = Path(__file__).parent / "programs"

RunInHost = Callable[..., dict[str, Any]]


@pytest.fixture
def checkout() -> Callable[[str], Path]:
    """The folder of a host's checkout, by the name of its repository."""

    def find(name: str) -> Path:
        hosts = os.environ.get("AVD_HOSTS")
        if not hosts:
            pytest.skip("AVD_HOSTS names no folder with the hosts: see tests/hosts/prepare.py")
        if not Path(hosts).is_dir():
            pytest.fail(f"AVD_HOSTS is {hosts}, and there is no such folder")
        path = Path(hosts).resolve() / name  # programs run in other folders
        if not path.is_dir():
            pytest.skip(f"AVD_HOSTS has no {name}")
        return path

    return find


@pytest.fixture
def run_in_host(checkout: Callable[[str], Path], tmp_path: Path) -> RunInHost:
    """Run a program of ``programs/`` in a process of its own, inside a host's checkout.

    A host brings modules with everyday names and settings of its own, so nothing of it is imported here. The program
    gets a scratch folder as its first argument, makes its own assertions, and prints a JSON object as its last line.
    """

    def run(host: str, program: str, *arguments: str) -> dict[str, Any]:
        folder = checkout(host)
        packages = packages_of(folder)
        hint = "" if packages.is_dir() else f"\nThere is no {packages}, which tests/hosts/prepare.py makes."
        ours = (ROOT / name for name in ("integrations", "reference_trainer", "tests"))
        paths = [folder, packages, ROOT, *ours]
        result = subprocess.run(
            [sys.executable, str(PROGRAMS / program), str(tmp_path), *arguments],
            cwd=folder,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(map(str, paths)), "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            timeout=280,
        )
        assert result.returncode == 0, (
            f"{host}: {program} failed:\n{result.stdout[-4000:]}\n{result.stderr[-8000:]}{hint}"
        )
        report: dict[str, Any] = json.loads(result.stdout.strip().splitlines()[-1])
        return report

    return run
