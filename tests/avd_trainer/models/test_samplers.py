from collections.abc import Sequence
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from avd_trainer.models.condition import Condition
from avd_trainer.models.samplers import (
    EulerSampler,
    FewStepSampler,
    few_step_rollout,
    guided_velocity,
    sample_teacher,
)

GRID = (1000.0, 900.0, 757.0, 522.0)
SHAPE = (2, 3, 2, 2)
TEXT = torch.randn(4, 5, 6)
TOLD = Condition(TEXT)
NOTHING = torch.zeros(5, 6)


def draw(shape: Sequence[int]) -> Tensor:
    return torch.randn(len(TEXT), *shape)


class KnownModel(torch.nn.Module):
    """Predicts the exact velocity towards ``x_0``; remembers how it was called."""

    def __init__(self, x_0: Tensor) -> None:
        super().__init__()
        self.x_0 = torch.nn.Parameter(x_0)
        self.calls: list[SimpleNamespace] = []

    def forward(self, x_t: Tensor, timesteps: Tensor, condition: Condition) -> Tensor:
        self.calls.append(SimpleNamespace(timesteps=timesteps, batch=len(x_t), gradient=torch.is_grad_enabled()))
        sigma = (timesteps / 1000).view(-1, 1, 1, 1, 1)
        return (x_t - self.x_0) / sigma


@pytest.mark.parametrize("last", range(4))
def test_the_rollout_stops_at_its_last_step_which_alone_has_gradient(last: int) -> None:
    model = KnownModel(torch.randn(SHAPE))
    rollout = few_step_rollout(model, TOLD, SHAPE, GRID, draw, last=last)
    assert [call.timesteps.tolist() for call in model.calls] == [[t] * 4 for t in GRID[: last + 1]]
    assert [call.gradient for call in model.calls] == [False] * last + [True]
    assert rollout.timesteps.tolist() == [GRID[last]] * 4
    assert rollout.finished == (last == len(GRID) - 1)
    rollout.x_0.sum().backward()
    assert model.x_0.grad is not None


def test_a_perfect_model_gives_its_x_0_at_every_step() -> None:
    model = KnownModel(torch.randn(SHAPE))
    for last in (0, 3, None):
        x_0 = few_step_rollout(model, TOLD, SHAPE, GRID, draw, last=last).x_0
        torch.testing.assert_close(x_0, model.x_0.expand(4, *SHAPE), atol=1e-5, rtol=1e-5)


def test_each_step_starts_from_the_noised_prediction_of_the_one_before() -> None:
    seen: list[Tensor] = []
    draws: list[Tensor] = []

    class Zero(torch.nn.Module):
        def forward(self, x_t: Tensor, timesteps: Tensor, condition: Condition) -> Tensor:
            seen.append(x_t)
            return torch.zeros_like(x_t)  # so that x_0 is x_t

    def remembered(shape: Sequence[int]) -> Tensor:
        draws.append(draw(shape))
        return draws[-1]

    few_step_rollout(Zero(), TOLD, SHAPE, (1000.0, 750.0), remembered)
    torch.testing.assert_close(seen[1], 0.25 * seen[0] + 0.75 * draws[1])


def test_straight_on_a_step_keeps_the_noise_and_draws_none() -> None:
    draws: list[Tensor] = []

    class Half(torch.nn.Module):
        def forward(self, x_t: Tensor, timesteps: Tensor, condition: Condition) -> Tensor:
            return 0.5 * x_t

    def remembered(shape: Sequence[int]) -> Tensor:
        draws.append(draw(shape))
        return draws[-1]

    found = FewStepSampler((1000.0, 600.0), "ode")(Half(), TOLD, NOTHING, SHAPE, remembered)
    (noise,) = draws
    torch.testing.assert_close(found, noise * (1 - 0.4 * 0.5) * (1 - 0.6 * 0.5))


def test_the_teacher_sampler_follows_the_path_to_x_0() -> None:
    model = KnownModel(torch.randn(SHAPE))
    x_0 = sample_teacher(model, TOLD, NOTHING, SHAPE, draw, steps=7, guidance_scale=3.0, shift=5.0)
    torch.testing.assert_close(x_0, model.x_0.detach().expand(4, *SHAPE), atol=1e-4, rtol=1e-4)
    assert [call.batch for call in model.calls] == [8] * 7


@pytest.mark.parametrize(("shift", "expected"), [(1.0, [1000, 750, 500, 250]), (5.0, [1000, 937.5, 2500 / 3, 625])])
def test_the_teachers_timesteps_are_evenly_spaced_and_shifted(shift: float, expected: list[float]) -> None:
    """``shift s / (1 + (shift - 1) s)`` of sigma 1, 0.75, 0.5, 0.25."""
    model = KnownModel(torch.randn(SHAPE))
    EulerSampler(guidance_scale=1.0, shift=shift, steps=4)(model, TOLD, NOTHING, SHAPE, draw)
    assert [call.timesteps[0].item() for call in model.calls] == pytest.approx(expected)


def test_guidance_is_one_forward_over_the_prompt_and_the_negative_prompt() -> None:
    class TextSum(torch.nn.Module):
        calls = 0

        def forward(self, x_t: Tensor, timesteps: Tensor, condition: Condition) -> Tensor:
            self.calls += 1
            return x_t + condition.text.sum(dim=(1, 2)).view(-1, 1, 1, 1, 1)

    model, x_t, negative = TextSum(), torch.randn(4, *SHAPE), torch.randn(5, 6)
    velocity = guided_velocity(model, x_t, torch.full((4,), 500.0), TOLD, negative, 3.0)
    guided = negative.sum() + 3.0 * (TEXT.sum(dim=(1, 2)) - negative.sum())
    torch.testing.assert_close(velocity, x_t + guided.view(-1, 1, 1, 1, 1))
    assert model.calls == 1
    assert torch.equal(guided_velocity(model, x_t, torch.full((4,), 500.0), TOLD, negative, 1.0), model(x_t, x_t, TOLD))
