"""What is tested is what the pages say was proven."""

import importlib.metadata
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from prepare import HOSTS, packages_of

pytestmark = pytest.mark.hosts


@pytest.mark.parametrize("name", HOSTS)
def test_the_host_is_at_what_it_was_proven_on(checkout: Callable[[str], Path], name: str) -> None:
    folder, host = checkout(name), HOSTS[name]
    if "release" in host:
        package, _, expected = host["release"].partition("==")
        version = ", ".join(p.version for p in importlib.metadata.distributions(name=package, path=[str(folder)]))
    else:
        expected = host["commit"]
        version = subprocess.run(
            ["git", "-C", str(folder), "rev-parse", "HEAD"], check=True, capture_output=True, text=True
        ).stdout.strip()
    assert version == expected, (
        f"{folder} is at {version or 'no release'}, the adapter was proven on {expected}. If the other tests "
        "pass, put the new one into tests/hosts/hosts.toml, the adapter's PROVEN_ON, docs/hosts.md and the host's page."
    )


@pytest.mark.parametrize("name", HOSTS)
def test_packages_are_the_ones_it_was_proven_with(checkout: Callable[[str], Path], name: str) -> None:
    folder = packages_of(checkout(name))
    if not folder.is_dir():
        pytest.skip(f"there is no {folder}, so packages are those of this environment")
    found = {f"{p.name}=={p.version}" for p in importlib.metadata.distributions(path=[str(folder)])}
    normal = {entry.lower().replace("_", "-") for entry in found}
    missing = {entry.lower() for entry in HOSTS[name]["packages"]} - normal
    assert not missing, f"{folder} has no {', '.join(sorted(missing))}: delete it, and run tests/hosts/prepare.py again"
