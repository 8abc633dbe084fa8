import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from avd_core import (
    AdaptiveRegressionLoss,
    AVDConfig,
    AVDObjective,
    BalanceConfig,
    LossMeanCache,
    MotionConfig,
    RegressionConfig,
)
from loss_cases import GRID
from references import ReferenceCache, reference_motion, reference_regression, reference_sample_losses
from tensors import assert_same_state, randn, state_of
from watchers import NoArithmetic

seeds = st.integers(0, 2**32 - 1)


@dataclass
class Inputs:
    """The four arguments, in order."""

    x_0: Tensor
    prediction: Tensor
    target: Tensor
    timesteps: Tensor

    def __iter__(self) -> Iterator[Tensor]:
        return (getattr(self, field.name) for field in fields(self))


def draw(seed: int = 0, timesteps: Sequence[int] = (1000, 522, 522)) -> Inputs:
    shape = (len(timesteps), 2, 3, 2, 2)
    return Inputs(
        (0.3 * randn(seed, 2, 2, 3, 2, 2)).requires_grad_(),
        randn(seed + 1, *shape).requires_grad_(),
        randn(seed + 2, *shape),
        torch.tensor(timesteps),
    )


def matching(seed: int = 0) -> dict[str, Tensor]:
    """A matching loss and the output that it was computed from."""
    output = randn(seed + 3, 2, 3).requires_grad_()
    return {"matching_loss": output.square().sum(), "matching_output": output}


# --- Eq. 9


@given(seeds, st.lists(st.lists(st.sampled_from(GRID), min_size=1, max_size=3), min_size=1, max_size=4))
def test_the_default_is_the_papers_objective(seed: int, batches: list[list[int]]) -> None:
    objective, reference = AVDObjective(), ReferenceCache(decay=0.95)
    for step, timesteps in enumerate(batches):
        inputs = draw(seed + 10 * step, timesteps)
        loss, metrics = objective(*inputs)
        p, y = inputs.prediction.tolist(), inputs.target.tolist()
        losses = reference_sample_losses(p, y)
        means = [reference.read(*sample) for sample in zip(timesteps, losses, strict=True)]
        reference.iterate(zip(timesteps, losses, strict=True))
        regression = reference_regression(p, y, means, sharpness=3.0, weight=2.0)
        motion = reference_motion(inputs.x_0.tolist(), floor=0.6, eps=1e-6, weight=0.05)
        assert loss.item() == pytest.approx(regression + motion, rel=1e-5)
        assert metrics["regression/loss"].item() == pytest.approx(regression, rel=1e-5)
        assert metrics["motion/loss"].item() == pytest.approx(motion, rel=1e-9)


def test_every_option_of_the_configuration_arrives() -> None:
    config = AVDConfig(
        timesteps=(8, 4),
        regression=RegressionConfig(
            weight=1.5,
            sharpness=0.5,
            deviation="standardized",
            judged="excess",
            decay=0.25,
            order="update_first",
            sync_ranks=False,
        ),
        motion=MotionConfig(weight=0.7, floor=-3.0, eps=0.1, frame_dim=1, channels=3, sync_ranks=False),
        gradient_ratio=0.4,
        balance=BalanceConfig(decay=0.3, sync_ranks=False),
    )
    objective = AVDObjective(config)
    regression, motion, cache = objective.regression, objective.motion, objective.regression.cache
    assert objective.config is config
    assert (regression.weight, regression.sharpness) == (1.5, 0.5)
    assert (regression.deviation, regression.judged) == ("standardized", "excess")
    assert (cache.timesteps.tolist(), cache.decay, cache.order) == ([8, 4], 0.25, "update_first")
    assert (motion.weight, motion.floor, motion.eps, motion.frame_dim, motion.channels) == (0.7, -3.0, 0.1, 1, 3)
    assert (objective.balance.target, objective.balance.decay) == (0.4, 0.3)
    assert [part.sync_ranks for part in (cache, motion, objective.balance)] == [False] * 3
    assert AVDObjective(AVDConfig(regression=RegressionConfig(auto_update=False))).regression.cache.auto_update is False


@pytest.mark.parametrize("part", ["regression", "motion"])
def test_a_part_can_be_left_out(part: str) -> None:
    inputs = draw()
    whole = AVDObjective()(*inputs)
    objective = AVDObjective(AVDConfig(**{part: None}))
    assert getattr(objective, part) is None
    other = {"regression": "motion", "motion": "regression"}[part]
    loss, metrics = objective(inputs.x_0) if part == "regression" else objective(None, *list(inputs)[1:])
    assert loss == metrics[f"{other}/loss"] == whole.metrics[f"{other}/loss"]
    assert {name.split("/")[0] for name in metrics} == {other}


def test_both_terms_reach_their_tensors_and_nothing_else() -> None:
    inputs = draw()
    inputs.target.requires_grad_(False)
    objective = AVDObjective()
    assert not list(objective.parameters())
    objective(*inputs).loss.backward()
    assert inputs.x_0.grad.any()
    assert inputs.prediction.grad.any()


def test_the_names_of_metrics_and_state_are_pinned() -> None:
    # Dashboards, callbacks and checkpoints depend on them.
    objective = AVDObjective()
    _, metrics = objective(*draw(), **matching())
    assert sorted(metrics) == [
        "balance/gradient_ratio",
        "balance/scale",
        "motion/loss",
        "motion/temporal_loss",
        "motion/variance",
        "regression/loss",
        "regression/means",
        "regression/sample_losses",
        "regression/weights",
    ]
    assert not any(value.requires_grad for value in metrics.values())
    assert sorted(objective.state_dict()) == [
        "balance.calls",
        "balance.means",
        "regression.cache.means",
        "regression.cache.pending",
        "regression.cache.pending_squares",
        "regression.cache.seen",
        "regression.cache.timesteps",
        "regression.cache.variance_shares",
        "regression.cache.variances",
    ]


def test_a_restart_changes_nothing() -> None:
    config = AVDConfig(gradient_ratio=0.5)
    objective, restarted = AVDObjective(config), AVDObjective(config)
    for seed in range(3):
        objective(*draw(seed), **matching(seed))
    restarted.load_state_dict(state_of(objective))
    outcomes = [each(*draw(9), **matching(9)).loss for each in (objective, restarted)]
    assert outcomes[0] == outcomes[1]
    assert_same_state(state_of(restarted), state_of(objective))


# --- The balance with distribution matching


def test_the_matching_loss_is_compared_and_not_added() -> None:
    inputs = draw()
    with_matching, without = AVDObjective(), AVDObjective()
    output = with_matching(*inputs, **matching())
    assert output.loss == without(*inputs).loss
    gradient = torch.autograd.grad(output.loss, inputs.prediction)[0]
    expected = gradient.norm() / (2 * matching()["matching_output"]).norm()
    assert output.metrics["balance/gradient_ratio"].item() == pytest.approx(expected.item(), rel=1e-5)
    assert output.metrics["balance/scale"].item() == 1


def test_a_configured_ratio_is_held_for_the_regression_alone() -> None:
    inputs = draw()
    objective = AVDObjective(AVDConfig(gradient_ratio=0.25))
    loss, metrics = objective(*inputs, **matching())
    plain = AVDObjective()(*inputs)
    held = torch.autograd.grad(loss, [inputs.x_0, inputs.prediction])
    assert (held[1].norm() / (2 * matching()["matching_output"]).norm()).item() == pytest.approx(0.25, rel=1e-5)
    torch.testing.assert_close(held[0], torch.autograd.grad(plain.loss, inputs.x_0)[0])
    assert metrics["motion/loss"] == plain.metrics["motion/loss"]
    assert loss.item() == pytest.approx((metrics["motion/loss"] + metrics["regression/loss"]).item())
    assert metrics["regression/loss"].item() == pytest.approx(
        (metrics["balance/scale"] * plain.metrics["regression/loss"]).item()
    )


# --- What the weight judges


@pytest.mark.parametrize(("judged", "name"), [("relative", "clips"), ("excess", "teacher_prediction")])
def test_what_the_weight_judges_by_arrives_in_one_pass_and_in_two(judged: str, name: str) -> None:
    config = AVDConfig(regression=RegressionConfig(judged=judged, deviation="standardized"))
    whole, parts = AVDObjective(config), AVDObjective(config)
    loss = AdaptiveRegressionLoss(LossMeanCache(GRID), judged=judged, deviation="standardized")
    for seed in range(3):
        inputs, other = draw(10 * seed), {name: randn(seed + 5, *draw().prediction.shape)}
        _, metrics = whole(*inputs, **other)
        clips = parts.on_clips(inputs.prediction, inputs.target, inputs.timesteps, **other)
        expected = loss(inputs.prediction, inputs.target, inputs.timesteps, **other)
        assert clips.loss == metrics["regression/loss"] == expected.loss
        for key, value in expected.metrics.items():
            assert torch.equal(metrics[f"regression/{key}"], value)
    assert_same_state(state_of(parts), state_of(whole))
    assert {"regression/judged", "regression/deviations"} <= set(metrics)


@pytest.mark.parametrize("given", [{}, {"clips": torch.ones(3, 2)}])
def test_what_the_weight_cannot_judge_by_leaves_everything_alone(given: dict[str, Tensor]) -> None:
    objective = AVDObjective(AVDConfig(regression=RegressionConfig(judged="excess")))
    inputs = draw()
    with pytest.raises(ValueError, match=r"teacher_prediction|does not look at clips"), NoArithmetic():
        objective(*inputs, **given)
    with pytest.raises(ValueError, match=r"teacher_prediction|does not look at clips"), NoArithmetic():
        objective.on_clips(inputs.prediction, inputs.target, inputs.timesteps, **given)
    assert not objective.regression.cache.seen.any()


# --- Numbers that are not finite


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("which", ["x_0", "prediction", "target"])
@given(where=st.integers(0, 47))
def test_a_bad_number_shows_in_the_loss_and_never_enters_a_mean(bad: float, which: str, where: int) -> None:
    objective = AVDObjective()
    inputs = draw(timesteps=(1000, 522))
    with torch.no_grad():
        getattr(inputs, which).view(-1)[where] = bad
    assert not objective(*inputs).loss.isfinite()
    assert objective.regression.cache.means.isfinite().all()
    seen = [True, False, False, True]
    if which != "x_0":
        seen[0 if where < 24 else 3] = False
    assert objective.regression.cache.seen.tolist() == seen


# --- Wrong input


@pytest.mark.parametrize(
    ("config", "missing", "message"),
    [
        (AVDConfig(), ["x_0"], r"motion term needs x_0.*AVDConfig\(motion=None\)"),
        (AVDConfig(), ["prediction"], r"regression needs prediction.*AVDConfig\(regression=None\)"),
        (AVDConfig(), ["target"], "regression needs prediction, target and timesteps"),
        (AVDConfig(), ["timesteps"], "regression needs prediction, target and timesteps"),
        (AVDConfig(), ["matching_loss"], "pass both or neither"),
        (AVDConfig(), ["matching_output"], "pass both or neither"),
        (
            AVDConfig(gradient_ratio=1.0),
            ["matching_loss", "matching_output"],
            "needs matching_loss and matching_output",
        ),
        (AVDConfig(regression=None, motion=None), [], "nothing to compute"),
    ],
)
def test_missing_arguments_are_named_before_anything_happens(
    config: AVDConfig, missing: list[str], message: str
) -> None:
    objective = AVDObjective(config)
    arguments = {**vars(draw()), **matching(), **dict.fromkeys(missing)}
    with pytest.raises(ValueError, match=message), NoArithmetic():
        objective(**arguments)
    assert_same_state(state_of(objective), state_of(AVDObjective(config)))


WRONG = {
    "images": ({"x_0": torch.ones(1, 2, 4, 4)}, ValueError, r"x_0 must be \[B, C, F, H, W\].*Images have no motion"),
    "detached samples": ({"x_0": torch.ones(1, 2, 3, 4, 4)}, ValueError, "x_0 has no gradient"),
    "detached prediction": ({"prediction": torch.ones(3, 2, 3, 2, 2)}, ValueError, "prediction has no gradient"),
    "a single frame": ({"x_0": torch.ones(1, 2, 1, 4, 4)}, ValueError, "at least 2 frames"),
    "integer samples": ({"x_0": torch.ones(1, 2, 3, dtype=torch.int)}, TypeError, "x_0 must be a floating"),
    "shapes differ": ({"prediction": torch.ones(3, 2)}, ValueError, "prediction and target must have the same shape"),
    "integer target": ({"target": torch.ones(3, 2, 3, 2, 2, dtype=torch.int)}, TypeError, "target must be a floating"),
    "too few timesteps": ({"timesteps": torch.tensor([1000])}, ValueError, r"timesteps must have shape \[3\]"),
    "another device": ({"timesteps": torch.ones(3, device="meta")}, ValueError, "timesteps is on meta"),
    "integer matching output": (
        {**matching(), "matching_output": torch.ones(2, dtype=torch.int)},
        TypeError,
        "matching_output must be a floating",
    ),
}


@pytest.mark.parametrize(("wrong", "error", "message"), WRONG.values(), ids=WRONG)
def test_wrong_input_is_refused_before_anything_happens(
    wrong: dict[str, Tensor], error: type[Exception], message: str
) -> None:
    objective = AVDObjective()
    arguments = {**vars(draw()), **wrong}
    with pytest.raises(error, match=message), NoArithmetic():
        objective(**arguments)
    assert_same_state(state_of(objective), state_of(AVDObjective()))


def test_a_mistaken_unit_leaves_the_cache() -> None:
    objective = AVDObjective()
    with pytest.raises(ValueError, match="outside the cache's grid"):
        objective(**{**vars(draw()), "timesteps": torch.tensor([1.0, 0.9, 0.5])})
    assert_same_state(state_of(objective), state_of(AVDObjective()))


def test_a_matching_output_outside_the_graph_leaves_the_cache() -> None:
    # Detached by mistake: nothing can be measured, and the step's losses must not count twice when it is repeated.
    objective = AVDObjective()
    wrong = matching()
    wrong["matching_output"] = wrong["matching_output"].detach()
    with pytest.raises((RuntimeError, ValueError)):
        objective(*draw(), **wrong)
    assert_same_state(state_of(objective), state_of(AVDObjective()))


@pytest.mark.parametrize(("config", "compared"), [(AVDConfig(), {}), (AVDConfig(gradient_ratio=0.5), matching())])
def test_validation_without_gradients_works(config: AVDConfig, compared: dict[str, Tensor]) -> None:
    objective = AVDObjective(config)
    objective(*draw(), **compared)
    before = state_of(objective)
    with torch.no_grad():
        output = objective.eval()(*draw(), **compared)
    assert output.loss.isfinite()
    assert_same_state(state_of(objective), before)


# --- In two passes


@given(seeds)
def test_two_backward_passes_give_the_gradients_of_one(seed: int) -> None:
    config = AVDConfig(gradient_ratio=0.3, motion=MotionConfig(floor=-5.0))
    whole, parts = AVDObjective(config), AVDObjective(config)
    one, two = draw(seed), draw(seed)
    loss, metrics = whole(*one, **matching(seed))
    loss.backward()
    samples = parts.on_samples(two.x_0)
    samples.loss.backward()
    clips = parts.on_clips(two.prediction, two.target, two.timesteps, **matching(seed))
    clips.loss.backward()
    torch.testing.assert_close(samples.loss + clips.loss, loss)
    assert_same_state({**clips.metrics, **samples.metrics}, metrics)
    torch.testing.assert_close(two.x_0.grad, one.x_0.grad)
    torch.testing.assert_close(two.prediction.grad, one.prediction.grad)
    assert_same_state(state_of(parts), state_of(whole))


def test_a_pass_that_is_left_out_has_nothing_to_compute() -> None:
    inputs = draw()
    with pytest.raises(ValueError, match="leaves out the motion term"):
        AVDObjective(AVDConfig(motion=None)).on_samples(inputs.x_0)
    with pytest.raises(ValueError, match="leaves out the regression"):
        AVDObjective(AVDConfig(regression=None)).on_clips(inputs.prediction, inputs.target, inputs.timesteps)
    with pytest.raises(ValueError, match="needs x_0, the generated samples"):
        AVDObjective().on_samples(None)
    with pytest.raises(ValueError, match="belong together"):
        AVDObjective().on_clips(inputs.prediction, inputs.target, inputs.timesteps, matching_loss=torch.ones(()))


def test_a_failed_pass_over_clips_leaves_the_cache_alone() -> None:
    objective, inputs = AVDObjective(), draw()
    before = state_of(objective)
    with pytest.raises(ValueError, match="timesteps"):
        objective.on_clips(inputs.prediction, inputs.target, None)
    with pytest.raises(ValueError, match="has no gradient"):
        objective.on_clips(
            inputs.prediction.detach(), inputs.target, inputs.timesteps, **matching()
        )  # after the matching loss, which is fine
    assert_same_state(state_of(objective), before)


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("part", [None, "regression", "motion"])
def test_the_few_steps_can_be_drawn_from(part: str | None, device: str) -> None:
    config = AVDConfig(timesteps=(1000, 757.3), **({part: None} if part else {}))
    timesteps = AVDObjective(config).to(device, torch.bfloat16).timesteps
    assert (timesteps.dtype, timesteps.device.type) == (torch.float32, device)
    assert timesteps.shape == (2,)
    if device == "cpu":
        assert timesteps.tolist() == pytest.approx([1000, 757.3])  # no bfloat16


def test_update_ends_the_step_of_several_forwards_and_nothing_else() -> None:
    one = AVDObjective(AVDConfig(regression=RegressionConfig(auto_update=False)))
    for seed in range(2):
        one(*draw(seed))
    assert not one.regression.cache.seen.any()
    one.update()
    assert one.regression.cache.seen.tolist() == [True, False, False, True]
    automatic = AVDObjective()
    automatic(*draw())
    before = state_of(automatic)
    automatic.update()
    assert_same_state(state_of(automatic), before)
    AVDObjective(AVDConfig(regression=None)).update()


def test_channels_catch_a_swapped_layout() -> None:
    objective = AVDObjective(AVDConfig(regression=None, motion=MotionConfig(channels=2)))
    x_0 = draw().x_0
    objective(x_0)
    with pytest.raises(ValueError, match=r"channels=2 .* dimension 1 .*which has 3\. Frames and channels look swapped"):
        objective(x_0.transpose(1, 2))


def test_a_mapping_is_no_configuration() -> None:
    with pytest.raises(TypeError, match=r"config must be an AVDConfig, got dict.*AVDConfig.model_validate"):
        AVDObjective({"motion": None})  # type: ignore[arg-type]
