import pytest
import torch
from torch import Tensor

from loss_cases import LOSSES, Case
from tensors import assert_same_state, state_of

DTYPES = [torch.bfloat16, torch.float16, torch.float32, torch.float64]


@pytest.fixture(params=LOSSES)
def case(request: pytest.FixtureRequest) -> Case:
    return LOSSES[request.param]


def run(
    case: Case, dtype: torch.dtype, *, calls: int = 3, double: bool = False, autocast: bool = False
) -> tuple[Tensor, tuple[Tensor, ...], dict[str, Tensor], dict[str, Tensor]]:
    """Loss, gradients, metrics and state after some calls; ``double`` computes on the same numbers in float64."""
    module = case.make()
    for seed in range(calls):
        inputs = case.inputs(seed, dtype)
        if double:
            inputs = [
                x.detach().double().requires_grad_(x.requires_grad) if x.is_floating_point() else x for x in inputs
            ]
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            loss, metrics = module(*inputs)
    gradients = torch.autograd.grad(loss, [x for x in inputs if x.requires_grad])
    return loss, gradients, metrics, state_of(module)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_loss_is_float32_at_least_and_the_gradient_has_the_inputs_dtype(case: Case, dtype: torch.dtype) -> None:
    loss, gradients, metrics, _ = run(case, dtype)
    expected = torch.promote_types(dtype, torch.float32)
    assert loss.dtype == expected
    assert loss.ndim == 0
    assert {gradient.dtype for gradient in gradients} == {dtype}
    assert {metric.dtype for metric in metrics.values()} <= {torch.float32, expected}


@pytest.mark.parametrize("dtype", DTYPES)
def test_value_and_gradient_are_close_to_float64(case: Case, dtype: torch.dtype) -> None:
    loss, gradients, _, _ = run(case, dtype)
    exact, exact_gradients, _, _ = run(case, dtype, double=True)
    # The inputs' own rounding aside, everything is computed in float32; only the gradient is rounded once at the end.
    assert loss.item() == pytest.approx(exact.item(), rel=1e-6)
    for gradient, exact_gradient in zip(gradients, exact_gradients, strict=True):
        error = (gradient - exact_gradient).norm() / exact_gradient.norm()
        assert error < max(torch.finfo(dtype).eps, 1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
def test_autocast_changes_nothing(case: Case, dtype: torch.dtype) -> None:
    plain, autocast = run(case, dtype), run(case, dtype, autocast=True)
    assert torch.equal(autocast[0], plain[0])
    assert_same_state(autocast[1:], plain[1:])
