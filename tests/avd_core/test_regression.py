import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from avd_core import PAPER_SPREAD, AdaptiveRegressionLoss, LossMeanCache, adaptive_regression_loss
from loss_cases import GRID
from references import (
    ReferenceCache,
    central_differences,
    flatten,
    mean,
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


# --- Deviations in units of the spread


@given(seeds, shapes, st.floats(0, 4), st.floats(0.01, 10), st.integers(0, 2))
def test_the_function_with_spreads_and_judged_values_is_the_reference(
    seed: int, shape: tuple[int, ...], sharpness: float, spread: float, unknown: int
) -> None:
    prediction, target = randn(seed, *shape), randn(seed + 1, *shape)
    means, judged = randn(seed + 2, shape[0]), randn(seed + 3, shape[0])
    spreads = spread * (1 + randn(seed + 4, shape[0]).abs())
    spreads[unknown:] *= 0
    loss, metrics = adaptive_regression_loss(
        prediction, target, means, sharpness=sharpness, spreads=spreads, judged=judged
    )
    losses = reference_sample_losses(prediction.tolist(), target.tolist())
    weights = reference_weights(judged.tolist(), means.tolist(), sharpness, 2.0, spreads.tolist())
    assert metrics["weights"].tolist() == pytest.approx(weights, rel=1e-10)
    assert metrics["sample_losses"].tolist() == pytest.approx(losses, rel=1e-10)
    assert metrics["judged"].tolist() == judged.tolist()
    assert loss.item() == pytest.approx(mean([w * own for w, own in zip(weights, losses, strict=True)]), rel=1e-10)
    # Eq. 7 of the deviations that are reported.
    assert metrics["weights"].tolist() == pytest.approx(
        reference_weights(metrics["deviations"].tolist(), [0.0] * shape[0], sharpness, 2.0), rel=1e-10
    )


@given(seeds, st.lists(st.lists(st.sampled_from(GRID), min_size=1, max_size=4), min_size=1, max_size=5))
def test_standardised_over_several_steps_is_the_reference(seed: int, batches: list[list[int]]) -> None:
    regression = AdaptiveRegressionLoss(LossMeanCache(GRID, decay=0.8), deviation="standardized")
    reference = ReferenceCache(0.8)
    for step, timesteps in enumerate(batches):
        prediction, target = (randn(seed + 2 * step + i, len(timesteps), 2, 3) for i in range(2))
        metrics = regression(prediction.requires_grad_(), target, torch.tensor(timesteps)).metrics
        losses = reference_sample_losses(prediction.tolist(), target.tolist())
        means = [reference.read(*sample) for sample in zip(timesteps, losses, strict=True)]
        spreads = [reference.spread(timestep) for timestep in timesteps]
        assert metrics["weights"].tolist() == pytest.approx(
            reference_weights(losses, means, 3.0, 2.0, spreads), rel=1e-3, abs=1e-5
        )
        reference.iterate(zip(timesteps, losses, strict=True))


@given(seeds, st.floats(0, 4))
def test_where_the_spread_is_the_papers_the_curve_is_the_papers(seed: int, sharpness: float) -> None:
    prediction, target, means = randn(seed, 5, 3), randn(seed + 1, 5, 3), randn(seed + 2, 5)
    paper = adaptive_regression_loss(prediction, target, means, sharpness=sharpness)
    spreads = torch.full((5,), PAPER_SPREAD, dtype=torch.float64)
    standardized = adaptive_regression_loss(prediction, target, means, sharpness=sharpness, spreads=spreads)
    torch.testing.assert_close(standardized.loss, paper.loss)
    torch.testing.assert_close(standardized.metrics["weights"], paper.metrics["weights"])


def weights_of_a_run(scale: float, **options: Any) -> Tensor:
    """Weights of ten steps whose errors are multiplied by ``scale``."""
    regression = AdaptiveRegressionLoss(LossMeanCache(GRID), **options)
    weights = []
    for step in range(10):
        prediction = (scale * randn(step, 3, 8)).requires_grad_()
        output = regression(prediction, torch.zeros(3, 8, dtype=torch.float64), torch.tensor([1000, 900, 1000]))
        weights.append(output.metrics["weights"])
    return torch.stack(weights)


@given(st.floats(0.02, 50))
def test_standardised_weights_do_not_depend_on_the_scale_of_losses(scale: float) -> None:
    expected = weights_of_a_run(1.0, deviation="standardized")
    torch.testing.assert_close(weights_of_a_run(scale, deviation="standardized"), expected, rtol=1e-4, atol=1e-4)
    assert expected[1:].std() > 0.1


def test_the_papers_weights_depend_on_it() -> None:
    assert weights_of_a_run(0.05)[1:].std() < 0.01  # a constant
    assert ((weights_of_a_run(10.0)[1:] / 2 - 0.5).abs() > 0.49).double().mean() > 0.9  # a switch


@given(st.floats(-8, 8), st.floats(1e-3, 8), st.floats(0.1, 4), st.floats(0.3, 5))
def test_a_standardised_weight_falls_strictly_and_stays_within_its_range(
    deviation: float, more: float, sharpness: float, spread: float
) -> None:
    judged = torch.tensor([deviation, deviation + more], dtype=torch.float64)
    zeros, spreads = torch.zeros(2, dtype=torch.float64), torch.full((2,), spread, dtype=torch.float64)
    x = zeros.unsqueeze(1)
    output = adaptive_regression_loss(x, x, zeros, sharpness=sharpness, spreads=spreads, judged=judged)
    less, least = output.metrics["weights"].tolist()
    assert 2 > less > least > 0


@pytest.mark.parametrize("judged", ["loss", "relative", "excess"])
def test_a_standardised_weight_is_one_half_while_the_spread_is_unknown(judged: str) -> None:
    regression = AdaptiveRegressionLoss(LossMeanCache(GRID), deviation="standardized", judged=judged)
    for _ in range(3):  # of a loss that is always the same, there is no spread to know
        metrics = regression(ones(1, 4), 2 * ones(1, 4), torch.tensor([900]), **judged_by(judged, ones(1, 4))).metrics
        assert (metrics["weights"].item(), metrics["deviations"].item()) == (1.0, 0.0)


# --- What is judged


def ones(*shape: int) -> Tensor:
    return torch.ones(shape, dtype=torch.float64).requires_grad_()


def judged_by(judged: str, tensor: Tensor) -> dict[str, Tensor]:
    """The argument that an option needs."""
    return {"relative": {"clips": tensor}, "excess": {"teacher_prediction": tensor}}.get(judged, {})


@pytest.mark.parametrize("deviation", ["absolute", "standardized"])
@pytest.mark.parametrize("judged", ["relative", "excess"])
@given(seeds, st.lists(st.lists(st.sampled_from(GRID), min_size=1, max_size=4), min_size=1, max_size=4))
def test_each_judgement_over_several_steps_is_the_reference(
    deviation: str, judged: str, seed: int, batches: list[list[int]]
) -> None:
    regression = AdaptiveRegressionLoss(LossMeanCache(GRID, decay=0.8), deviation=deviation, judged=judged)
    reference = ReferenceCache(0.8)
    for step, timesteps in enumerate(batches):
        prediction, target, other = (randn(seed + 3 * step + i, len(timesteps), 2, 3) for i in range(3))
        loss, metrics = regression(
            prediction.requires_grad_(), target, torch.tensor(timesteps), **judged_by(judged, other)
        )
        p, y, o = prediction.tolist(), target.tolist(), other.tolist()
        losses = reference_sample_losses(p, y)
        if judged == "relative":
            values = [own / mean([c * c for c in flatten(clip)]) for own, clip in zip(losses, o, strict=True)]
        else:
            values = [own - teachers for own, teachers in zip(losses, reference_sample_losses(o, y), strict=True)]
        means = [reference.read(*sample) for sample in zip(timesteps, values, strict=True)]
        spreads = [reference.spread(t) for t in timesteps] if deviation == "standardized" else None
        weights = reference_weights(values, means, 3.0, 2.0, spreads)
        assert metrics["judged"].tolist() == pytest.approx(values, rel=1e-6, abs=1e-9)
        assert metrics["means"].tolist() == pytest.approx(means, rel=1e-4, abs=1e-4)
        assert metrics["weights"].tolist() == pytest.approx(weights, rel=1e-2, abs=1e-3)
        # What is regressed stays the loss.
        weighted = [w * own for w, own in zip(metrics["weights"].tolist(), losses, strict=True)]
        assert loss.item() == pytest.approx(mean(weighted), rel=1e-6)
        reference.iterate(zip(timesteps, values, strict=True))


@given(seeds, st.floats(0.2, 30))
def test_relative_does_not_see_the_contrast_of_a_clip(seed: int, scale: float) -> None:
    clips, errors = randn(seed, 3, 2, 4), randn(seed + 1, 3, 2, 4)
    weights = []
    for factor in (torch.ones(3, 1, 1), torch.tensor([scale, 1.0, 1 / scale]).view(3, 1, 1)):
        regression = AdaptiveRegressionLoss(LossMeanCache(GRID), judged="relative")
        for part in (0.5, 1.0):
            prediction = (part * factor * errors).requires_grad_()
            metrics = regression(
                prediction, torch.zeros_like(errors), torch.tensor([900, 900, 522]), clips=factor * clips
            ).metrics
        weights.append(metrics["weights"])
    torch.testing.assert_close(weights[1], weights[0], rtol=1e-4, atol=1e-6)
    assert weights[0].std() > 0


def test_a_clip_of_no_energy_at_all_is_judged_by_a_finite_number() -> None:
    regression = AdaptiveRegressionLoss(LossMeanCache(GRID), deviation="standardized", judged="relative")
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        prediction = torch.ones(2, 3, dtype=dtype).requires_grad_()
        clips = torch.zeros(2, 3, 5, dtype=dtype)
        output = regression(prediction, torch.zeros_like(prediction), torch.tensor([1000, 522]), clips=clips)
        assert output.loss.isfinite()
        assert output.metrics["judged"].tolist() == pytest.approx([1000, 1000])


@given(seeds, st.sampled_from(["absolute", "standardized"]))
def test_a_student_that_is_its_teacher_has_no_excess(seed: int, deviation: str) -> None:
    regression = AdaptiveRegressionLoss(LossMeanCache(GRID), deviation=deviation, judged="excess")
    for step in range(3):
        prediction, target = randn(seed + step, 3, 4).requires_grad_(), 5 * randn(seed + step + 9, 3, 4)
        metrics = regression(prediction, target, torch.tensor([1000, 1000, 522]), teacher_prediction=prediction).metrics
        assert metrics["judged"].tolist() == [0.0] * 3
        assert metrics["weights"].tolist() == [1.0] * 3
    assert regression.cache.means.tolist() == [0.0] * 4


@given(seeds)
def test_an_excess_of_rounding_has_no_spread(seed: int) -> None:
    regression = AdaptiveRegressionLoss(LossMeanCache(GRID), deviation="standardized", judged="excess")
    prediction, target = randn(seed, 3, 64).float().requires_grad_(), randn(seed + 1, 3, 64).float()
    for step in range(4):
        teacher = prediction.detach() * (1 + 2e-7 * randn(seed + step, 3, 64).float().sign())
        metrics = regression(prediction, target, torch.full((3,), 900), teacher_prediction=teacher).metrics
        assert metrics["weights"].tolist() == [1.0] * 3
    assert regression.cache.spreads[1] > 0  # the cache alone would take it for a spread


def test_a_student_that_misses_more_than_its_teacher_gets_less_weight() -> None:
    target, teacher = randn(0, 2, 64), randn(0, 2, 64)
    teacher[0] += 3  # this clip is hard for both, and the student no worse on it
    prediction = teacher.clone()
    prediction[1] += 1
    regression = AdaptiveRegressionLoss(LossMeanCache(GRID), judged="excess")
    regression.cache(torch.tensor([900]), torch.zeros(1))
    weights = regression(prediction.requires_grad_(), target, torch.tensor([900, 900]), teacher_prediction=teacher)
    hard, misfit = weights.metrics["weights"].tolist()
    assert hard == 1.0
    assert misfit < 0.2


@pytest.mark.parametrize("judged", ["relative", "excess"])
def test_no_gradient_passes_through_what_is_judged(judged: str) -> None:
    prediction, target, other = (randn(seed, 2, 3).requires_grad_() for seed in range(3))
    regression = AdaptiveRegressionLoss(LossMeanCache(GRID), deviation="standardized", judged=judged)
    for _ in range(3):
        output = regression(prediction, target, torch.tensor([900, 522]), **judged_by(judged, other))
    weights, (gradient,) = output.metrics["weights"], torch.autograd.grad(output.loss, prediction, retain_graph=True)
    torch.testing.assert_close(gradient, weights.view(2, 1) * (prediction - target).detach() / 3)
    assert torch.autograd.grad(output.loss, other, allow_unused=True) == (None,)
    assert not any(value.requires_grad for value in output.metrics.values())


def test_metrics_that_say_nothing_new_are_left_out() -> None:
    def names(**options: Any) -> set[str]:
        regression = AdaptiveRegressionLoss(LossMeanCache(GRID), **options)
        extra = judged_by(options.get("judged", "loss"), ones(1, 4))
        return set(regression(ones(1, 4), ones(1, 4), torch.tensor([900]), **extra).metrics)

    paper = {"weights", "sample_losses", "means"}
    assert names() == paper
    assert names(deviation="standardized") == {*paper, "deviations"}
    assert names(judged="excess") == {*paper, "judged"}
    assert names(deviation="standardized", judged="relative") == {*paper, "judged", "deviations"}


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


WRONG_JUDGED_BY = {
    "no clips": ("relative", {}, ValueError, r"judged='relative' needs clips: .*clips=\.\.\., or set judged='loss'"),
    "no teacher": ("excess", {}, ValueError, r"needs teacher_prediction: the teacher's.*or set judged='loss'"),
    "clips unused": ("loss", {"clips": x}, ValueError, r"'loss' does not look at clips\. Leave .*judged='relative'"),
    "teacher unused": (
        "loss",
        {"teacher_prediction": x},
        ValueError,
        "'loss' does not look at teacher_prediction.*judged='excess'",
    ),
    "the other one": ("relative", {"clips": x, "teacher_prediction": x}, ValueError, "'relative' does not look at"),
    "other clips": ("relative", {"clips": x[:1]}, ValueError, r"clips must be \[2, \.\.\.\], one per sample, got"),
    "empty clips": ("relative", {"clips": x[:, :0]}, ValueError, "clips must not be empty"),
    "integer clips": ("relative", {"clips": x.int()}, TypeError, r"clips\.float\(\)"),
    "clips elsewhere": ("relative", {"clips": x.to("meta")}, ValueError, "clips is on meta"),
    "another shape": ("excess", {"teacher_prediction": x[:, :2]}, ValueError, "teacher_prediction and prediction must"),
    "teacher elsewhere": ("excess", {"teacher_prediction": x.to("meta")}, ValueError, "teacher_prediction is on meta"),
}


@pytest.mark.parametrize(("judged", "wrong", "error", "message"), WRONG_JUDGED_BY.values(), ids=WRONG_JUDGED_BY)
def test_what_judged_needs_is_asked_for_and_nothing_else(
    judged: str, wrong: dict[str, Tensor], error: type[Exception], message: str
) -> None:
    regression = AdaptiveRegressionLoss(LossMeanCache(GRID), judged=judged)
    before = state_of(regression)
    with pytest.raises(error, match=message), NoArithmetic():
        regression(x, x, t, **wrong)
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
    for name in ("means", "spreads", "judged"):
        arguments = {"means": means, name: wrong_means}
        with pytest.raises(error, match=message.replace("means", name)), NoArithmetic():
            adaptive_regression_loss(x, x, **arguments)


@pytest.mark.parametrize("name", ["sharpness", "weight"])
@pytest.mark.parametrize("value", [-1.0, math.nan, math.inf])
def test_wrong_options_are_refused(name: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"{name} must be a finite number at least 0, got {value}"):
        AdaptiveRegressionLoss(LossMeanCache(GRID), **{name: value})
    with pytest.raises(ValueError, match=f"{name} must be a finite number at least 0, got {value}"):
        adaptive_regression_loss(x, x, means, **{name: value})


@pytest.mark.parametrize(("name", "choices"), [("deviation", "absolute, standardized"), ("judged", "loss, relative")])
def test_unknown_choices_are_refused(name: str, choices: str) -> None:
    with pytest.raises(ValueError, match=f"{name} must be one of {choices}.*, got 'squared'"):
        AdaptiveRegressionLoss(LossMeanCache(GRID), **{name: "squared"})


def test_the_cache_must_be_a_cache() -> None:
    with pytest.raises(TypeError, match="cache must be a LossMeanCache, got tuple"):
        AdaptiveRegressionLoss(GRID)


def test_repr_names_the_options() -> None:
    assert "weight=2.0, sharpness=3.0, deviation='absolute', judged='loss'" in repr(
        AdaptiveRegressionLoss(LossMeanCache(GRID))
    )
