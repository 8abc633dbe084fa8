"""Files that go with a release say one version, and the lowest versions that are tested are those of the ranges."""

import re
import tomllib
from pathlib import Path

import yaml

import avd_core

ROOT = Path(__file__).parents[1]


def test_all_files_are_of_this_version() -> None:
    changes = (ROOT / "CHANGELOG.md").read_text()
    newest = re.search(r"^## (\S+) - (unreleased|\d{4}-\d{2}-\d{2})$", changes, re.MULTILINE)
    assert newest is not None
    assert newest[1] == avd_core.__version__
    assert yaml.safe_load((ROOT / "CITATION.cff").read_text())["version"] == avd_core.__version__
    assert f"## To {avd_core.__version__}," in (ROOT / "docs" / "upgrading.md").read_text()


def test_the_lowest_versions_are_those_of_the_ranges() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    ranges = dict(line.split(">=") for line in [*project["dependencies"], *project["optional-dependencies"]["ema"]])
    lines = (ROOT / "constraints-lowest.txt").read_text().splitlines()[1:]
    pins = dict(line.split("==") for line in lines)
    assert set(pins) == set(ranges)
    for name, version in pins.items():
        assert version.removesuffix(".0") == ranges[name].removesuffix(".0"), name
