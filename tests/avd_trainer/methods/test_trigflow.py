"""TrigFlow against its definition, and its tangent where the answer is known."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from avd_trainer.methods.trigflow import (
    ask,
    consistency_loss,
    consistency_tangent,
    cos_sin,
    difference,
    step_back,
    to_angles,
    to_flow,
    to_timesteps,
    trig_velocity,
)
from avd_trainer.models import forward_derivative
from avd_trainer.models.condition import Condition
from avd_trainer.models.forward_derivative import directional_derivative
from avd_trainer.models.samplers import schedule
from tensors import randn

SHAPE = (4, 2, 3, 2, 2)
ANGLES = torch.tensor([0.0, 0.4, 1.3, math.pi / 2], dtype=torch.float64)
CONDITION = Condition(torch.zeros(4, 1, 1))
SPREAD = 0.5


def gaussian(x_sigma: Tensor, timesteps: Tensor, _: Condition) -> Tensor:
    """The velocity of a flow model that knows all of clips that are Gaussian with standard deviation ``SPREAD``."""
    sigma = timesteps.view(-1, 1, 1, 1, 1) / 1000
    return (sigma - (1 - sigma) * SPREAD**2) / ((1 - sigma) ** 2 * SPREAD**2 + sigma**2) * x_sigma


def spread_at(angles: Tensor, x_t: Tensor) -> Tensor:
    """Standard deviation of such clips, noised."""
    cos, sin = cos_sin(angles, x_t)
    return (cos**2 * SPREAD**2 + sin**2).sqrt()


def consistent(x_t: Tensor, angles: Tensor) -> Tensor:
    """F of the student that predicts where the teacher's path through ``x_t`` began."""
    cos, sin = cos_sin(angles, x_t)
    return (cos * x_t - SPREAD * x_t / spread_at(angles, x_t)) / sin


def test_a_flow_models_velocity_is_converted_exactly() -> None:
    x_0, noise = randn(0, *SHAPE), randn(1, *SHAPE)
    cos, sin = cos_sin(ANGLES, x_0)
    x_t = cos * x_0 + sin * noise
    timesteps = to_timesteps(ANGLES)
    torch.testing.assert_close(to_flow(x_t, ANGLES), schedule.add_noise(x_0, noise, timesteps))
    F = trig_velocity(schedule.velocity(x_0, noise), x_t, ANGLES)
    torch.testing.assert_close(F, cos * noise - sin * x_0)
    torch.testing.assert_close(cos * x_t - sin * F, x_0)
    torch.testing.assert_close(to_angles(timesteps), ANGLES)
    assert timesteps[[0, 3]].tolist() == pytest.approx([0.0, 1000.0])


def test_a_path_of_constant_prediction_is_followed_back_exactly() -> None:
    x_0, noise = randn(0, *SHAPE), randn(1, *SHAPE)

    def at(angles: Tensor) -> tuple[Tensor, Tensor]:
        cos, sin = cos_sin(angles, x_0)
        return cos * x_0 + sin * noise, cos * noise - sin * x_0

    x_t, F = at(ANGLES)
    torch.testing.assert_close(step_back(x_t, F, 0.3), at(ANGLES - 0.3)[0])


def test_differences_and_forward_differentiation_find_the_derivative_of_a_toy() -> None:
    """Of a Gaussian: ``F = a(t) x`` with ``a = sin cos (1 - s^2) / (s^2 cos^2 + sin^2)``, ``dF/dt = a' x + a F``."""
    x_t, t = randn(0, *SHAPE), ANGLES
    F = ask(gaussian, x_t, t, CONDITION)
    a = (1 - SPREAD**2) * t.sin() * t.cos() / (SPREAD**2 * t.cos() ** 2 + t.sin() ** 2)
    torch.testing.assert_close(F, a.view(-1, 1, 1, 1, 1) * x_t)
    down = SPREAD**2 * t.cos() ** 2 + t.sin() ** 2
    slope = (1 - SPREAD**2) * ((2 * t).cos() - (2 * t).sin() ** 2 / 2 * (1 - SPREAD**2) / down) / down
    expected = slope.view(-1, 1, 1, 1, 1) * x_t + a.view(-1, 1, 1, 1, 1) * F
    exact = directional_derivative(lambda x, t: ask(gaussian, x, t, CONDITION), (x_t, t), (F, torch.ones_like(t)))
    torch.testing.assert_close(exact, expected)
    for step, error in ((1e-2, 1e-1), (1e-4, 1e-3)):
        before = ask(gaussian, step_back(x_t, F, step), t - step, CONDITION)
        assert (difference(F, before, step) - expected).norm() < error * expected.norm()


def test_a_consistent_student_has_no_tangent() -> None:
    x_t, t = randn(0, *SHAPE), torch.tensor([0.2, 0.4, 1.0, 1.5], dtype=torch.float64)
    cos, sin = cos_sin(t, x_t)
    F_teacher = ask(gaussian, x_t, t, CONDITION)
    along = (cos * sin * F_teacher, (cos * sin).flatten())

    def tangent_of(scale: float) -> Tensor:
        F_tangent = directional_derivative(lambda x, t: scale * consistent(x, t), (x_t, t), along)
        return consistency_tangent(scale * consistent(x_t, t), F_teacher, F_tangent, x_t, t, 1.0)

    assert tangent_of(1.0).abs().max() < 1e-12
    assert tangent_of(0.9).abs().max() > 1e-2
    # With r = 1 it is cos df/dt, where f = cos x_t - sin F is the prediction.
    predicted = directional_derivative(
        lambda x, t: x * cos_sin(t, x)[0] - 0.9 * consistent(x, t) * cos_sin(t, x)[1], (x_t, t), along
    )
    torch.testing.assert_close(tangent_of(0.9), predicted / sin)


@pytest.mark.parametrize("warmup", [0.0, 0.3, 1.0])
def test_the_tangent_is_that_of_its_equation(warmup: float) -> None:
    F, F_teacher, F_tangent, x_t = (randn(seed, *SHAPE) for seed in range(4))
    found = consistency_tangent(F, F_teacher, F_tangent, x_t, ANGLES, torch.tensor(warmup))
    for sample, angle in enumerate(ANGLES.tolist()):
        cos, sin = math.cos(angle), math.sin(angle)
        root = math.sqrt(1 - warmup**2 * sin**2)
        expected = -cos * root * (F - F_teacher) - (warmup * cos * sin * x_t + F_tangent)
        torch.testing.assert_close(found[sample], expected[sample])


def test_the_loss_moves_each_sample_by_a_step_of_the_same_size() -> None:
    F = randn(0, *SHAPE).requires_grad_()
    tangent = randn(1, *SHAPE) * torch.tensor([1e-3, 1.0, 10.0, 0.0]).view(-1, 1, 1, 1, 1)
    loss = consistency_loss(F, tangent)
    norms = tangent.flatten(1).norm(dim=1)
    steps = norms / (norms + 0.1)
    values = F[0].numel()
    assert loss.item() == pytest.approx(float(steps.square().sum()) / (2 * len(F) * values))
    loss.backward()  # type: ignore[no-untyped-call]
    assert F.grad is not None
    torch.testing.assert_close(len(F) * values * F.grad.flatten(1).norm(dim=1), steps)
    assert (F.grad * tangent).sum() < 0  # a step downhill goes along the tangent


def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return torch.nn.functional.scaled_dot_product_attention(query, key, value)


@pytest.mark.parametrize("options", [(torch.ones(5, 5, dtype=torch.bool),), (None, 0.0, True)], ids=["mask", "causal"])
def test_attention_that_does_not_see_all_is_not_taken_apart(options: tuple[Any, ...]) -> None:
    inputs = tuple(randn(seed, 1, 2, 5, 8, dtype=torch.float32) for seed in range(3))

    def masked(*inputs: Tensor) -> Tensor:
        return torch.nn.functional.scaled_dot_product_attention(*inputs, *options)

    with pytest.raises(ValueError, match=r"mask or is_causal.*method\.derivative=differences"):
        directional_derivative(masked, inputs, inputs)


@pytest.mark.parametrize("at_once", [2, 100])
def test_attention_is_differentiated_some_queries_at_a_time(at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(forward_derivative, "QUERIES", at_once)
    inputs = tuple(randn(seed, 1, 2, 5, 8, dtype=torch.float32) for seed in range(3))
    directions = tuple(randn(seed, 1, 2, 5, 8, dtype=torch.float32) for seed in range(3, 6))
    found = directional_derivative(attend, inputs, directions)
    step = 1e-4
    there, back = (
        attend(*(x.double() + sign * step * d.double() for x, d in zip(inputs, directions, strict=True)))
        for sign in (1, -1)
    )
    torch.testing.assert_close(found.double(), (there - back) / (2 * step), rtol=1e-4, atol=1e-5)


def test_what_does_not_depend_on_its_input_has_derivative_zero() -> None:
    x = randn(0, 2, 3)
    assert torch.equal(directional_derivative(lambda _: torch.ones_like(x), (x,), (x,)), torch.zeros_like(x))
