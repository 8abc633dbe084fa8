import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from avd_core import DistributionMatchingLoss, distribution_matching_loss
from references import central_differences, flatten, mean, reference_matching_gradients
from tensors import randn
from watchers import NoArithmetic

seeds = st.integers(0, 2**32 - 1)
shapes = st.tuples(*[st.integers(1, 3)] * 5)


def draw(seed: int, shape: tuple[int, ...]) -> tuple[Tensor, ...]:
    """x_0 with gradient, the teacher's prediction, the online model's."""
    return randn(seed, *shape).requires_grad_(), randn(seed + 1, *shape), randn(seed + 2, *shape)


# --- Eq. 4


@given(seeds, shapes, st.floats(0, 3), st.sampled_from([1e-5, 0.5, 2.0]))
def test_loss_and_metric_are_the_reference(seed: int, shape: tuple[int, ...], weight: float, eps: float) -> None:
    x_0, real, online = draw(seed, shape)
    loss, metrics = distribution_matching_loss(x_0, real, online, weight=weight, eps=eps)
    squares = [
        g**2
        for sample in reference_matching_gradients(x_0.tolist(), real.tolist(), online.tolist(), eps)
        for g in sample
    ]
    assert loss.item() == pytest.approx(0.5 * weight * mean(squares), rel=1e-9)
    assert metrics["gradient_norm"].item() == pytest.approx(math.sqrt(mean(squares)), rel=1e-9)


@given(seeds, shapes, st.floats(0.1, 3))
def test_the_gradient_is_the_matching_gradient(seed: int, shape: tuple[int, ...], weight: float) -> None:
    x_0, real, online = draw(seed, shape)
    distribution_matching_loss(x_0, real, online, weight=weight).loss.backward()
    gradients = reference_matching_gradients(x_0.tolist(), real.tolist(), online.tolist(), 1e-5)
    expected = [weight * g / x_0.numel() for sample in gradients for g in sample]
    assert flatten(x_0.grad.tolist()) == pytest.approx(expected, rel=1e-9, abs=1e-12)


@given(seeds, shapes)
def test_the_gradient_is_that_of_a_distance_to_a_fixed_target(seed: int, shape: tuple[int, ...]) -> None:
    x_0, real, online = draw(seed, shape)
    distribution_matching_loss(x_0, real, online).loss.backward()
    values = flatten(x_0.tolist())
    gradients = reference_matching_gradients(x_0.tolist(), real.tolist(), online.tolist(), 1e-5)
    target = [value - g for value, g in zip(values, flatten(gradients), strict=True)]

    def distance(moved: list[float]) -> float:
        return 0.5 * mean([(a - b) ** 2 for a, b in zip(moved, target, strict=True)])

    assert flatten(x_0.grad.tolist()) == pytest.approx(central_differences(distance, values), rel=1e-6, abs=1e-8)


def test_a_step_moves_samples_from_the_online_models_view_to_the_teachers() -> None:
    x_0, real, online = draw(0, (2, 3))
    distribution_matching_loss(x_0, real, online).loss.backward()
    moved = -x_0.grad
    torch.testing.assert_close(moved.sign(), (real - online).sign())


@given(seeds, st.floats(0.01, 100))
def test_each_sample_is_normalised_by_itself(seed: int, scale: float) -> None:
    # Making one sample's three tensors larger changes neither its own gradient nor the other's.
    x_0, real, online = draw(seed, (2, 3, 2))
    factors = torch.tensor([scale, 1.0], dtype=torch.float64).view(2, 1, 1)
    scaled = (factors * x_0.detach()).requires_grad_()
    distribution_matching_loss(x_0, real, online).loss.backward()
    distribution_matching_loss(scaled, factors * real, factors * online).loss.backward()
    torch.testing.assert_close(scaled.grad, x_0.grad)


@given(seeds, st.permutations(range(4)))
def test_the_order_of_samples_does_not_matter(seed: int, order: list[int]) -> None:
    x_0, real, online = draw(seed, (4, 3))
    loss = distribution_matching_loss(x_0, real, online).loss
    permuted = distribution_matching_loss(x_0[order], real[order], online[order]).loss
    torch.testing.assert_close(permuted, loss)
    torch.testing.assert_close(torch.autograd.grad(permuted, x_0), torch.autograd.grad(loss, x_0))


def test_where_both_models_agree_there_is_nothing_to_do() -> None:
    x_0, real, _ = draw(0, (2, 3))
    loss = distribution_matching_loss(x_0, real, real).loss
    loss.backward()
    assert loss.item() == 0
    assert not x_0.grad.any()


def test_eps_bounds_the_gradient_where_a_sample_equals_the_teachers_prediction() -> None:
    x_0 = torch.ones(1, 4, dtype=torch.float64, requires_grad=True)
    output = distribution_matching_loss(x_0, x_0.detach(), x_0.detach() + 1e-3, eps=1e-2)
    assert output.metrics["gradient_norm"].item() == pytest.approx(0.1)


def test_no_gradient_reaches_the_two_models() -> None:
    x_0, real, online = (tensor.detach().requires_grad_() for tensor in draw(0, (2, 3)))
    output = distribution_matching_loss(x_0, real, online)
    output.loss.backward()
    assert x_0.grad is not None
    assert real.grad is None
    assert online.grad is None
    assert not output.metrics["gradient_norm"].requires_grad


def test_the_module_passes_every_option_on() -> None:
    x_0, real, online = draw(0, (2, 3))
    expected = distribution_matching_loss(x_0, real, online, weight=3.0, eps=5.0)
    assert DistributionMatchingLoss(weight=3.0, eps=5.0)(x_0, real, online).loss == expected.loss
    assert DistributionMatchingLoss()(x_0, real, online).loss != expected.loss


# --- Numbers that are not finite


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@given(which=st.integers(0, 2), where=st.integers(0, 5))
def test_a_bad_number_shows_in_the_loss(bad: float, which: int, where: int) -> None:
    tensors = [tensor.detach() for tensor in draw(0, (2, 3))]
    tensors[which].view(-1)[where] = bad
    assert not distribution_matching_loss(*tensors).loss.isfinite()


# --- Gradients


def test_samples_without_gradient_are_refused_in_training_only() -> None:
    x_0, real, online = draw(0, (2, 3))
    matching = DistributionMatchingLoss()
    with pytest.raises(ValueError, match=r"x_0 has no gradient, so its term could change nothing.*eval\(\)"):
        matching(x_0.detach(), real, online)
    with torch.no_grad():
        expected = matching(x_0.detach(), real, online).loss
    assert matching.eval()(x_0.detach(), real, online).loss == expected


# --- Wrong input

x = torch.zeros(2, 3, 4)

WRONG = {
    "real of another shape": (x, x[:1], x, ValueError, "x_0 and real_x_0 must have the same shape"),
    "online of another shape": (x, x, x[:, :2], ValueError, "x_0 and online_x_0 must have the same shape"),
    "integer samples": (x.int(), x, x, TypeError, r"x_0\.float\(\)"),
    "integer real": (x, x.int(), x, TypeError, r"real_x_0\.float\(\)"),
    "a list": (x, x, x.tolist(), TypeError, "online_x_0 must be a torch.Tensor, got list"),
    "no sample dimension": (x[0, 0], x[0, 0], x[0, 0], ValueError, "batch dimension and at least one more"),
    "an empty batch": (x[:0], x[:0], x[:0], ValueError, "must not be empty"),
    "another device": (x, x, x.to("meta"), ValueError, r"x_0 is on cpu and online_x_0 on meta.*\.to\(device\)"),
}


@pytest.mark.parametrize(("x_0", "real", "online", "error", "message"), WRONG.values(), ids=WRONG)
def test_wrong_input_is_refused_before_anything_happens(
    x_0: Tensor, real: Tensor, online: Any, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message), NoArithmetic():
        DistributionMatchingLoss()(x_0, real, online)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"weight": -1.0}, "weight must be a finite number at least 0"),
        ({"weight": math.inf}, "weight must be a finite number at least 0"),
        ({"weight": math.nan}, "weight must be a finite number at least 0"),
        ({"eps": 0.0}, "eps must be a finite number above 0"),
        ({"eps": math.inf}, "eps must be a finite number above 0"),
        ({"eps": math.nan}, "eps must be a finite number above 0"),
    ],
)
def test_wrong_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DistributionMatchingLoss(**options)
    with pytest.raises(ValueError, match=message):
        distribution_matching_loss(x, x, x, **options)


def test_repr_names_the_options() -> None:
    assert "weight=1.0, eps=1e-05" in repr(DistributionMatchingLoss())
