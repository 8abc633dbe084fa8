import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from avd_core import ConditionalScoreDistillationLoss, conditional_score_distillation_loss
from references import central_differences, flatten, mean
from tensors import randn
from watchers import NoArithmetic

seeds = st.integers(0, 2**32 - 1)
shapes = st.tuples(*[st.integers(1, 3)] * 5)


def draw(seed: int, shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Samples with gradient, and the teacher's predictions of them."""
    return randn(seed, *shape).requires_grad_(), randn(seed + 1, *shape)


def reference(x_0: list[Any], real: list[Any]) -> float:
    return mean([(a - b) ** 2 for a, b in zip(flatten(x_0), flatten(real), strict=True)])


@given(seeds, shapes, st.floats(0, 20))
def test_loss_metric_and_gradient_are_the_references(seed: int, shape: tuple[int, ...], weight: float) -> None:
    x_0, real = draw(seed, shape)
    loss, metrics = conditional_score_distillation_loss(x_0, real, weight=weight)
    loss.backward()
    assert loss.item() == pytest.approx(weight * reference(x_0.tolist(), real.tolist()), rel=1e-9)
    assert metrics["distance"].item() == pytest.approx(math.sqrt(reference(x_0.tolist(), real.tolist())), rel=1e-9)
    numbers = flatten(x_0.tolist())
    expected = central_differences(lambda moved: weight * reference(moved, real.tolist()), numbers)
    assert flatten(x_0.grad.tolist()) == pytest.approx(expected, rel=1e-6, abs=1e-7)


def test_a_step_moves_samples_to_the_teachers_prediction_and_no_further() -> None:
    x_0, real = draw(0, (2, 3))
    conditional_score_distillation_loss(x_0, real, weight=1.0).loss.backward()
    torch.testing.assert_close(x_0 - 0.5 * x_0.numel() * x_0.grad, real)
    assert conditional_score_distillation_loss(real, real).loss == 0


@given(seeds, st.permutations(range(4)), st.floats(-5, 5))
def test_order_of_samples_and_offset_do_not_matter(seed: int, order: list[int], offset: float) -> None:
    x_0, real = draw(seed, (4, 3))
    loss = conditional_score_distillation_loss(x_0, real).loss
    moved = conditional_score_distillation_loss(x_0[order] + offset, real[order] + offset).loss
    torch.testing.assert_close(moved, loss)


def test_no_gradient_reaches_the_teacher() -> None:
    x_0, real = (tensor.detach().requires_grad_() for tensor in draw(0, (2, 3)))
    output = conditional_score_distillation_loss(x_0, real)
    output.loss.backward()
    assert x_0.grad is not None
    assert real.grad is None
    assert not output.metrics["distance"].requires_grad


def test_the_module_passes_its_weight_on_and_the_default_is_the_papers() -> None:
    x_0, real = draw(0, (2, 3))
    assert ConditionalScoreDistillationLoss(weight=3.0)(x_0, real) == conditional_score_distillation_loss(
        x_0, real, weight=3.0
    )
    torch.testing.assert_close(
        ConditionalScoreDistillationLoss()(x_0, real).loss, 10 * torch.nn.functional.mse_loss(x_0, real)
    )
    assert "weight=3.0" in repr(ConditionalScoreDistillationLoss(weight=3.0))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@given(which=st.integers(0, 1), where=st.integers(0, 5))
def test_a_bad_number_shows_in_the_loss(bad: float, which: int, where: int) -> None:
    tensors = [tensor.detach() for tensor in draw(0, (2, 3))]
    tensors[which].view(-1)[where] = bad
    assert not conditional_score_distillation_loss(*tensors).loss.isfinite()


def test_samples_without_gradient_are_refused_in_training_only() -> None:
    x_0, real = draw(0, (2, 3))
    distillation = ConditionalScoreDistillationLoss()
    with pytest.raises(ValueError, match=r"x_0 has no gradient, so its term could change nothing.*eval\(\)"):
        distillation(x_0.detach(), real)
    assert distillation.eval()(x_0.detach(), real).loss == distillation(x_0, real).loss


x = torch.zeros(2, 3, 4)

WRONG = {
    "real of another shape": (x, x[:1], ValueError, "x_0 and real_x_0 must have the same shape"),
    "integer samples": (x.int(), x, TypeError, r"x_0\.float\(\)"),
    "a list": (x, x.tolist(), TypeError, "real_x_0 must be a torch.Tensor, got list"),
    "no sample dimension": (x[0, 0], x[0, 0], ValueError, "batch dimension and at least one more"),
    "an empty batch": (x[:0], x[:0], ValueError, "must not be empty"),
    "another device": (x, x.to("meta"), ValueError, r"x_0 is on cpu and real_x_0 on meta.*\.to\(device\)"),
}


@pytest.mark.parametrize(("x_0", "real", "error", "message"), WRONG.values(), ids=WRONG)
def test_wrong_input_is_refused_before_anything_happens(
    x_0: Tensor, real: Any, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message), NoArithmetic():
        ConditionalScoreDistillationLoss()(x_0, real)


@pytest.mark.parametrize("weight", [-1.0, math.inf, math.nan])
def test_wrong_weights_are_refused(weight: float) -> None:
    for refused in (
        lambda: ConditionalScoreDistillationLoss(weight=weight),
        lambda: conditional_score_distillation_loss(x, x, weight=weight),
    ):
        with pytest.raises(ValueError, match="weight must be a finite number at least 0"):
            refused()
