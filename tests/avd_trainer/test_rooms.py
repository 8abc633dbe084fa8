"""Imports of ``avd_trainer`` go one way, from room to room; read from the files, nothing is imported."""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

import avd_trainer

ROOMS = (
    "runtime", "config", "models", "data", "methods", "training", "planning", "inference", "evaluation", "studies",
    "commands",
)  # fmt: skip
"""A room may import from those before it, and from itself."""
DOOR = "__main__"
"""The module outside the rooms that may import from all of them."""


def find_imports(package: Path) -> dict[str, set[str]]:
    """What each module of a package imports from it, by names within the package: ``models.roles``.

    Imports count wherever they stand: at the top, in functions, for the types alone.
    """
    modules = {_name(path, package): path for path in package.rglob("*.py")}
    return {name: set(_imports(path, package, modules)) - {name} for name, path in modules.items()}


def find_faults(imports: Mapping[str, set[str]]) -> list[str]:
    """Imports that go up, into a room behind one's own, or in a circle; modules that are in no room."""
    faults = [f"{name} is in no room" for name in imports if name not in ("", DOOR) and _room(name) not in ROOMS]
    for name, imported in imports.items():
        for other in sorted(imported):
            if other in ("", DOOR) or name == "" or (name != DOOR and _place(other) > _place(name)):
                faults.append(f"{name or 'the package'} imports {other or 'the package'}")
    return faults + [" -> ".join(circle) for circle in _circles(imports)]


def _name(path: Path, package: Path) -> str:
    parts = path.relative_to(package).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def _imports(path: Path, package: Path, modules: Mapping[str, Path]) -> Iterator[str]:
    own = (package.name, *path.relative_to(package).parts[:-1])
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            targets = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = (
                ".".join([*own[: len(own) - node.level + 1], *filter(None, [node.module])])
                if node.level
                else node.module
            )
            # Of a package, what is imported may be one of its modules.
            targets = [f"{base}.{alias.name}" for alias in node.names]
        else:
            continue
        for target in targets:
            first, _, rest = target.partition(".")
            if first != package.name:
                continue
            yield rest if rest in modules else rest.rpartition(".")[0]


def _room(name: str) -> str:
    return name.partition(".")[0]


def _place(name: str) -> int:
    return ROOMS.index(_room(name)) if _room(name) in ROOMS else len(ROOMS)


def _circles(imports: Mapping[str, set[str]]) -> Iterator[list[str]]:
    done: set[str] = set()

    def follow(name: str, way: list[str]) -> Iterator[list[str]]:
        if name in way:
            yield [*way[way.index(name) :], name]
        elif name not in done:
            for other in sorted(imports.get(name, ())):
                yield from follow(other, [*way, name])
            done.add(name)

    for name in sorted(imports):
        yield from follow(name, [])


def test_imports_go_one_way() -> None:
    imports = find_imports(Path(avd_trainer.__file__).parent)
    assert "runtime.draws" in imports["training.trainer"]  # the files were read
    assert find_faults(imports) == []


@pytest.mark.parametrize(
    ("files", "faults"),
    [
        ({"models/lora.py": "from pack.runtime.ranks import Ranks"}, []),
        ({"models/lora.py": "from pack.models import roles", "models/roles.py": ""}, []),
        ({"__main__.py": "from pack.commands.app import app"}, []),
        ({"models/lora.py": "import torch\nfrom somewhere.training import run"}, []),
        ({"models/lora.py": "from pack.training.run import train"}, ["models.lora imports training.run"]),
        ({"models/lora.py": "from pack.training import run"}, ["models.lora imports training.run"]),
        ({"models/lora.py": "import pack.training.run as run"}, ["models.lora imports training.run"]),
        ({"models/lora.py": "from ..training.run import train"}, ["models.lora imports training.run"]),
        ({"models/lora.py": "from .. import training"}, ["models.lora imports training"]),
        (
            {"models/codecs/wan.py": "def f():\n    from pack.data.shards import Example"},
            ["models.codecs.wan imports data.shards"],
        ),
        (
            {"config/loading.py": "if TYPE_CHECKING:\n    from pack.training.run import train"},
            ["config.loading imports training.run"],
        ),
        ({"runtime/ranks.py": "import pack"}, ["runtime.ranks imports the package"]),
        ({"__init__.py": "from pack.runtime.ranks import Ranks"}, ["the package imports runtime.ranks"]),
        ({"commands/app.py": "from pack import __main__"}, ["commands.app imports __main__"]),
        ({"attic/old.py": ""}, ["attic.old is in no room"]),
        (
            {
                "data/a.py": "from .b import x",
                "data/b.py": "from pack.data.c import x",
                "data/c.py": "import pack.data.a",
            },
            ["data.a -> data.b -> data.c -> data.a"],
        ),
    ],
)
def test_what_goes_up_or_in_a_circle_is_found(tmp_path: Path, files: dict[str, str], faults: list[str]) -> None:
    usual = {
        "__init__.py": "", "__main__.py": "", "runtime/__init__.py": "", "runtime/ranks.py": "", "data/shards.py": "",
        "training/__init__.py": "", "training/run.py": "", "commands/app.py": "", "models/__init__.py": "",
    }  # fmt: skip
    for name, text in (usual | files).items():
        path = tmp_path / "pack" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    assert find_faults(find_imports(tmp_path / "pack")) == faults
