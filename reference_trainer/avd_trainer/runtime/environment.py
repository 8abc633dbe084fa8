"""What figures were measured on."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
from functools import cache
from pathlib import Path

import torch

SOURCES = "reference_trainer"
"""The folder of a checkout that holds this package."""
CHANGED = " with changes"
"""Behind the name of a commit of which tracked files differ."""
SECONDS_OF_GIT = 1.0
"""Git answers in some hundredths; a file system that hangs must not hold up a run."""


def environment() -> dict[str, str | int]:
    """Hardware and versions, for the head of a results file.

    Where the package runs from a git checkout also ``commit``, by :func:`commit_of`, asked once by each process: call
    this when the work begins, since a checkout may be another one when it ends.
    """
    cpu = platform.processor() or platform.machine()
    if os.path.exists("/proc/cpuinfo"):
        with open("/proc/cpuinfo") as lines:
            cpu = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), cpu)
    folder = Path(__file__).resolve().parents[2]
    commit = commit_of(folder.parent) if folder.name == SOURCES else None
    return {
        "cpu": cpu,
        "cores": os.cpu_count() or 0,
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "diffusers": importlib.metadata.version("diffusers"),
        "avd-core": importlib.metadata.version("avd-core"),
        **({} if commit is None else {"commit": commit}),
    }


@cache
def commit_of(checkout: Path) -> str | None:
    """The commit that is checked out, with :data:`CHANGED` behind it where tracked files differ from it.

    None where ``checkout`` is no root of a git checkout, has no commit, or git is not there or does not answer.
    """
    if not (checkout / ".git").exists():
        return None
    command = ["git", "-C", str(checkout), "--no-optional-locks", "status", "--porcelain=v2", "--branch"]
    command += ["--untracked-files=no", "--no-ahead-behind", "--no-renames"]
    # In a hook of git such variables name the repository of the hook.
    variables = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    try:
        done = subprocess.run(command, env=variables, capture_output=True, timeout=SECONDS_OF_GIT, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    lines = done.stdout.decode(errors="replace").splitlines()
    commit = next((line.split()[-1] for line in lines if line.startswith("# branch.oid ")), "(initial)")
    changed = any(not line.startswith("#") for line in lines)
    return None if commit == "(initial)" else commit + CHANGED * changed
