import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from avd_core import AdaptiveRegressionLoss, LossMeanCache, adaptive_regression_loss
from loss_cases import GRID
from references import (
    ReferenceCache,
    central_differences,
    flatten,
    reference_regression,
    reference_sample_losses,
    reference_weights,
)
from tensors import assert_same_state, cut, randn, state_of
from watchers import NoArithmetic

seeds = st.integers(0, 2**32 - 1)
shapes = st.tuples(*[st.integers(1, 3)] * 5)


def weight_at(deviation: float, *, loss: float = 9.0, sharpness: float = 3.0, weight: float = 2.0) -> float:
    """The weight of one sample whose loss lies ``deviation`` above its mean."""
    prediction = torch.tensor([[math.sqrt(loss)]], dtype=torch.float64)
    means = torch.tensor([loss - deviation], dtype=torch.float64)
    output = adaptive_regression_loss(
        prediction, torch.zeros_like(prediction), means, weight=weight, sharpness=sharpness
    )
    return output.metrics["weights"].item()


# --- Eq. 7


@given(seeds, shapes, st.floats(0, 4), st.floats(0, 5))
def test_the_function_is_the_reference(seed: int, shape: tuple[int, ...], sharpness: float, weight: float) -> None:
    prediction, target, means = randn(seed, *shape), randn(seed + 1, *shape), randn(seed + 2, shape[0]).abs()
    loss, metrics = adaptive_regression_loss(prediction, target, means, weight=weight, sharpness=sharpness)
    p, y, m = prediction.tolist(), target.tolist(), means.tolist()
    losses = reference_sample_losses(p, y)
    assert loss.item() == pytest.approx(reference_regression(p, y, m, sharpness, weight), rel=1e-10)
    assert metrics["sample_losses"].tolist() == pytest.approx(losses, rel=1e-10)
    assert metrics["weights"].tolist() == pytest.approx(reference_weights(losses, m, sharpness, weight), rel=1e-10)
    assert metrics["means"].tolist() == m


@given(seeds, st.lists(st.lists(st.sampled_from(GRID), min_size=1, max_size=4), min_size=1, max_size=5))
def test_the_module_over_several_steps_is_the_reference(seed: int, batches: list[list[int]]) -> None:
    regression = AdaptiveRegressionLoss(LossMeanCache(GRID, decay=0.8), weight=2.0, sharpness=3.0)
    reference = ReferenceCache(0.8)
    for step, timesteps in enumerate(batches):
        prediction, target = (randn(seed + 2 * step + i, len(timesteps), 2, 3) for i in range(2))
        loss, metrics = regression(prediction.requires_grad_(), target, torch.tensor(timesteps))
        p, y = prediction.tolist(), target.tolist()
        losses = reference_sample_losses(p, y)
        means = [reference.read(*sample) for sample in zip(timesteps, losses, strict=True)]
        assert metrics["means"].tolist() == pytest.approx(means, rel=1e-5)
        assert loss.item() == pytest.approx(reference_regression(p, y, means), rel=1e-5)
        # What is recorded is the loss without its weight.
        reference.iterate(zip(timesteps, losses, strict=True))


@given(st.floats(-8, 8), st.floats(0.01, 4), st.floats(0.01, 10))
def test_a_weight_lies_between_zero_and_the_maximum(deviation: float, sharpness: float, weight: float) -> None:
    assert 0 < weight_at(deviation, sharpness=sharpness, weight=weight) < weight


@given(st.floats(-8, 8), st.floats(1e-3, 8), st.floats(0.1, 4))
def test_a_weight_falls_strictly_in_the_deviation(deviation: float, more: float, sharpness: float) -> None:
    assert weight_at(deviation, sharpness=sharpness) > weight_at(deviation + more, sharpness=sharpness)


@given(st.floats(0, 4), st.floats(0, 10))
def test_a_sample_of_average_loss_has_half_the_weight(sharpness: float, weight: float) -> None:
    # So the paper's w_reg = 2 means: weight 1 on average.
    assert weight_at(0.0, sharpness=sharpness, weight=weight) == weight / 2


def test_sharpness_zero_is_plain_regression_at_half_the_weight() -> None:
    prediction, target = randn(0, 3, 4), randn(1, 3, 4)
    loss = adaptive_regression_loss(prediction, target, torch.tensor([0.0, 5.0, 100.0]), sharpness=0.0, weight=2.0).loss
    torch.testing.assert_close(loss, (prediction - target).square().mean())


def test_the_released_codes_order_acts_like_a_smaller_sharpness() -> None:
    prediction, target, timesteps = randn(0, 1, 4).requires_grad_(), randn(1, 1, 4), torch.tensor([900])
    weights = {}
    for order, sharpness in (("update_first", 3.0), ("weight_first", 2.85)):
        regression = AdaptiveRegressionLoss(LossMeanCache(GRID, decay=0.95, order=order), sharpness=sharpness)
        regression(prediction, target, timesteps)
        weights[order] = regression(2 * prediction, target, timesteps).metrics["weights"]
    torch.testing.assert_close(weights["update_first"], weights["weight_first"], rtol=1e-5, atol=0)


# --- Gradient


@given(seeds, shapes)
def test_no_gradient_passes_through_the_weight(seed: int, shape: tuple[int, ...]) -> None:
    prediction, target, means = randn(seed, *shape).requires_grad_(), randn(seed + 1, *shape), randn(seed + 2, shape[0])
    loss, metrics = adaptive_regression_loss(prediction, target, means)
    loss.backward()
    frozen, y = metrics["weights"].tolist(), target.tolist()

    def with_frozen_weights(values: list[float]) -> float:
        size = len(values) // shape[0]
        losses = reference_sample_losses([values[i : i + size] for i in range(0, len(values), size)], y)
        return sum(w * loss for w, loss in zip(frozen, losses, strict=True)) / len(losses)

    expected = central_differences(with_frozen_weights, flatten(prediction.tolist()))
    assert flatten(prediction.grad.tolist()) == pytest.approx(expected, rel=1e-6, abs=1e-8)


def test_gradcheck() -> None:
    # With sharpness 0 the weights are constant, so finite differences see what the gradient is meant to be.
    target, means = randn(1, 2, 3, 2), randn(2, 2)
    prediction = randn(0, 2, 3, 2).requires_grad_()
    assert torch.autograd.gradcheck(
        lambda p: adaptive_regression_loss(p, target, means, sharpness=0.0).loss, (prediction,)
    )


def test_metrics_are_detached() -> None:
    prediction = randn(0, 2, 3).requires_grad_()
    output = AdaptiveRegressionLoss(LossMeanCache(GRID))(prediction, randn(1, 2, 3), torch.tensor([1000, 522]))
    assert output.loss.requires_grad
    assert not any(value.requires_grad for value in output.metrics.values())


# --- Batches


@given(seeds, st.permutations(range(5)))
def test_the_order_of_samples_does_not_matter(seed: int, order: list[int]) -> None:
    prediction, target = randn(seed, 5, 3).requires_grad_(), randn(seed + 1, 5, 3)
    timesteps = torch.tensor([1000, 900, 900, 522, 757])
    outcomes = []
    for indices in (list(range(5)), order):
        regression = AdaptiveRegressionLoss(LossMeanCache(GRID))
        regression(prediction / 2, target, timesteps)
        loss = regression(prediction[indices], target[indices], timesteps[indices]).loss
        outcomes.append((loss, torch.autograd.grad(loss, prediction)[0], regression.cache.means))
    torch.testing.assert_close(outcomes[1], outcomes[0], rtol=1e-5, atol=1e-6)


@given(seeds, st.lists(st.booleans(), min_size=5, max_size=5))
def test_any_split_into_micro_batches_has_the_loss_gradient_and_cache_of_one_batch(seed: int, cuts: list[bool]) -> None:
    timesteps = torch.tensor([1000, 900, 522, 900, 1000, 757])
    whole = AdaptiveRegressionLoss(LossMeanCache(GRID, decay=0.5))
    split = AdaptiveRegressionLoss(LossMeanCache(GRID, decay=0.5, auto_update=False))
    for step in range(3):
        prediction, target = randn(seed + step, 6, 2, 3).requires_grad_(), randn(seed + step + 100, 6, 2, 3)
        loss = whole(prediction, target, timesteps).loss
        gradient = torch.autograd.grad(loss, prediction)[0]
        parts = [
            split(prediction[part], target[part], timesteps[part]).loss * len(part) / 6
            for part in cut(list(range(6)), cuts)
        ]
        split.cache.update()
        torch.testing.assert_close(sum(parts), loss, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(torch.autograd.grad(sum(parts), prediction)[0], gradient, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(split.cache.means, whole.cache.means, rtol=1e-5, atol=1e-6)


def test_evaluation_mode_weighs_with_the_means_and_keeps_them() -> None:
    regression = AdaptiveRegressionLoss(LossMeanCache(GRID))
    prediction, target, timesteps = randn(0, 2, 3).requires_grad_(), randn(1, 2, 3), torch.tensor([1000, 522])
    regression(prediction, target, timesteps)
    before = state_of(regression)
    regression.eval()
    metrics = regression(3 * prediction, target, timesteps).metrics
    assert torch.equal(metrics["means"], before["cache.means"][[0, 3]])
    assert_same_state(state_of(regression), before)


def test_the_state_is_the_caches() -> None:
    assert set(AdaptiveRegressionLoss(LossMeanCache(GRID)).state_dict()) == {
        f"cache.{name}" for name in LossMeanCache(GRID).state_dict()
    }


# --- Numbers that are not finite


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("seen_before", [False, True])
@given(where=st.integers(0, 11), in_target=st.booleans())
def test_a_bad_number_shows_in_the_loss_and_never_enters_a_mean(
    bad: float, seen_before: bool, where: int, in_target: bool
) -> None:
    regression, clean = (AdaptiveRegressionLoss(LossMeanCache(GRID)) for _ in range(2))
    timesteps = torch.tensor([1000, 1000, 522])
    if seen_before:
        for each in (regression, clean):
            each(randn(5, 3, 4).requires_grad_(), randn(6, 3, 4), timesteps)
    prediction, target = randn(7, 3, 4), randn(8, 3, 4)
    (target if in_target else prediction).view(-1)[where] = bad
    prediction.requires_grad_()
    assert not regression(prediction, target, timesteps).loss.isfinite()
    good = [sample for sample in range(3) if sample != where // 4]
    clean(prediction[good], target[good], timesteps[good])
    torch.testing.assert_close(state_of(regression), state_of(clean))


# --- Wrong input

x = torch.zeros(2, 3, 4)
t = torch.tensor([1000, 522])
means = torch.zeros(2)

WRONG_TENSORS = {
    "shapes differ": (x, x[:, :2], ValueError, r"same shape, got \[2, 3, 4\] and \[2, 2, 4\]"),
    "would broadcast": (x, x[:1], ValueError, "same shape"),
    "integer prediction": (x.int(), x, TypeError, r"prediction.*prediction\.float\(\)"),
    "integer target": (x, x.long(), TypeError, r"target.*target\.float\(\)"),
    "a list": (x.tolist(), x, TypeError, "prediction must be a torch.Tensor, got list"),
    "no sample dimension": (x[0, 0], x[0, 0], ValueError, "batch dimension and at least one more"),
    "an empty batch": (x[:0], x[:0], ValueError, "must not be empty"),
    "another device": (x, x.to("meta"), ValueError, r"prediction is on cpu and target on meta.*\.to\(device\)"),
}
WRONG_TIMESTEPS = {
    "a number": (900, TypeError, "torch.Tensor of shape"),
    "zero-dimensional": (torch.tensor(900), ValueError, r"shape \[2\].*timesteps\.expand\(2\)"),
    "too few": (t[:1], ValueError, r"shape \[2\], one per sample, got \[1\]"),
    "a column": (t[:, None], ValueError, r"shape \[2\].*timesteps\.flatten\(\)"),
    "one per frame": (t[:, None].expand(2, 3), ValueError, r"got \[2, 3\]\. Times of single frames.*timesteps\[:, 0\]"),
    "one per frame, for all": (torch.full((1, 3), 900), ValueError, r"got \[1, 3\]\. Times of single frames"),
    "too many": (torch.full((3,), 900), ValueError, r"one per sample, got \[3\]\.$"),
    "another device": (t.to("meta"), ValueError, "timesteps is on meta"),
}


@pytest.mark.parametrize(("prediction", "target", "error", "message"), WRONG_TENSORS.values(), ids=WRONG_TENSORS)
def test_wrong_tensors_are_refused_before_anything_happens(
    prediction: Any, target: Tensor, error: type[Exception], message: str
) -> None:
    regression = AdaptiveRegressionLoss(LossMeanCache(GRID))
    before = state_of(regression)
    timesteps = torch.full((len(prediction),), 900)
    for call in (
        lambda: regression(prediction, target, timesteps),
        lambda: adaptive_regression_loss(prediction, target, means),
    ):
        with pytest.raises(error, match=message), NoArithmetic():
            call()
    assert_same_state(state_of(regression), before)


@pytest.mark.parametrize(("timesteps", "error", "message"), WRONG_TIMESTEPS.values(), ids=WRONG_TIMESTEPS)
def test_wrong_timesteps_are_refused_before_anything_happens(
    timesteps: Any, error: type[Exception], message: str
) -> None:
    regression = AdaptiveRegressionLoss(LossMeanCache(GRID))
    before = state_of(regression)
    with pytest.raises(error, match=message), NoArithmetic():
        regression(x, x, timesteps)
    assert_same_state(state_of(regression), before)


def test_a_cache_on_another_device_is_refused_before_anything_happens() -> None:
    regression = AdaptiveRegressionLoss(LossMeanCache(GRID)).to("meta")
    with pytest.raises(ValueError, match="cache is on meta"), NoArithmetic():
        regression(x, x, t)


def test_a_mistaken_unit_is_refused_and_leaves_the_cache() -> None:
    regression = AdaptiveRegressionLoss(LossMeanCache(GRID))
    with pytest.raises(ValueError, match="outside the cache's grid"):
        regression(x.clone().requires_grad_(), x, t / 1000)
    assert not regression.cache.seen.any()


def test_a_prediction_without_gradient_is_refused_in_training_only() -> None:
    regression = AdaptiveRegressionLoss(LossMeanCache(GRID))
    with (
        pytest.raises(ValueError, match="prediction has no gradient, so its term could change nothing"),
        NoArithmetic(),
    ):
        regression(x, x, t)
    with torch.no_grad():
        regression(x, x, t)
    regression.eval()(x, x, t)


@pytest.mark.parametrize(
    ("wrong_means", "error", "message"),
    [
        (means.int(), TypeError, "means must be a floating"),
        (means[:1], ValueError, r"means must have shape \[2\]"),
        (means[:, None], ValueError, r"means must have shape \[2\]"),
        (means.to("meta"), ValueError, "means is on meta"),
    ],
)
def test_wrong_means_are_refused(wrong_means: Tensor, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message), NoArithmetic():
        adaptive_regression_loss(x, x, wrong_means)


@pytest.mark.parametrize("name", ["sharpness", "weight"])
@pytest.mark.parametrize("value", [-1.0, math.nan, math.inf])
def test_wrong_options_are_refused(name: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"{name} must be a finite number at least 0, got {value}"):
        AdaptiveRegressionLoss(LossMeanCache(GRID), **{name: value})
    with pytest.raises(ValueError, match=f"{name} must be a finite number at least 0, got {value}"):
        adaptive_regression_loss(x, x, means, **{name: value})


def test_the_cache_must_be_a_cache() -> None:
    with pytest.raises(TypeError, match="cache must be a LossMeanCache, got tuple"):
        AdaptiveRegressionLoss(GRID)


def test_repr_names_the_options() -> None:
    assert "weight=2.0, sharpness=3.0" in repr(AdaptiveRegressionLoss(LossMeanCache(GRID)))
