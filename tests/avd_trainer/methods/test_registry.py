import subprocess
import sys
from pathlib import Path

import pytest

import avd_trainer.methods
from avd_trainer.methods.base import Method, MethodConfig
from avd_trainer.methods.registry import list_methods, load_method

NO_METHODS = {
    *("__init__", "base", "distillation", "terms", "registry"),
    *("equilibrium", "trigflow", "continuous", "consistency", "detail_expert", "watching"),
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
