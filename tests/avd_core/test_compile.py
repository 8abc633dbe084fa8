import copy
import os
import shutil
from collections.abc import Iterator

import pytest
import torch
from torch import nn

from avd_core import AVDConfig, AVDObjective
from loss_cases import LOSSES, Case
from tensors import randn, state_of

CXX = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def assert_compiled_is_eager(case: Case, backend: str) -> None:
    eager = case.make()
    module = copy.deepcopy(eager)
    compiled = torch.compile(module, fullgraph=True, backend=backend)
    for seed in range(4):
        outcomes = []
        for call in (eager, compiled):
            inputs = case.inputs(seed, torch.float32)
            loss, metrics = call(*inputs)
            outcomes.append((loss, metrics, torch.autograd.grad(loss, [x for x in inputs if x.requires_grad])))
        torch.testing.assert_close(outcomes[1], outcomes[0], rtol=1e-5, atol=1e-7)
        torch.testing.assert_close(state_of(module), state_of(eager), rtol=1e-6, atol=0)


@pytest.mark.parametrize("name", LOSSES)
def test_a_compiled_loss_has_the_eager_value_gradient_and_cache(name: str) -> None:
    assert_compiled_is_eager(LOSSES[name], "aot_eager")


@pytest.mark.skipif(not CXX, reason="needs a C++ compiler: torch.compile's default backend writes and builds C++")
def test_the_default_backend_compiles_the_whole_objective() -> None:
    # The slow one: it writes and builds C++.
    assert_compiled_is_eager(LOSSES["objective"], "inductor")


@pytest.mark.parametrize("name", ["regression", "objective"])
def test_a_compiled_loss_reads_only_in_evaluation_mode(name: str) -> None:
    module = LOSSES[name].make()
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    compiled(*LOSSES[name].inputs(0, torch.float32))
    before = state_of(module)
    module.eval()
    compiled(*LOSSES[name].inputs(1, torch.float32))
    torch.testing.assert_close(state_of(module), before, rtol=0, atol=0)
    module.train()
    compiled(*LOSSES[name].inputs(1, torch.float32))
    assert not torch.equal(state_of(module)[_means(module)], before[_means(module)])


def _means(module: nn.Module) -> str:
    return next(name for name in module.state_dict() if name.endswith("cache.means"))


# The compiler looks at the .grad of its inputs, and the matching loss is no leaf.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
def test_a_compiled_objective_holds_the_eager_ratio() -> None:
    # The balance asks autograd for gradients, where the graph is cut: so no fullgraph here.
    eager = AVDObjective(AVDConfig(gradient_ratio=0.5))
    module = copy.deepcopy(eager)
    compiled = torch.compile(module, backend="aot_eager")
    for seed in range(3):
        outcomes = []
        for call in (eager, compiled):
            inputs = LOSSES["objective"].inputs(seed, torch.float32)
            output = randn(seed, 2, 3).float().requires_grad_()
            loss, metrics = call(*inputs, matching_loss=output.square().sum(), matching_output=output)
            outcomes.append((loss, metrics, torch.autograd.grad(loss, inputs[:2])))
        torch.testing.assert_close(outcomes[1], outcomes[0])
    torch.testing.assert_close(state_of(module), state_of(eager))
