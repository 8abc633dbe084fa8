"""Continuous-time consistency, alone and with distribution matching, on models that are formulas."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from avd_trainer.data.batches import Batch
from avd_trainer.methods import rcm
from avd_trainer.methods.base import Setting, Turn, forward_equivalents
from avd_trainer.methods.rcm import RCM, RCMMethodConfig
from avd_trainer.methods.scm import SCM, SCMMethodConfig
from avd_trainer.methods.trigflow import cos_sin, to_angles, trig_velocity
from avd_trainer.models.condition import Condition
from avd_trainer.models.samplers import few_step_rollout, schedule
from avd_trainer.runtime.draws import Draws
from runs import MakeTrainer, first_step
from tensors import randn

SHAPE = (2, 3, 2, 2)
SETTING = Setting(SHAPE, torch.zeros(1, 1), torch.device("cpu"))
BATCH = {"clips": Batch(randn(0, 3, *SHAPE, dtype=torch.float32), Condition(torch.ones(3, 1, 1)))}


class Formula:
    """A velocity that is smooth in sample, time and text; notes what it was asked."""

    def __init__(self, scale: float) -> None:
        self.scale = torch.nn.Parameter(torch.tensor(scale))
        self.asked: list[tuple[Tensor, Tensor, bool]] = []

    def __call__(self, x_t: Tensor, timesteps: Tensor, condition: Condition) -> Tensor:
        self.asked.append((x_t, timesteps, torch.is_grad_enabled()))
        time = (timesteps / 300).sin().view(-1, 1, 1, 1, 1)
        return self.scale * (x_t * (1 + time)).tanh() + 0.1 * condition.text.mean(dim=(1, 2)).view(-1, 1, 1, 1, 1)

    def named_parameters(self) -> dict[str, torch.nn.Parameter]:
        return {"scale": self.scale}


def draws(step: int = 0) -> Draws:
    return Draws((7, step), range(3), torch.device("cpu"))


def make(method: type, config: Any) -> Any:
    return method(config, {name: Formula(scale) for name, scale in MODELS.items()}, SETTING)


MODELS = {"student": 0.7, "teacher": 1.0, "online": 0.9}


def test_both_derivatives_lead_to_the_same_gradient() -> None:
    gradients = []
    for derivative in ("differences", "forward"):
        method = make(SCM, SCMMethodConfig(derivative=derivative, derivative_step=1e-3))
        (loss,) = method.losses(Turn("student", ("clips",)), BATCH, draws())
        loss.backward(1)
        gradients.append(method.student.scale.grad)
        assert len(method.teacher.asked) == 1
        assert len(method.teacher.asked[0][0]) == 6  # guidance
        assert [with_graph for *_, with_graph in method.student.asked] == [False, True]
    assert gradients[0] != 0
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-2, atol=0)


def test_in_bfloat16_forward_differentiation_finds_the_tangent_of_float32(make_trainer: MakeTrainer) -> None:
    found, expected = (
        first_step(make_trainer("scm", method={"derivative": "forward"}, precision=precision))
        for precision in ("bfloat16", "float32")
    )
    norms = [float(metrics["consistency/tangent_norm"]) for metrics in (found, expected)]
    assert norms[0] == pytest.approx(norms[1], rel=0.02)
    assert norms[0] != norms[1]


def test_what_is_shown_is_the_clean_prediction() -> None:
    method = make(SCM, SCMMethodConfig())
    (loss,) = method.losses(Turn("student", ("clips",)), BATCH, draws())
    x_sigma, timesteps, _ = method.student.asked[-1]
    expected = schedule.velocity_to_x_0(
        method.student(x_sigma, timesteps, BATCH["clips"].condition), x_sigma, timesteps
    )
    torch.testing.assert_close(loss.samples, expected)
    assert loss.metrics["sample/timestep"] == timesteps.mean()
    assert "x_0" not in loss.metrics  # it is no finished sample


def test_every_so_many_steps_the_student_is_sampled_for_the_monitors() -> None:
    method = make(SCM, SCMMethodConfig(watch_every=3))
    shown = []
    for step in range(1, 7):
        (turn,) = method.turns(step)
        (loss,) = method.losses(turn, BATCH, draws(step))
        shown.append("x_0" in loss.metrics)
    assert shown == [False, False, True] * 2
    assert len(method.student.asked) == 6 * 2 + 2 * 4
    assert forward_equivalents(method.config.calls(6)) == pytest.approx(6 + 4 / 3)


def test_clips_are_noised_to_angles_with_a_log_normal_tangent() -> None:
    method = make(SCM, SCMMethodConfig(log_sigma_mean=1.5, log_sigma_std=0.5))
    logs = []
    for step in range(200):
        list(method.losses(Turn("student", ("clips",)), BATCH, draws(step)))
        logs.append(to_angles(method.student.asked[-1][1]).tan().log())
    found = torch.cat(logs)
    assert found.mean().item() == pytest.approx(1.5, abs=0.08)
    assert found.std().item() == pytest.approx(0.5, abs=0.06)


def test_the_warmup_counts_the_students_turns() -> None:
    method = make(RCM, RCMMethodConfig(tangent_warmup=2))
    turn = Turn("student", ("clips",), "consistency")
    assert method.turns(1) == method.turns(2) == [turn]
    assert [each.role for each in method.turns(3)] == ["student", *["online"] * 4]
    norms = []
    for accepted in (True, False, True):  # a step that was skipped is one of the run, too
        (loss,) = method.losses(turn, BATCH, draws())
        norms.append(loss.metrics["consistency/tangent_norm"])
        method.after(turn, accepted=accepted)
        method.after(Turn("online"), accepted=True)
    assert method.state.state_dict()["consistency.steps"] == 3
    without = make(SCM, SCMMethodConfig())
    (loss,) = without.losses(turn, BATCH, draws())
    assert norms[2] == loss.metrics["consistency/tangent_norm"]
    assert len({float(norm) for norm in norms}) == 3


def test_behind_the_warmup_both_losses_train_the_student() -> None:
    method = make(RCM, RCMMethodConfig())
    turn, *online = method.turns(1)
    consistency, matching = method.losses(turn, BATCH, draws())
    assert (consistency.samples is None, matching.samples is None) == (True, False)
    alone = make(SCM, SCMMethodConfig())
    (loss,) = alone.losses(turn, BATCH, draws())
    torch.testing.assert_close(consistency.value, loss.value)
    assert "matching/loss" in matching.metrics
    for number, each in enumerate(online):
        assert len(list(method.losses(each, BATCH, draws(number)))) == 1
    assert not method._generated  # every sample was learned from


def rollouts(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Sequence[float] | Sequence[Tensor], int]]:
    seen = []

    def note(model: Any, condition: Any, shape: Any, times: Any, noise: Any, *, last: int) -> Any:
        seen.append((times, last))
        return few_step_rollout(model, condition, shape, times, noise, last=last)

    monkeypatch.setattr(rcm, "few_step_rollout", note)
    return seen


def test_samples_are_made_in_some_steps_at_falling_times_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = rollouts(monkeypatch)
    method = make(RCM, RCMMethodConfig())
    for step in range(30):
        made = method.generate(BATCH, draws(step))
        times, last = seen[-1]
        stacked = torch.stack(list(times))
        assert stacked.shape == (4, 3)
        assert (stacked[0] == 1000).all()
        assert (stacked.diff(dim=0) <= 0).all()
        assert stacked.min() >= 0
        torch.testing.assert_close(made.timesteps, stacked[last])
        assert made.finished == (last == 3)
    assert {last for _, last in seen} == {0, 1, 2, 3}
    assert not (stacked[1] == stacked[1, 0]).all()


def test_at_fixed_times_the_steps_are_the_students() -> None:
    method = make(RCM, RCMMethodConfig(simulation="fixed"))
    stopped = {float(method.generate(BATCH, draws(step)).timesteps[0]) for step in range(30)}
    assert sorted(stopped, reverse=True) == pytest.approx(method.config.few_steps)


def test_the_online_model_learns_the_velocity_of_trigflow() -> None:
    method = make(RCM, RCMMethodConfig())
    x_0, condition = BATCH["clips"]
    loss = method.denoise(x_0, condition, draws())
    x_sigma, timesteps, _ = method.online.asked[-1]
    sigma = schedule.sigma(timesteps, x_0)
    noise, t = (x_sigma - (1 - sigma) * x_0) / sigma, to_angles(timesteps)
    cos, sin = cos_sin(t, x_0)
    x_t = cos * x_0 + sin * noise
    F = trig_velocity(method.online(x_sigma, timesteps, condition), x_t, t)
    torch.testing.assert_close(loss.value, (F - (cos * noise - sin * x_0)).square().mean(), rtol=1e-4, atol=1e-5)


def test_the_few_steps_are_the_authors_angles() -> None:
    angles = to_angles(torch.tensor(SCMMethodConfig().few_steps, dtype=torch.float64))
    assert angles.tolist() == pytest.approx([math.pi / 2, 1.5, 1.4, 1.0], abs=1e-5)
    assert RCMMethodConfig().few_steps == SCMMethodConfig().few_steps


def test_what_a_step_costs_is_the_mean_over_the_run() -> None:
    config = RCMMethodConfig(tangent_warmup=500)
    assert forward_equivalents(config.calls(500)) == 6
    assert forward_equivalents(config.calls(1000)) == (6 + 33) / 2
    assert forward_equivalents(RCMMethodConfig(guidance_scale=1).calls(1)) == 31
