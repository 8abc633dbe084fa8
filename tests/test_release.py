"""Files that go with a release say one version, and the lowest versions that are tested are those of the ranges."""

import re
import tomllib
from pathlib import Path

import pytest
import yaml
from packaging.version import Version

import avd_core

ROOT = Path(__file__).parents[1]


def test_all_files_are_of_this_version() -> None:
    changes = (ROOT / "CHANGELOG.md").read_text()
    newest = re.search(r"^## (\S+) - (unreleased|\d{4}-\d{2}-\d{2})$", changes, re.MULTILINE)
    assert newest is not None
    assert newest[1] == avd_core.__version__
    assert yaml.safe_load((ROOT / "CITATION.cff").read_text())["version"] == avd_core.__version__
    assert f"## To {avd_core.__version__}," in (ROOT / "docs" / "upgrading.md").read_text()


def test_lines_of_the_changelog_are_short() -> None:
    lines = (ROOT / "CHANGELOG.md").read_text().splitlines()
    assert [number for number, line in enumerate(lines, 1) if len(line) > 120] == []


@pytest.mark.parametrize(
    ("file", "extras"),
    [("constraints-lowest.txt", ["ema"]), ("constraints-lowest-trainer.txt", ["ema", "trainer", "wan", "lmdb"])],
)
def test_the_lowest_versions_are_those_of_the_ranges(file: str, extras: list[str]) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lines = [*project["dependencies"], *(line for extra in extras for line in project["optional-dependencies"][extra])]
    ranges = dict(line.split(">=") for line in lines if not line.startswith("avd-core"))  # an extra's torch is higher
    pins = dict(line.split("==") for line in (ROOT / file).read_text().splitlines() if not line.startswith("#"))
    assert set(pins) == set(ranges)
    for name, version in pins.items():
        assert Version(version) == Version(ranges[name]), name
