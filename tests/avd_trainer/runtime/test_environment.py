"""Which code made a figure: the commit, where there is one."""

import os
import subprocess
from pathlib import Path

import pytest

from avd_trainer.runtime import environment as module
from avd_trainer.runtime.environment import commit_of, environment


def git(folder: Path, *arguments: str) -> str:
    own = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    settings = ["-c", "user.name=A", "-c", "user.email=a@example.org", "-c", "commit.gpgsign=false"]
    command = ["git", "-C", str(folder), *settings, *arguments]
    return subprocess.run(command, env=own, capture_output=True, text=True, check=True).stdout.strip()


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """One commit of one file."""
    git(tmp_path, "init", "-q")
    (tmp_path / "code.py").write_text("1\n")
    git(tmp_path, "add", "code.py")
    git(tmp_path, "commit", "-q", "-m", "One")
    return tmp_path


@pytest.fixture(autouse=True)
def asked_anew() -> None:
    commit_of.cache_clear()


def test_a_commit_is_named_and_marked_where_tracked_files_differ(
    checkout: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commit = git(checkout, "rev-parse", "HEAD")
    (checkout / "notes.txt").write_text("not tracked")
    monkeypatch.setenv("GIT_DIR", str(checkout / "elsewhere"))  # as in a hook of another repository
    assert commit_of(checkout) == commit
    (checkout / "code.py").write_text("2\n")
    assert commit_of(checkout) == commit  # as it was when it was asked first
    commit_of.cache_clear()
    assert commit_of(checkout) == f"{commit} with changes"
    git(checkout, "add", "code.py")
    commit_of.cache_clear()
    assert commit_of(checkout) == f"{commit} with changes"


def test_a_worktree_has_a_commit_of_its_own(checkout: Path) -> None:
    git(checkout, "worktree", "add", "-q", "other")
    git(checkout / "other", "commit", "-q", "--allow-empty", "-m", "Two")
    assert commit_of(checkout / "other") == git(checkout / "other", "rev-parse", "HEAD") != commit_of(checkout)


def test_without_git_or_a_commit_there_is_none(checkout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (checkout / "inside").mkdir()
    assert commit_of(checkout / "inside") is None
    git(checkout / "inside", "init", "-q")
    commit_of.cache_clear()
    assert commit_of(checkout / "inside") is None  # no commit yet
    monkeypatch.setattr(module, "SECONDS_OF_GIT", 0.0)
    assert commit_of(checkout) is None
    monkeypatch.undo()
    monkeypatch.setenv("PATH", "")
    commit_of.cache_clear()
    assert commit_of(checkout) is None


def test_the_environment_has_the_commit_of_the_packages_checkout_alone(
    checkout: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = Path("avd_trainer") / "runtime" / "environment.py"
    monkeypatch.setattr(module, "__file__", str(checkout / "reference_trainer" / place))
    assert environment()["commit"] == git(checkout, "rev-parse", "HEAD")
    monkeypatch.setattr(module, "__file__", str(checkout / "site-packages" / place))  # installed in another project
    assert "commit" not in environment()
