"""The lines of a host's page, put into a copy of the host's script as a reader of the page would."""

import ast
import importlib.util
import re
import sys
import textwrap
from pathlib import Path
from types import ModuleType

PAGES = Path(__file__).resolve().parents[3] / "docs" / "hosts"
MOST_LINES = 12

_BLOCK = re.compile(r"^(After|Before|Instead of) `([^`\n]+)`[^\n]*:\n\n```python\n(.*?)```", re.DOTALL | re.MULTILINE)


def code_blocks(page: str, language: str) -> list[str]:
    """The text of each block of a page that is in this language."""
    return re.findall(rf"```{language}\n(.*?)```", (PAGES / page).read_text(), re.DOTALL)


def page_lines(page: str) -> list[tuple[str, str, str]]:
    """``(where, anchor, code)`` of each block of a page that says where it goes."""
    blocks = _BLOCK.findall((PAGES / page).read_text())
    assert blocks, f"{page} has no block after a line that says where it goes"
    return blocks


def with_lines(source: str, blocks: list[tuple[str, str, str]]) -> str:
    """``source`` with the blocks put where they say; each anchor is the beginning of one single statement.

    Blocks are what one reader inserts: of a page for several scripts, those of one.
    """
    count = sum(bool(line.strip()) for _, _, code in blocks for line in code.splitlines())
    assert count <= MOST_LINES, f"{count} lines are inserted, and the pages promise at most {MOST_LINES}"
    for where, anchor, code in blocks:
        lines = source.splitlines(keepends=True)
        statements = {node.lineno: node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.stmt)}
        found = [n for n in statements if lines[n - 1].strip().startswith(anchor)]
        assert len(found) == 1, f"{anchor!r} begins {len(found)} statements of the host's script, not one"
        statement = statements[found[0]]
        first, last = statement.lineno - 1, statement.end_lineno
        indented = textwrap.indent(textwrap.dedent(code), " " * statement.col_offset).splitlines(keepends=True)
        start, stop = {"After": (last, last), "Before": (first, first), "Instead of": (first, last)}[where]
        source = "".join(lines[:start] + indented + lines[stop:])
    return source


def call(code: str, name: str) -> tuple[list[str], dict[str, str]]:
    """Arguments and keywords, as they are written, of the one call of a function or method of that name."""
    calls = [n for n in ast.walk(ast.parse(code)) if isinstance(n, ast.Call)]
    (found,) = [n for n in calls if ast.unparse(n.func).split(".")[-1] == name]
    return [ast.unparse(a) for a in found.args], {k.arg: ast.unparse(k.value) for k in found.keywords}


def load_script(path: Path, source: str) -> ModuleType:
    """Write a script to ``path``, and import it as a module of the file's name."""
    path.write_text(source)
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = sys.modules[path.stem] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def assignments(source: str, function: str, before: str) -> list[str]:
    """Names that ``function`` binds, in order of their first binding, up to the statement that begins so."""
    lines = source.splitlines()
    body = next(n for n in ast.walk(ast.parse(source)) if isinstance(n, ast.FunctionDef) and n.name == function)
    end = next(
        n.lineno for n in ast.walk(body) if isinstance(n, ast.stmt) and lines[n.lineno - 1].strip().startswith(before)
    )
    names = [
        (n.lineno, n.col_offset, n.id)
        for n in ast.walk(body)
        if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store) and n.lineno < end
    ]
    return [name for _, _, name in sorted(names)]


def assert_in_order(names: list[str], expected: list[str]) -> None:
    """That the first bindings of the expected names come in this order."""
    places = [names.index(name) for name in expected]
    assert places == sorted(places), names
