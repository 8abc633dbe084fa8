"""What the site is made of: every page can be reached, and the API pages have every public name."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PACKAGES = {
    "avd_core": "avd_core/__init__.py",
    "avd_integrations": "integrations/avd_integrations/__init__.py",
    "avd_integrations.diffusers": "integrations/avd_integrations/diffusers/__init__.py",
}


def reached() -> list[Path]:
    """Pages that the lists of pages name, once for each time; a pattern leaves out what its list names already."""
    found: list[Path] = []
    for page in DOCS.rglob("*.md"):
        text = page.read_text(encoding="utf-8")
        for block in re.findall(r"^```\{toctree\}\n(.*?)^```", text, re.DOTALL | re.MULTILINE):
            entries = [line for line in block.splitlines() if line and not line.startswith(":")]
            targets = [re.sub(r".*<(.*)>", r"\1", entry) for entry in entries if "*" not in entry]
            named = [(page.parent / target).resolve() for target in targets]
            found += named
            for pattern in (entry for entry in entries if "*" in entry):
                matched = [file.with_suffix("") for file in page.parent.glob(f"{pattern}.md")]
                found += [file for file in matched if file not in named]
    return found


def test_navigation_reaches_every_page_once() -> None:
    pages = [*ROOT.glob("*.md"), *DOCS.rglob("*.md"), *DOCS.rglob("*.rst")]
    expected = sorted(page.with_suffix("") for page in pages if page != DOCS / "index.md")
    assert sorted(reached()) == expected, "name the page in a toctree of docs/index.md, or delete its entry there"


def described(package: str) -> set[str]:
    names = set()
    for page in DOCS.rglob("*.rst"):
        current = ""
        for directive, argument in re.findall(r"^\.\. (\w+):: (\S+)", page.read_text(encoding="utf-8"), re.MULTILINE):
            if directive in ("currentmodule", "automodule"):
                current = argument
            elif directive.startswith("auto") and current == package:
                names.add(argument)
    return names


@pytest.mark.parametrize("package", PACKAGES)
def test_every_public_name_is_described(package: str) -> None:
    tree = ast.parse((ROOT / PACKAGES[package]).read_text(encoding="utf-8"))
    (public,) = [
        ast.literal_eval(node.value)
        for node in tree.body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__"
    ]
    assert described(package) == set(public), "describe it on a page of docs/api"
