import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

import avd_trainer.methods
from avd_trainer.config.loading import presets
from avd_trainer.methods.base import Method, MethodConfig
from avd_trainer.methods.registry import ListedMethod, list_methods, load_method

NO_METHODS = {
    *("__init__", "base", "distillation", "terms", "registry"),
    *("equilibrium", "trigflow", "continuous", "consistency", "consistency_pair", "detail_expert", "watching"),
}
KINDS = [method.kind for method in list_methods()]


def test_methods_are_the_files_of_their_folder() -> None:
    (folder,) = avd_trainer.methods.__path__
    assert sorted({path.stem for path in Path(folder).glob("*.py")} - NO_METHODS) == KINDS


@pytest.mark.parametrize("kind", KINDS)
def test_a_method_is_loaded_by_the_name_of_its_file(kind: str) -> None:
    method = load_method(kind)
    assert issubclass(method, Method)
    assert issubclass(method.Config, MethodConfig)
    assert method.Config.model_fields["kind"].default == kind


@pytest.mark.parametrize("method", list_methods(), ids=KINDS)
def test_a_method_says_in_a_line_what_it_does_and_where_it_is_from(method: object) -> None:
    kind, summary, paper, *_ = method  # type: ignore[misc]
    module = sys.modules[load_method(kind).__module__]
    assert summary == (module.__doc__ or "").partition("\n")[0]
    assert 20 < len(summary) <= 110
    assert paper == module.PAPER


def test_listing_methods_imports_none_of_them() -> None:
    program = """
import sys
from avd_trainer.methods.registry import list_methods
assert list_methods()
print([name for name in sys.modules if name == "torch" or name.startswith("avd_trainer.methods.")])
"""
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "['avd_trainer.methods.registry']"


PAGES = Path(__file__).parents[3] / "docs" / "methods"


def cells(page: Path, first: str) -> list[str]:
    """Of the row that begins with a cell."""
    (row,) = [line for line in page.read_text().splitlines() if line.startswith(f"| {first} |")]
    return [cell.strip() for cell in row.strip("|").split("|")]


@pytest.mark.parametrize("method", [m for m in list_methods() if m.sampled], ids=lambda method: method.kind)
def test_pages_say_what_the_files_do(method: ListedMethod) -> None:
    facts = [", ".join(method.needs), ", then ".join(f"{each:g}" for each in method.forwards), method.sampled]
    kind = method.kind
    link = f"[{kind}]({'../method.md' if kind in ('dmd', 'avd') else f'{kind}.md'})"
    assert cells(PAGES / "index.md", link)[2:] == facts
    if (PAGES / f"{kind}.md").exists():
        *told, named, loss = cells(PAGES / f"{kind}.md", facts[0])
        assert told == facts
        assert set(re.findall(r"`([\w.-]+)`", named)) == {name for name, kinds in presets().items() if kind in kinds}
        assert loss


def test_the_page_of_the_terms_says_what_was_measured() -> None:
    measured = json.loads((PAGES.parents[1] / "benchmarks" / "results" / "motion-gradients.json").read_text())
    over = measured["motion_over_own"]
    text = " ".join((PAGES / "terms.md").read_text().split())
    assert f"is {over['dmd']:.2g} times that of `dmd`'s own loss" in text
    assert f"{over['pcm']:.2g} times `pcm`'s and {over['dcm, semantic turn']:.2g} times that of `dcm`'s" in text
