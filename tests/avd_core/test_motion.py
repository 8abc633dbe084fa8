import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from avd_core import ClippedTemporalVarianceLoss, clipped_temporal_variance_loss, derive_floor, temporal_variance
from references import reference_motion, reference_temporal_variance
from tensors import randn
from watchers import LargestTemporary, NoArithmetic

seeds = st.integers(0, 2**32 - 1)
sizes = st.integers(1, 3)
shapes = st.tuples(sizes, sizes, st.integers(2, 5), sizes, sizes)  # [B, C, F, H, W]

# The sums run in 16 pieces, along the dimensions before the frames or those behind them: every way to cut.
LAYOUTS = [(1, 1, 2, 1, 1), (1, 2, 3, 3, 5), (1, 16, 3, 2, 2), (3, 7, 4, 1, 1), (2, 3, 21, 5, 4), (17, 1, 2, 1, 1)]


def gradient_of(x_0: Tensor, **options: Any) -> Tensor:
    x_0 = x_0.detach().requires_grad_()
    return torch.autograd.grad(clipped_temporal_variance_loss(x_0, **options).loss, x_0)[0]


# --- Eq. 8


@given(seeds, shapes, st.floats(-3, 3), st.floats(1e-6, 1), st.floats(0, 2), st.floats(0.05, 5))
def test_the_loss_is_the_reference(
    seed: int, shape: tuple[int, ...], floor: float, eps: float, weight: float, scale: float
) -> None:
    x_0 = scale * randn(seed, *shape)
    loss, metrics = clipped_temporal_variance_loss(x_0, floor=floor, eps=eps, weight=weight)
    variance = reference_temporal_variance(x_0.tolist())
    assert loss.item() == pytest.approx(reference_motion(x_0.tolist(), floor, eps, weight), rel=1e-9)
    assert metrics["variance"].item() == pytest.approx(variance, rel=1e-9)
    assert metrics["temporal_loss"].item() == pytest.approx(-math.log(variance + eps), rel=1e-9)


@pytest.mark.parametrize("shape", LAYOUTS)
@pytest.mark.parametrize("contiguous", [True, False])
def test_every_layout_is_the_reference(shape: tuple[int, ...], contiguous: bool) -> None:
    x_0 = randn(0, *shape)
    if not contiguous:
        x_0 = x_0.permute(4, 0, 2, 1, 3).contiguous().permute(1, 3, 2, 4, 0)
    assert x_0.shape == shape
    assert temporal_variance(x_0).item() == pytest.approx(reference_temporal_variance(x_0.tolist()), rel=1e-10)


def test_the_variance_divides_by_the_number_of_frames() -> None:
    # Two frames at -1 and 1: the population variance is 1, the sample variance would be 2.
    assert temporal_variance(torch.tensor([[-1.0, 1.0]]), frame_dim=1).item() == 1.0


def test_the_mean_stands_inside_the_logarithm() -> None:
    # One sample stands still and one moves: E[Var] = 0.5, whereas a mean of logarithms would be ruled by eps.
    x_0 = torch.tensor([[0.0, 0.0], [-1.0, 1.0]])
    loss = clipped_temporal_variance_loss(x_0, floor=-10.0, weight=1.0, frame_dim=1).loss
    assert loss.item() == pytest.approx(math.log(2), rel=1e-5)


@given(seeds, shapes, st.floats(-4, 4))
def test_scaling_multiplies_the_variance_by_the_square(seed: int, shape: tuple[int, ...], scale: float) -> None:
    x_0 = randn(seed, *shape)
    torch.testing.assert_close(temporal_variance(scale * x_0), scale**2 * temporal_variance(x_0))


@given(seeds, shapes)
def test_what_stands_still_adds_no_variance(seed: int, shape: tuple[int, ...]) -> None:
    x_0 = randn(seed, *shape)
    still = 5 * randn(seed + 1, *shape)[:, :, :1]
    torch.testing.assert_close(temporal_variance(x_0 + still), temporal_variance(x_0))
    torch.testing.assert_close(gradient_of(x_0 + still, floor=-9.0), gradient_of(x_0, floor=-9.0))


@given(seeds, shapes, st.permutations(range(5)), st.permutations(range(3)))
def test_the_order_of_frames_and_of_samples_does_not_matter(
    seed: int, shape: tuple[int, ...], frames: list[int], samples: list[int]
) -> None:
    x_0 = randn(seed, *shape)
    frames = [f for f in frames if f < shape[2]]
    samples = [s for s in samples if s < shape[0]]
    torch.testing.assert_close(temporal_variance(x_0[samples][:, :, frames]), temporal_variance(x_0))


@given(seeds, shapes)
def test_frame_dim_names_the_frames(seed: int, shape: tuple[int, ...]) -> None:
    x_BCFHW = randn(seed, *shape)
    x_BFCHW = x_BCFHW.transpose(1, 2)
    expected = clipped_temporal_variance_loss(x_BCFHW, floor=-9.0).loss
    gradient = gradient_of(x_BCFHW, floor=-9.0)
    for x_0, frame_dim in ((x_BCFHW, -3), (x_BFCHW, 1), (x_BFCHW, -4), (x_BFCHW.contiguous(), 1)):
        module = ClippedTemporalVarianceLoss(floor=-9.0, frame_dim=frame_dim).eval()
        torch.testing.assert_close(module(x_0).loss, expected, rtol=1e-9, atol=0)
        actual = gradient_of(x_0, floor=-9.0, frame_dim=frame_dim)
        torch.testing.assert_close(actual if x_0 is x_BCFHW else actual.transpose(1, 2), gradient)


def test_the_module_passes_every_option_on() -> None:
    x_0 = randn(0, 2, 3, 4, 2, 2)
    module = ClippedTemporalVarianceLoss(weight=3.0, floor=-2.0, eps=0.5, frame_dim=3)
    expected = clipped_temporal_variance_loss(x_0, weight=3.0, floor=-2.0, eps=0.5, frame_dim=3)
    assert module.eval()(x_0).loss == expected.loss
    assert expected.loss.item() == pytest.approx(
        reference_motion(x_0.movedim(3, 2).tolist(), floor=-2.0, eps=0.5, weight=3.0)
    )


# --- The floor


@given(seeds, shapes)
def test_the_gradient_is_exactly_zero_at_the_floor_and_below(seed: int, shape: tuple[int, ...]) -> None:
    x_0 = randn(seed, *shape)
    temporal_loss = clipped_temporal_variance_loss(x_0).metrics["temporal_loss"].item()
    for floor in (temporal_loss, math.nextafter(temporal_loss, math.inf), temporal_loss + 1):
        assert not gradient_of(x_0, floor=floor).any()
        assert clipped_temporal_variance_loss(x_0, floor=floor, weight=1.0).loss.item() == floor
    just_below = math.nextafter(temporal_loss, -math.inf)
    assert clipped_temporal_variance_loss(x_0, floor=just_below, weight=1.0).loss.item() == temporal_loss
    torch.testing.assert_close(gradient_of(x_0, floor=just_below), gradient_of(x_0, floor=-99.0), rtol=0, atol=0)
    assert gradient_of(x_0, floor=just_below).any()


@given(seeds, st.floats(1e-9, 1e-3))
def test_the_value_is_continuous_at_the_floor(seed: int, step: float) -> None:
    x_0 = randn(seed, 2, 2, 3, 2, 2)
    floor = clipped_temporal_variance_loss(x_0).metrics["temporal_loss"].item()
    for moved in (x_0 * (1 - step), x_0 * (1 + step)):
        loss = clipped_temporal_variance_loss(moved, floor=floor, weight=1.0).loss.item()
        assert floor <= loss <= floor + 2.01 * step


def test_a_larger_floor_asks_for_less_motion() -> None:
    x_0 = 0.7 * randn(0, 2, 2, 8, 4, 4)  # a temporal loss of about 0.8
    assert gradient_of(x_0, floor=0.4).any()
    assert not gradient_of(x_0, floor=1.2).any()


def test_descending_the_loss_makes_samples_move_until_the_floor() -> None:
    x_0 = 0.1 * randn(0, 1, 2, 4, 2, 2)
    losses = []
    for _ in range(60):
        losses.append(clipped_temporal_variance_loss(x_0, floor=0.6, weight=1.0).loss.item())
        x_0 = x_0 - 0.1 * gradient_of(x_0, floor=0.6, weight=1.0)
    assert losses == sorted(losses, reverse=True)
    assert losses[0] > 3
    assert losses[-1] == 0.6


# --- Gradient


@pytest.mark.parametrize("shape", LAYOUTS)
@pytest.mark.parametrize("function", ["variance", "loss"])
def test_gradcheck(shape: tuple[int, ...], function: str) -> None:
    x_0 = randn(0, *shape)[..., :2].contiguous().requires_grad_()
    functions = {"variance": temporal_variance, "loss": lambda x: clipped_temporal_variance_loss(x, floor=-9.0).loss}
    assert torch.autograd.gradcheck(functions[function], (x_0,), fast_mode=x_0.numel() > 200)


def test_gradcheck_of_another_layout() -> None:
    x_0 = randn(0, 2, 3, 2, 2, 3).transpose(1, 2).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: clipped_temporal_variance_loss(x, floor=-9.0, frame_dim=1).loss, (x_0,))


def test_a_second_derivative_is_refused_rather_than_wrong() -> None:
    x_0 = randn(0, 2, 3).requires_grad_()
    loss = clipped_temporal_variance_loss(x_0, floor=-9.0, frame_dim=1).loss
    (gradient,) = torch.autograd.grad(loss, x_0, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


@pytest.mark.parametrize("offset", [0.0, 1.0, 100.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_gradient_is_accurate_far_from_zero(offset: float, dtype: torch.dtype) -> None:
    # Frames that differ by little around a large value: what a student close to freezing generates.
    x_0 = (offset + 0.01 * (1 + offset) * randn(0, 1, 4, 5, 4, 4)).to(dtype)
    expected = gradient_of(x_0.double(), floor=-9.0)
    error = (gradient_of(x_0, floor=-9.0) - expected).norm() / expected.norm()
    # The inputs are exact, so what is lost is lost in the mean, in float32, and once more in the result's own dtype.
    assert error < max(1e-4, torch.finfo(dtype).eps)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("shape", "frame_dim"), [((1, 16, 32, 8, 8), 2), ((1, 32, 4, 16, 8), 1)])
def test_no_temporary_is_as_large_as_the_input(dtype: torch.dtype, shape: tuple[int, ...], frame_dim: int) -> None:
    x_0 = randn(0, *shape, dtype=dtype).requires_grad_()
    piece = 4 * x_0.numel() / 16  # in float32
    with LargestTemporary() as forward:
        loss = clipped_temporal_variance_loss(x_0, floor=-9.0, frame_dim=frame_dim).loss
    with LargestTemporary() as backward:
        loss.backward()
    assert forward.nbytes <= piece
    assert backward.nbytes <= max(piece, x_0.grad.nbytes)


# --- Numbers that are not finite


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, 1e30])
@pytest.mark.parametrize("floor", [0.6, -99.0])
@given(where=st.integers(0, 23))
def test_a_bad_number_shows_in_the_loss_and_is_not_clipped_away(bad: float, floor: float, where: int) -> None:
    # 1e30 is finite, its square is not: the loss would be minus infinity, far below any floor.
    x_0 = randn(0, 2, 1, 3, 2, 2, dtype=torch.float32)
    x_0.view(-1)[where] = bad
    assert not clipped_temporal_variance_loss(x_0, floor=floor).loss.isfinite()


def test_a_sample_that_stands_still_has_a_finite_loss_and_gradient() -> None:
    x_0 = torch.full((1, 2, 3, 2, 2), 3.14159)
    assert clipped_temporal_variance_loss(x_0, weight=1.0).loss.item() == pytest.approx(-math.log(1e-6), rel=1e-6)
    assert gradient_of(x_0).isfinite().all()


# --- A floor for another latent space


@given(seeds, shapes, st.floats(0, 2))
def test_derive_floor_is_the_mean_of_the_samples_own_losses_less_the_margin(
    seed: int, shape: tuple[int, ...], margin: float
) -> None:
    x_0 = randn(seed, *shape)
    own = [-math.log(reference_temporal_variance([sample]) + 1e-6) for sample in x_0.tolist()]
    expected = sum(own) / len(own) - margin
    assert derive_floor(x_0, margin=margin) == pytest.approx(expected, rel=1e-9, abs=1e-9)
    assert derive_floor(x_0.transpose(1, 2), frame_dim=1, margin=margin) == pytest.approx(expected, rel=1e-9, abs=1e-9)


def test_a_derived_floor_is_above_the_loss_of_the_batch_and_is_that_of_a_single_sample() -> None:
    samples = randn(0, 4, 2, 5, 3, 3) * torch.tensor([0.1, 0.3, 1.0, 3.0]).view(4, 1, 1, 1, 1)
    of_the_batch = clipped_temporal_variance_loss(samples).metrics["temporal_loss"].item()
    assert derive_floor(samples) > of_the_batch + 1
    for sample in samples.split(1):
        own = clipped_temporal_variance_loss(sample).metrics["temporal_loss"].item()
        assert derive_floor(sample) == pytest.approx(own)
    assert derive_floor(samples, eps=0.1) < derive_floor(samples)


def test_with_a_derived_floor_the_term_acts_until_the_student_moves_like_the_sample() -> None:
    samples = 0.3 * randn(0, 1, 2, 5, 3, 3)
    floor = derive_floor(samples)
    assert gradient_of(0.99 * samples, floor=floor).any()
    assert not gradient_of(1.01 * samples, floor=floor).any()
    # The margin is in nats of the variance: 0.9 asks for exp(0.9) times as much.
    floor = derive_floor(samples, margin=0.9)
    assert gradient_of(math.exp(0.45) * 0.99 * samples, floor=floor).any()
    assert not gradient_of(math.exp(0.45) * 1.01 * samples, floor=floor).any()


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_derive_floor_refuses_samples_that_are_not_finite(value: float) -> None:
    x_0 = randn(0, 2, 2, 3, 2, 2)
    x_0[1] = value
    with pytest.raises(ValueError, match=r"needs finite samples, got .* for sample 1\. Leave it out"):
        derive_floor(x_0)


@pytest.mark.parametrize("motion", [0.0, 1e-4])
def test_derive_floor_leaves_still_samples_out_and_needs_one_that_moves(motion: float) -> None:
    x_0 = randn(0, 3, 2, 3, 2, 2)
    x_0[1] *= motion
    assert derive_floor(x_0) == pytest.approx(derive_floor(x_0[[0, 2]]))
    with pytest.raises(ValueError, match="needs samples that move, got temporal variances of at most"):
        derive_floor(x_0[[1]])


def test_derive_floor_needs_no_gradient() -> None:
    assert isinstance(derive_floor(randn(0, 1, 2, 3, 2, 2).requires_grad_()), float)


# --- Wrong input

WRONG = {
    "integer latents": (torch.ones(1, 2, 3, 2, 2, dtype=torch.int), 2, TypeError, r"x_0.*x_0\.float\(\)"),
    "a list": ([[1.0, 2.0]], 1, TypeError, "x_0 must be a torch.Tensor, got list"),
    "a single frame": (torch.ones(1, 3, 1, 4, 4), 2, ValueError, r"at least 2 frames, got 1.*frame_dim=1"),
    "no frames": (torch.ones(1, 3, 0, 4, 4), 2, ValueError, "must not be empty"),
    "an empty batch": (torch.ones(0, 3, 2, 4, 4), 2, ValueError, "must not be empty"),
    "no batch dimension": (torch.ones(4), 0, ValueError, "batch dimension and at least one more"),
    "frames along the batch": (torch.ones(2, 3, 4), 0, ValueError, "other than the batch's, got 0"),
    "frames along the batch, from behind": (torch.ones(2, 3, 4), -3, ValueError, "other than the batch's, got -3"),
    "images and no frame_dim": (torch.ones(2, 3, 4, 4), None, ValueError, r"must be \[B, C, F, H, W\].*frame_dim"),
    "no such dimension": (torch.ones(2, 3, 4), 3, ValueError, "must name a dimension"),
}


@pytest.mark.parametrize(("x_0", "frame_dim", "error", "message"), WRONG.values(), ids=WRONG)
def test_wrong_input_is_refused_before_anything_happens(
    x_0: Any, frame_dim: int | None, error: type[Exception], message: str
) -> None:
    for function in (temporal_variance, clipped_temporal_variance_loss):
        with pytest.raises(error, match=message), NoArithmetic():
            function(x_0, frame_dim=frame_dim)


def test_samples_without_gradient_are_refused_in_training_only() -> None:
    x_0, motion = randn(0, 1, 2, 3, 2, 2), ClippedTemporalVarianceLoss()
    with pytest.raises(ValueError, match="x_0 has no gradient, so its term could change nothing"), NoArithmetic():
        motion(x_0)
    with torch.no_grad():
        expected = motion(x_0).loss
    assert motion.eval()(x_0).loss == expected


@pytest.mark.parametrize(
    ("shape", "frame_dim"),
    [((1, 16, 3, 2, 2), None), ((1, 16, 3, 2, 2), -3), ((1, 3, 16, 2, 2), 1), ((1, 16, 2, 2, 3), 4), ((1, 16, 3), 2)],
)
def test_channels_are_found_in_the_layout(shape: tuple[int, ...], frame_dim: int | None) -> None:
    x_0 = randn(0, *shape)
    expected = clipped_temporal_variance_loss(x_0, frame_dim=frame_dim).loss
    assert clipped_temporal_variance_loss(x_0, frame_dim=frame_dim, channels=16).loss == expected
    with (
        pytest.raises(ValueError, match=r"channels=8 are expected.*which has 16\. Is it in another layout"),
        NoArithmetic(),
    ):
        clipped_temporal_variance_loss(x_0, frame_dim=frame_dim, channels=8)


@pytest.mark.parametrize(("shape", "frame_dim", "right"), [((1, 3, 16, 2, 2), None, 1), ((1, 16, 3, 2, 2), 1, 2)])
def test_swapped_frames_and_channels_are_told(shape: tuple[int, ...], frame_dim: int | None, right: int) -> None:
    motion = ClippedTemporalVarianceLoss(frame_dim=frame_dim, channels=16)
    with pytest.raises(ValueError, match=f"which has 3. Frames and channels look swapped: pass frame_dim={right}"):
        motion(randn(0, *shape).requires_grad_())


def test_samples_without_channels_are_refused_where_some_are_expected() -> None:
    with pytest.raises(ValueError, match="which has no such dimension"):
        clipped_temporal_variance_loss(randn(0, 2, 3), frame_dim=1, channels=16)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"floor": math.nan}, "floor must be a finite number"),
        ({"floor": math.inf}, "floor must be a finite number"),
        ({"eps": 0.0}, "eps must be a finite number above 0"),
        ({"eps": math.inf}, "eps must be a finite number above 0"),
        ({"eps": math.nan}, "eps must be a finite number above 0"),
        ({"weight": -0.1}, "weight must be a finite number at least 0"),
        ({"weight": math.inf}, "weight must be a finite number at least 0"),
        ({"weight": math.nan}, "weight must be a finite number at least 0"),
    ],
)
def test_wrong_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ClippedTemporalVarianceLoss(**options)
    x_0 = torch.ones(1, 2, 3, 1, 1)
    with pytest.raises(ValueError, match=message), NoArithmetic():
        clipped_temporal_variance_loss(x_0, **options)


def test_metrics_are_detached() -> None:
    output = clipped_temporal_variance_loss(randn(0, 1, 2, 3, 1, 1).requires_grad_(), floor=-9.0)
    assert output.loss.requires_grad
    assert not any(value.requires_grad for value in output.metrics.values())


def test_repr_names_the_options() -> None:
    assert "weight=0.05, floor=0.6, eps=1e-06, frame_dim=None" in repr(ClippedTemporalVarianceLoss())
