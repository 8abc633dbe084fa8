"""AVD's terms on top of other methods; the contract suite adds them to each."""

from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from avd_core import AVDObjective
from avd_trainer.data.batches import Batch
from avd_trainer.methods.base import Batches, Call, Cut, Loss, Setting, Turn
from avd_trainer.methods.distillation import Distillation, DistillationConfig
from avd_trainer.models.condition import Condition
from avd_trainer.models.samplers import predict
from avd_trainer.runtime.draws import Draws
from runs import MakeTrainer

SHAPE = (16, 3, 4, 4)


class OneStepConfig(DistillationConfig):
    """Of a method for these tests."""

    kind: str = "one_step"
    few_steps: tuple[float, ...] = (800.0,)

    def own_calls(self, max_steps: int) -> Sequence[Call]:
        return (Call("student", 1, backward=True),)


class OneStep(Distillation):
    """Pulls the clean prediction of pure noise to 0; the student predicts the opposite of the velocity."""

    Config = OneStepConfig

    def own_turns(self, step: int) -> Sequence[Turn]:
        return [Turn("student", ("prompts",)), Turn("online")]

    def own_losses(self, turn: Turn, batch: Batches, draws: Draws) -> Iterator[Loss]:
        noise, condition = draws.normal("noise", SHAPE), batch["prompts"].condition
        rollout = predict(self.velocity, noise, torch.full((2,), 1000.0), condition, finished=True)
        cut = Cut(rollout.velocity)
        x_0 = rollout._replace(velocity=cut.output).x_0
        yield Loss(x_0.square().mean(), {"own/loss": x_0.detach().square().mean()}, cut, samples=x_0)

    def velocity(self, x_t: Tensor, timesteps: Tensor, condition: Condition) -> Tensor:
        opposite: Tensor = self.student(x_t, timesteps, condition)
        return -opposite


def student(weight: Tensor) -> Any:
    return lambda x_t, timesteps, condition: -weight * x_t


def method_of(**avd: Any) -> OneStep:
    config = OneStepConfig.model_validate({"avd": avd} if avd else {})
    weight = torch.tensor(0.5, requires_grad=True)
    method = OneStep(config, {"student": student(weight)}, Setting(SHAPE, torch.empty(0), torch.device("cpu")))
    method.weight = weight  # type: ignore[attr-defined]
    return method


def batch() -> tuple[Batches, Draws]:
    generator = torch.Generator().manual_seed(3)
    condition = Condition(torch.zeros(2, 4, 6))
    both = {name: Batch(torch.randn(2, *SHAPE, generator=generator), condition) for name in ("prompts", "clips")}
    return both, Draws((0, "student", 1, 0), range(2), torch.device("cpu"))


def test_the_terms_are_those_of_the_objective_on_velocity_and_sample() -> None:
    method = method_of(motion={"floor": -5.0}, regression={"weight": 2.0})
    (turn, _) = method.turns(1)
    data, draws = batch()
    found = list(method.losses(turn, data, draws))
    for loss in found:
        loss.backward(1)

    weight = torch.tensor(0.5, requires_grad=True)
    assert method.config.objective is not None
    _, again = batch()
    x_1000, noise, clips = again.normal("noise", SHAPE), again.normal("regression_noise", SHAPE), data["clips"].latents
    x_0 = x_1000 - weight * x_1000
    x_t, target = 0.2 * clips + 0.8 * noise, noise - clips
    own = x_0.square().mean()
    added, metrics = AVDObjective(method.config.objective)(x_0, weight * x_t, target, torch.full((2,), 800.0))
    (own + added).backward()
    torch.testing.assert_close(method.weight.grad, weight.grad)  # type: ignore[attr-defined]
    expected = [own.item() + metrics["motion/loss"].item(), metrics["regression/loss"].item()]
    assert [loss.value.item() for loss in found] == pytest.approx(expected)
    # Sample losses are the plain error of the velocity: the student's own prediction is its opposite.
    torch.testing.assert_close(
        found[1].metrics["regression/sample_losses"],
        F.mse_loss(0.5 * x_t, target, reduction="none").flatten(1).mean(1),
    )


def test_only_the_students_turn_reads_clips_and_only_for_the_regression() -> None:
    for avd, data in (
        ({}, ("prompts",)),
        ({"regression": None}, ("prompts",)),
        ({"motion": None}, ("prompts", "clips")),
    ):
        assert [turn.data for turn in method_of(**avd).turns(1)] == [data, ()]


def test_without_terms_a_method_is_as_it_is() -> None:
    method = method_of()
    data, draws = batch()
    assert [sorted(loss.metrics) for loss in method.losses(method.turns(1)[0], data, draws)] == [["own/loss"]]
    assert not method.state.state_dict()
    assert method.monitor_options() == {}
    method.after(method.turns(1)[0], accepted=True)


def test_the_ratio_is_that_to_the_methods_own_loss() -> None:
    """And not to its sum with the motion term."""
    ratios = []
    for motion in (None, {"weight": 5.0, "floor": -5.0}):
        method = method_of(motion=motion)
        data, draws = batch()
        *_, regression = method.losses(method.turns(1)[0], data, draws)
        ratios.append(regression.metrics["balance/gradient_ratio"].item())
    assert ratios[0] == ratios[1] > 0


def test_the_ratio_is_that_to_all_of_rcms_losses(make_trainer: MakeTrainer) -> None:
    """Consistency and matching are losses of two outputs; the squares of both gradients count."""
    squares = []
    for weight in (1.0, 3.0, 5.0):
        trainer = make_trainer("rcm", max_steps=1, method={"avd": {}, "consistency_weight": weight})
        (metrics,) = trainer.run()
        squares.append(float(metrics["balance/gradient_ratio"]) ** -2)
    of_consistency = (squares[1] - squares[0]) / (9 - 1)
    assert squares[2] - squares[0] == pytest.approx((25 - 1) * of_consistency, rel=1e-3)
    assert 0 < of_consistency < 0.999 * squares[0]  # the rest is matching


def test_dmd_with_our_terms_on_top_is_avd(make_trainer: MakeTrainer) -> None:
    dmd = make_trainer("dmd", method={"avd": {}})
    avd = make_trainer("avd")
    for found, expected in zip(islice(dmd.run(), 2), islice(avd.run(), 2), strict=True):
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert dmd.method.state.state_dict().keys() == avd.method.state.state_dict().keys()
    assert dmd.config.method.calls(1) == avd.config.method.calls(1)


def test_a_teacher_that_nobody_asks_takes_no_part() -> None:
    class Alone(OneStepConfig):
        own_losses_ask_teacher = False

    assert "teacher" not in Alone().roles()
    assert "teacher" not in Alone(avd={}).roles()
    assert "teacher" in Alone(avd={"regression": {"judged": "excess"}}).roles()
