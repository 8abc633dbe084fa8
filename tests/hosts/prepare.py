"""Bring the hosts of ``hosts.toml`` into a folder, each at what it was proven on, with its packages beside it.

    .venv/bin/python tests/hosts/prepare.py DIR [NAME ...]
    AVD_HOSTS=DIR .venv/bin/python -m pytest -m hosts tests/hosts

Packages go to ``DIR/NAME.packages`` and without what they depend on, so that hosts that want different versions share
one environment, and nobody's PyTorch is replaced. Without names it is all of them: about 1 GB.
"""

from __future__ import annotations

import argparse
import shlex
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

HOSTS: dict[str, dict[str, Any]] = tomllib.loads((Path(__file__).parent / "hosts.toml").read_text())


def packages_of(folder: Path) -> Path:
    """Where the packages of a host in this folder are."""
    return folder.with_name(f"{folder.name}.packages")


def prepare(folder: Path, host: dict[str, Any]) -> None:
    """One host and its packages; what is there already is left."""
    if not folder.exists():
        if "release" in host:
            _install(folder, [host["release"]])
        else:
            _check_out(folder, host["repository"], host["commit"])
    if host["packages"] and not packages_of(folder).exists():
        _install(packages_of(folder), host["packages"])


def _check_out(folder: Path, repository: str, commit: str) -> None:
    partial = _start(folder)
    git = ["git", "-C", str(partial)]
    subprocess.run(["git", "init", "--quiet", str(partial)], check=True)
    subprocess.run(
        [*git, "fetch", "--quiet", "--depth", "1", f"https://github.com/{repository}.git", commit], check=True
    )
    subprocess.run([*git, "checkout", "--quiet", "--detach", commit], check=True)
    partial.rename(folder)


def _install(folder: Path, packages: list[str]) -> None:
    partial = _start(folder)
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(partial)]
    subprocess.run([*command, *packages], check=True)
    partial.rename(folder)


def _start(folder: Path) -> Path:
    """An empty place to finish it in, so that an interrupted one is neither taken for the whole nor in the way."""
    partial = folder.with_name(f"{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    return partial


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, metavar="DIR")
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(HOSTS)}")
    arguments = parser.parse_args()
    if unknown := set(arguments.names) - set(HOSTS):
        parser.error(f"no host {', '.join(sorted(unknown))}; known are {', '.join(HOSTS)}")
    if arguments.folder.name in HOSTS:
        parser.error(f"DIR comes first, and {arguments.folder} is the name of a host")
    failed = []
    for name in arguments.names or HOSTS:
        print(name, flush=True)
        try:
            arguments.folder.mkdir(parents=True, exist_ok=True)
            prepare(arguments.folder.resolve() / name, HOSTS[name])
        except subprocess.CalledProcessError as error:
            failed.append(name)
            print(f"{name}: {shlex.join(map(str, error.cmd))} failed", file=sys.stderr)
        except OSError as error:
            failed.append(name)
            print(f"{name}: {error}", file=sys.stderr)
    if failed:
        sys.exit(f"Failed: {', '.join(failed)}. What was finished stays; try again.")
