import math
from itertools import product
from typing import Any

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor, nn

from avd_core import (
    FlowMatchingSchedule,
    HingeLoss,
    LogisticLoss,
    LossOutput,
    SpatioTemporalR1Loss,
    spatio_temporal_r1_loss,
)
from references import central_differences, flatten, mean
from tensors import randn
from watchers import NoArithmetic

seeds = st.integers(0, 2**32 - 1)
logits = st.lists(st.floats(-4, 4), min_size=1, max_size=5)


def with_gradient(values: list[float]) -> Tensor:
    return torch.tensor(values, dtype=torch.float64, requires_grad=True)


# --- The hinge loss


def reference_hinge(clips: list[float], samples: list[float]) -> float:
    return mean([1 - x if x < 1 else 0.0 for x in clips]) + mean([1 + x if x > -1 else 0.0 for x in samples])


@given(logits, logits)
def test_the_discriminators_loss_and_metrics_are_the_references(clips: list[float], samples: list[float]) -> None:
    loss, metrics = HingeLoss().discriminator(with_gradient(clips), with_gradient(samples))
    assert loss.item() == pytest.approx(reference_hinge(clips, samples), abs=1e-12)
    right = [mean([(x > 0) + 0.5 * (x == 0) for x in side]) for side in (clips, [-x for x in samples])]
    pairs = list(zip(clips, samples, strict=True) if len(clips) == len(samples) else product(clips, samples))
    assert {name: value.item() for name, value in metrics.items()} == pytest.approx(
        {
            "hinge_loss": reference_hinge(clips, samples),
            "clip_logit": mean(clips),
            "sample_logit": mean(samples),
            "logit_gap": mean(clips) - mean(samples),
            "ranked": mean([(x > y) + 0.5 * (x == y) for x, y in pairs]),
            "accuracy": mean(right),
        },
        abs=1e-12,
    )
    assert not any(value.requires_grad for value in metrics.values())


@given(logits, logits)
def test_the_discriminators_gradient_is_the_references(clips: list[float], samples: list[float]) -> None:
    assume(all(abs(abs(x) - 1) > 1e-3 for x in clips + samples))  # where the loss has a corner
    tensors = with_gradient(clips), with_gradient(samples)
    gradients = torch.autograd.grad(HingeLoss().discriminator(*tensors).loss, tensors)
    count = len(clips)
    expected = central_differences(lambda x: reference_hinge(x[:count], x[count:]), clips + samples)
    assert [*gradients[0].tolist(), *gradients[1].tolist()] == pytest.approx(expected, abs=1e-8)


@given(logits)
def test_the_generators_loss_is_the_negative_mean_logit_and_its_gradient_is_constant(samples: list[float]) -> None:
    sample_logits = with_gradient(samples)
    loss, metrics = HingeLoss().generator(sample_logits)
    loss.backward()
    assert loss.item() == pytest.approx(-mean(samples), abs=1e-12)
    assert metrics["sample_logit"].item() == pytest.approx(mean(samples), abs=1e-12)
    assert sample_logits.grad.tolist() == pytest.approx([-1 / len(samples)] * len(samples))


@given(logits, logits)
def test_the_sides_are_mirrored_and_a_small_loss_needs_a_gap(clips: list[float], samples: list[float]) -> None:
    a, b = with_gradient(clips), with_gradient(samples)
    loss, metrics = HingeLoss().discriminator(a, b)
    mirrored, others = HingeLoss().discriminator(-b, -a)
    torch.testing.assert_close(mirrored, loss)
    torch.testing.assert_close(others["accuracy"], metrics["accuracy"])
    assert loss >= 2 - metrics["logit_gap"] - 1e-12
    assert loss >= 0


def test_beyond_the_margins_the_discriminator_has_nothing_to_gain() -> None:
    clips, samples = with_gradient([1.5, 9.0]), with_gradient([-1.1, -7.0])
    loss = HingeLoss().discriminator(clips, samples).loss
    loss.backward()
    assert loss == 0
    assert not clips.grad.any()
    assert not samples.grad.any()


@pytest.mark.parametrize("loss", [HingeLoss, LogisticLoss])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("side", [0, 1])
def test_a_logit_that_is_not_finite_shows_in_the_loss_also_on_the_right_side(
    loss: type[HingeLoss | LogisticLoss], bad: float, side: int
) -> None:
    sides = [[0.5, 2.0], [-0.5, 1.0]]
    sides[side][0] = bad
    tensors = [with_gradient(values) for values in sides]
    assert not loss().discriminator(*tensors).loss.isfinite()
    assert not loss().generator(tensors[side]).loss.isfinite()


@pytest.mark.parametrize(("loss", "values"), [(HingeLoss, [2.0, 2.0, -0.5]), (LogisticLoss, [1.4482, 1.4482, 0.4741])])
def test_logits_without_gradient_are_refused_in_training_only(
    loss: type[HingeLoss | LogisticLoss], values: list[float]
) -> None:
    hinge, given_logits = loss(), with_gradient([0.5])
    refused = {
        "clip_logits": lambda: hinge.discriminator(given_logits.detach(), given_logits),
        "sample_logits": lambda: hinge.discriminator(given_logits, given_logits.detach()),
        "sample_logits ": lambda: hinge.generator(given_logits.detach()),
    }
    for name, call in refused.items():
        with pytest.raises(ValueError, match=f"{name.strip()} has no gradient, so its term could change nothing"):
            call()
    hinge.eval()
    assert [call().loss.item() for call in refused.values()] == pytest.approx(values, abs=1e-4)


two = torch.zeros(2, requires_grad=True)
WRONG_LOGITS = {
    "a column": (
        torch.zeros(2, 1),
        ValueError,
        r"must be \[B\], one logit per video, got shape \[2, 1\].*squeeze\(1\)",
    ),
    "a map of logits": (torch.zeros(2, 3, 4), ValueError, r"must be \[B\].*\[2, 3, 4\]\.$"),
    "a mean": (torch.zeros(()), ValueError, r"must be \[B\].*got shape \[\]"),
    "nothing": (torch.zeros(0), ValueError, r"must be \[B\].*got shape \[0\]"),
    "integers": (torch.zeros(2, dtype=torch.int), TypeError, r"_logits\.float\(\)"),
    "a list": ([0.0, 1.0], TypeError, "must be a torch.Tensor, got list"),
}


@pytest.mark.parametrize("loss", [HingeLoss, LogisticLoss])
@pytest.mark.parametrize(("wrong", "error", "message"), WRONG_LOGITS.values(), ids=WRONG_LOGITS)
def test_wrong_logits_are_refused_before_anything_happens(
    wrong: Any, error: type[Exception], message: str, loss: type[HingeLoss | LogisticLoss]
) -> None:
    hinge = loss()
    for call in (
        lambda: hinge.discriminator(wrong, two),
        lambda: hinge.discriminator(two, wrong),
        lambda: hinge.generator(wrong),
    ):
        with pytest.raises(error, match=message), NoArithmetic():
            call()


def test_sides_on_different_devices_are_refused() -> None:
    elsewhere = two.to("meta")
    with pytest.raises(ValueError, match="clip_logits is on cpu and sample_logits on meta"), NoArithmetic():
        HingeLoss().discriminator(two, elsewhere)


# --- The logistic loss


def reference_softplus(x: float) -> float:
    return math.log1p(math.exp(-abs(x))) + max(x, 0.0)


def reference_logistic(clips: list[float], samples: list[float]) -> float:
    return mean([reference_softplus(-x) for x in clips]) + mean([reference_softplus(x) for x in samples])


@given(logits, logits)
def test_the_logistic_loss_is_the_references_on_both_sides(clips: list[float], samples: list[float]) -> None:
    tensors = with_gradient(clips), with_gradient(samples)
    loss, metrics = LogisticLoss().discriminator(*tensors)
    assert loss.item() == pytest.approx(reference_logistic(clips, samples), abs=1e-12)
    told_apart = HingeLoss().discriminator(*tensors).metrics
    told_apart["logistic_loss"] = told_apart.pop("hinge_loss") * 0 + loss.detach()
    assert {k: v.item() for k, v in metrics.items()} == {k: v.item() for k, v in told_apart.items()}
    count = len(clips)
    expected = central_differences(lambda x: reference_logistic(x[:count], x[count:]), clips + samples)
    gradients = torch.autograd.grad(loss, tensors)
    assert [*gradients[0].tolist(), *gradients[1].tolist()] == pytest.approx(expected, abs=1e-8)

    generator, metrics = LogisticLoss().generator(tensors[1])
    (gradient,) = torch.autograd.grad(generator, tensors[1])
    assert generator.item() == pytest.approx(mean([reference_softplus(-x) for x in samples]), abs=1e-12)
    assert gradient.tolist() == pytest.approx([-1 / (1 + math.exp(x)) / len(samples) for x in samples])
    assert metrics["sample_logit"].item() == pytest.approx(mean(samples), abs=1e-12)


def test_a_discriminator_that_guesses_has_twice_the_logarithm_of_two() -> None:
    guessing = with_gradient([0.0, 0.0])
    assert LogisticLoss().discriminator(guessing, guessing).loss.item() == pytest.approx(2 * math.log(2))


# --- The regularization of the discriminator

frames_of = st.integers(2, 5)


class Judge(nn.Module):
    """A discriminator with a curved answer, which remembers the clips that it was asked about."""

    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(randn(99, *shape))
        self.asked: list[Tensor] = []

    def forward(self, x_t: Tensor) -> Tensor:
        self.asked.append(x_t)
        return torch.tanh((self.weight * x_t).flatten(1).sum(1))


def reference_judge(weight: list[float], clip: list[float]) -> float:
    return math.tanh(math.fsum(w * x for w, x in zip(weight, clip, strict=True)))


def reference_r1(
    weight: list[float], clips: list[Any], spatial: list[Any], temporal: list[Any], sigmas: tuple[float, float]
) -> tuple[float, float]:
    """The two expectations for clips [B][C][F][H][W], perturbed number by number."""
    squares: tuple[list[float], list[float]] = ([], [])
    for b, clip in enumerate(clips):
        frames = len(clip[0])
        moved: tuple[list[float], list[float]] = ([], [])
        for c, channel in enumerate(clip):
            for f, frame in enumerate(channel):
                for h, row in enumerate(frame):
                    for w, number in enumerate(row):
                        center = mean([temporal[b][c][other][h][w] for other in range(frames)])
                        stretch = math.sqrt(frames / (frames - 1))
                        moved[0].append(number + sigmas[0] * spatial[b][c][0][h][w])
                        moved[1].append(number + sigmas[1] * stretch * (temporal[b][c][f][h][w] - center))
        own = reference_judge(weight, flatten(clip))
        for side in range(2):
            squares[side].append((own - reference_judge(weight, moved[side])) ** 2)
    return mean(squares[0]), mean(squares[1])


def draw(seed: int, frames: int, batch: int = 2) -> tuple[Judge, Tensor, dict[str, Tensor]]:
    """A discriminator, noised clips [B, C, F, H, W], and both noises."""
    shape = (batch, 2, frames, 1, 2)
    noises = {"spatial_noise": randn(seed + 1, batch, 2, 1, 1, 2), "temporal_noise": randn(seed + 2, *shape)}
    return Judge(*shape[1:]), randn(seed, *shape), noises


def perturbations(seed: int, frames: int, **options: Any) -> tuple[Tensor, Tensor]:
    """What is added to the clips [B, C, F, H, W]: in space, in time."""
    judge, x_t, noises = draw(seed, frames)
    spatio_temporal_r1_loss(judge, x_t, judge(x_t), **noises, **options)
    _, spatial, temporal = judge.asked
    return spatial - x_t, temporal - x_t


@given(seeds, frames_of, st.floats(0, 200), st.floats(0.01, 1), st.floats(0.01, 1))
def test_loss_and_metrics_are_the_reference(
    seed: int, frames: int, weight: float, sigma_spatial: float, sigma_temporal: float
) -> None:
    judge, x_t, noises = draw(seed, frames)
    loss, metrics = spatio_temporal_r1_loss(
        judge, x_t, judge(x_t), **noises, weight=weight, sigma_spatial=sigma_spatial, sigma_temporal=sigma_temporal
    )
    numbers = x_t.tolist(), noises["spatial_noise"].tolist(), noises["temporal_noise"].tolist()
    spatial, temporal = reference_r1(flatten(judge.weight.tolist()), *numbers, (sigma_spatial, sigma_temporal))
    assert metrics["spatial"].item() == pytest.approx(spatial, rel=1e-6, abs=1e-14)
    assert metrics["temporal"].item() == pytest.approx(temporal, rel=1e-6, abs=1e-14)
    assert loss.item() == pytest.approx(weight * (spatial + temporal), rel=1e-6, abs=1e-12)


@given(seeds, frames_of, st.floats(0.01, 1), st.floats(0.01, 1))
def test_another_step_measures_the_slope_elsewhere_and_weighs_it_alike(
    seed: int, frames: int, sigma: float, step: float
) -> None:
    judge, x_t, noises = draw(seed, frames)
    options = {**noises, "sigma_spatial": sigma, "step_spatial": step}
    found = spatio_temporal_r1_loss(judge, x_t, judge(x_t), **options).metrics
    numbers = x_t.tolist(), noises["spatial_noise"].tolist(), noises["temporal_noise"].tolist()
    spatial, temporal = reference_r1(flatten(judge.weight.tolist()), *numbers, (step, 0.1))
    assert found["spatial"].item() == pytest.approx((sigma / step) ** 2 * spatial, rel=1e-6, abs=1e-14)
    assert found["temporal"].item() == pytest.approx(temporal, rel=1e-6, abs=1e-14)

    def straight(x_t: Tensor) -> Tensor:
        return (judge.weight * x_t).flatten(1).sum(1)

    of_straight = [
        spatio_temporal_r1_loss(straight, x_t, straight(x_t), **{**options, "step_spatial": each}).metrics["spatial"]
        for each in (step, None)
    ]
    torch.testing.assert_close(*of_straight)


@given(seeds)
def test_the_gradient_is_the_references_through_both_logits(seed: int) -> None:
    judge, x_t, noises = draw(seed, frames=2)
    options = {"weight": 5.0, "sigma_spatial": 0.3, "sigma_temporal": 0.4}
    spatio_temporal_r1_loss(judge, x_t, judge(x_t), **noises, **options).loss.backward()
    numbers = x_t.tolist(), noises["spatial_noise"].tolist(), noises["temporal_noise"].tolist()
    expected = central_differences(
        lambda weight: 5.0 * sum(reference_r1(weight, *numbers, (0.3, 0.4))), flatten(judge.weight.tolist())
    )
    assert flatten(judge.weight.grad.tolist()) == pytest.approx(expected, rel=1e-6, abs=1e-8)


@given(seeds, frames_of)
def test_the_perturbations_are_orthogonal_along_frames(seed: int, frames: int) -> None:
    spatial, temporal = perturbations(seed, frames)
    inner = (spatial * temporal).sum(dim=2)
    torch.testing.assert_close(inner, torch.zeros_like(inner), rtol=0, atol=1e-14)


@given(seeds, frames_of)
def test_neither_perturbation_moves_anything_of_the_other(seed: int, frames: int) -> None:
    spatial, temporal = perturbations(seed, frames)
    zeros = torch.zeros_like(spatial)
    # In space: all frames alike, so that no frame moves against the mean frame. In time: the mean frame stays.
    torch.testing.assert_close(spatial - spatial.mean(dim=2, keepdim=True), zeros, rtol=0, atol=1e-14)
    torch.testing.assert_close(temporal.mean(dim=2), zeros[:, :, 0], rtol=0, atol=1e-14)
    assert spatial.any()
    assert temporal.any()


@pytest.mark.parametrize("frames", [2, 5, 21])
@pytest.mark.parametrize("layout", ["BCFHW", "BFCHW"])
@pytest.mark.parametrize("given_noise", [True, False])
def test_sigma_is_the_standard_deviation_of_a_perturbation_for_any_number_of_frames(
    frames: int, layout: str, given_noise: bool
) -> None:
    torch.manual_seed(0)
    frame_dim = layout.index("F")
    sizes = {"B": 2, "C": 3, "F": frames, "H": 40, "W": 40}
    x_t = randn(0, *(sizes[letter] for letter in layout))
    still = [1 if letter == "F" else sizes[letter] for letter in layout]
    noises = {"spatial_noise": randn(1, *still), "temporal_noise": randn(2, *x_t.shape)} if given_noise else {}
    judge = Judge(*x_t.shape[1:])
    r1 = SpatioTemporalR1Loss(sigma_spatial=0.5, sigma_temporal=2.0, frame_dim=frame_dim)
    r1(judge, x_t, judge(x_t), **noises)
    spatial, temporal = judge.asked[1] - x_t, judge.asked[2] - x_t
    assert spatial.std().item() == pytest.approx(0.5, rel=0.03)
    assert temporal.std().item() == pytest.approx(2.0, rel=0.03)
    assert spatial.std(dim=frame_dim).max() < 1e-12
    assert temporal.mean(dim=frame_dim).abs().max() < 1e-12


@given(seeds, st.floats(100, 900))
def test_the_noised_clip_is_perturbed_and_compared_with_its_own_logits(seed: int, timestep: float) -> None:
    schedule = FlowMatchingSchedule()
    judge, x_0, noises = draw(seed, frames=3)
    e, t = randn(seed + 3, *x_0.shape), torch.full((len(x_0),), timestep, dtype=torch.float64)
    x_t = schedule.add_noise(x_0, e, t)
    sigmas = {"sigma_spatial": 0.2, "sigma_temporal": 0.2}
    loss = spatio_temporal_r1_loss(judge, x_t, judge(x_t), **noises, weight=1.0, **sigmas).loss
    _, *perturbed = list(judge.asked)
    torch.testing.assert_close(loss, sum((judge(x_t) - judge(each)).square().mean() for each in perturbed))
    # Perturbing the clean clip shrinks the perturbation; that is another loss.
    temporal = noises["temporal_noise"] - noises["temporal_noise"].mean(2, keepdim=True)
    for asked, noise in zip(perturbed, (noises["spatial_noise"], math.sqrt(3 / 2) * temporal), strict=True):
        torch.testing.assert_close(asked, x_t + 0.2 * noise)
        assert not torch.allclose(asked, schedule.add_noise(x_0 + 0.2 * noise, e, t), atol=1e-4)
    # The clip's own logits leave nothing when nothing is perturbed; the clean clip's would.
    tiny = {"sigma_spatial": 1e-9, "sigma_temporal": 1e-9}
    assert spatio_temporal_r1_loss(judge, x_t, judge(x_t), **noises, weight=1.0, **tiny).loss < 1e-14


def test_a_discriminator_that_ignores_motion_has_no_temporal_term_and_the_reverse() -> None:
    _, x_t, noises = draw(0, frames=4)

    def still(x_t: Tensor) -> Tensor:
        return x_t.mean(dim=2).flatten(1).sum(1)

    def moving(x_t: Tensor) -> Tensor:
        return (x_t[:, :, 1] - x_t[:, :, 0]).flatten(1).sum(1)

    of_still = spatio_temporal_r1_loss(still, x_t, still(x_t), **noises).metrics
    of_moving = spatio_temporal_r1_loss(moving, x_t, moving(x_t), **noises).metrics
    assert of_still["spatial"] > 1e-6 > 1e-20 > of_still["temporal"]
    assert of_moving["temporal"] > 1e-6 > 1e-20 > of_moving["spatial"]


def test_no_gradient_reaches_the_clips_or_the_metrics() -> None:
    judge, x_t, noises = draw(0, frames=3)
    own = judge(x_t)
    x_t.requires_grad_()
    loss, metrics = spatio_temporal_r1_loss(judge, x_t, own, **noises)
    loss.backward()
    assert x_t.grad is None
    assert not any(value.requires_grad for value in metrics.values())


def test_noise_that_is_not_given_is_drawn_anew_in_each_call() -> None:
    judge, x_t, _ = draw(0, frames=3)
    outputs = [spatio_temporal_r1_loss(judge, x_t, judge(x_t)) for _ in range(2)]
    for name in ("spatial", "temporal"):
        assert outputs[0].metrics[name] != outputs[1].metrics[name]


def test_a_perturbation_survives_half_precision() -> None:
    # Beside a 4, bfloat16 knows no 0.01.
    x_t = torch.full((1, 2, 2, 1, 1), 4.0, dtype=torch.bfloat16)
    judge = Judge(2, 2, 1, 1).bfloat16()
    r1 = SpatioTemporalR1Loss()
    r1(judge, x_t, judge(x_t), spatial_noise=torch.ones(1, 2, 1, 1, 1))
    assert judge.asked[1].dtype == torch.float32
    torch.testing.assert_close(judge.asked[1] - x_t, torch.full_like(judge.asked[1], 0.01), rtol=1e-3, atol=0)


def test_the_module_passes_every_option_on() -> None:
    judge, x_t, noises = draw(0, frames=3)
    options = {"weight": 3.0, "sigma_spatial": 0.2, "sigma_temporal": 0.3, "step_spatial": 0.4, "frame_dim": 1}
    noises["spatial_noise"] = randn(5, 2, 1, 3, 1, 2)
    own = judge(x_t)
    expected: LossOutput = spatio_temporal_r1_loss(judge, x_t, own, **noises, **options)
    assert SpatioTemporalR1Loss(**options)(judge, x_t, own, **noises) == expected
    said = "weight=3.0, sigma_spatial=0.2, sigma_temporal=0.3, step_spatial=0.4"
    assert said in repr(SpatioTemporalR1Loss(**options))


def test_the_defaults_are_the_papers_and_apts() -> None:
    r1 = SpatioTemporalR1Loss()
    assert (r1.weight, r1.sigma_spatial, r1.sigma_temporal) == (100.0, 0.01, 0.1)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("where", ["own", "perturbed"])
def test_a_bad_logit_shows_in_the_loss(bad: float, where: str) -> None:
    judge, x_t, noises = draw(0, frames=3)
    own = judge(x_t)
    if where == "own":
        own = own * bad
    else:
        judge.weight.data[0] = bad
    assert not spatio_temporal_r1_loss(judge, x_t, own, **noises).loss.isfinite()


def test_own_logits_without_gradient_are_refused_in_training_only() -> None:
    judge, x_t, noises = draw(0, frames=3)
    r1 = SpatioTemporalR1Loss()
    with pytest.raises(ValueError, match="logits has no gradient, so its term could change nothing"):
        r1(judge, x_t, judge(x_t).detach(), **noises)
    assert r1.eval()(judge, x_t, judge(x_t).detach(), **noises).loss == r1(judge, x_t, judge(x_t), **noises).loss


x = torch.zeros(2, 3, 4, 5, 5)
WRONG = {
    "a single frame": ({"x_t": x[:, :, :1]}, ValueError, "x_t must have at least 2 frames, got 1"),
    "images": ({"x_t": x[:, :, 0]}, ValueError, r"x_t must be \[B, C, F, H, W\].*frame_dim"),
    "integer clips": ({"x_t": x.int()}, TypeError, r"x_t\.float\(\)"),
    "a column of logits": ({"logits": two.unsqueeze(1)}, ValueError, r"logits must be \[B\].*logits\.squeeze\(1\)"),
    "logits of another batch": ({"logits": two[:1]}, ValueError, r"logits must have shape \[2\], one per noised clip"),
    "no logits": ({"logits": None}, TypeError, "logits must be a torch.Tensor, got NoneType"),
    "logits elsewhere": ({"logits": two.to("meta")}, ValueError, "logits is on meta and x_t on cpu"),
    "spatial noise of many frames": (
        {"spatial_noise": x}, ValueError, r"spatial_noise must have shape \[2, 3, 1, 5, 5\] for x_t \[2, 3, 4, 5, 5\]"
    ),
    "temporal noise of one frame": (
        {"temporal_noise": x[:, :, :1]}, ValueError, r"temporal_noise must have shape \[2, 3, 4, 5, 5\]"
    ),
    "integer noise": ({"temporal_noise": x.int()}, TypeError, r"temporal_noise\.float\(\)"),
    "noise elsewhere": ({"temporal_noise": x.to("meta")}, ValueError, "temporal_noise is on meta and x_t on cpu"),
}  # fmt: skip


@pytest.mark.parametrize(("wrong", "error", "message"), WRONG.values(), ids=WRONG)
def test_wrong_input_is_refused_before_the_discriminator_is_asked(
    wrong: dict[str, Any], error: type[Exception], message: str
) -> None:
    def never(x_t: Tensor) -> Tensor:
        raise AssertionError("asked although the input is wrong")

    with pytest.raises(error, match=message), NoArithmetic():
        SpatioTemporalR1Loss()(never, **{"x_t": x, "logits": two} | wrong)


def test_a_discriminator_that_answers_in_another_shape_is_refused() -> None:
    with pytest.raises(ValueError, match=r"the discriminator's answer and logits must have the same shape.*\[2, 1\]"):
        spatio_temporal_r1_loss(lambda x_t: x_t.flatten(1)[:, :1], x, two)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"weight": -1.0}, "weight must be a finite number at least 0"),
        ({"weight": math.nan}, "weight must be a finite number at least 0"),
        ({"sigma_spatial": 0.0}, "sigma_spatial must be a finite number above 0"),
        ({"sigma_temporal": 0.0}, "sigma_temporal must be a finite number above 0"),
        ({"sigma_temporal": math.inf}, "sigma_temporal must be a finite number above 0"),
        ({"step_spatial": 0.0}, "step_spatial must be a finite number above 0"),
    ],
)
def test_wrong_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SpatioTemporalR1Loss(**options)
    with pytest.raises(ValueError, match=message):
        spatio_temporal_r1_loss(lambda x_t: x_t.flatten(1)[:, 0], x, two, **options)
