"""DMD2's GAN by plain formulas; tests/hosts holds the same against the authors' functions."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from avd_core import distribution_matching_loss
from avd_trainer.methods.base import Batches, Turn
from avd_trainer.methods.dmd2 import DMD2
from avd_trainer.models.condition import Condition
from avd_trainer.models.features import block_outputs
from avd_trainer.models.roles import trained_parameters
from avd_trainer.runtime.draws import Draws
from avd_trainer.training.trainer import Trainer
from runs import LATENT_SHAPE, MakeTrainer

OPTIONS = {"few_steps": [1000], "online_updates": 2, "gan_weight": 0.7, "discriminator_weight": 0.3}


def of(trainer: Trainer) -> DMD2:
    assert isinstance(trainer.method, DMD2)
    return trainer.method


def draws_of(role: str) -> Draws:
    """The draws of a role's first turn in the first step."""
    return Draws((0, role, 1, 0), range(2), torch.device("cpu"))


def batches(trainer: Trainer) -> Batches:
    return {name: next(stream) for name, stream in trainer._streams().items()}


def noised(x: Tensor, draws: Draws, name: str, low: float = 0.0, high: float = 1000.0, shift: float = 1.0) -> Any:
    u = draws.uniform(f"{name}_timesteps")
    t = (1000 * shift * u / (1 + (shift - 1) * u)).clamp(low, high)
    s = (t / 1000).view(2, 1, 1, 1, 1)
    return t, s, (1 - s) * x + s * draws.normal(f"{name}_noise", LATENT_SHAPE)


def logits(trainer: Trainer, x: Tensor, condition: Condition, draws: Draws, name: str) -> Tensor:
    models: dict[str, Any] = trainer.models
    t, _, x_t = noised(x, draws, name)
    judged: Tensor = models["discriminator"](block_outputs(models["online"], x_t, t, condition, (0,)), condition)
    return judged


def test_a_students_turn_is_matching_and_its_side_of_the_gan(make_trainer: MakeTrainer) -> None:
    trainer = make_trainer("dmd2", method=OPTIONS)
    models: dict[str, Any] = trainer.models
    batch = batches(trainer)
    (loss,) = of(trainer).losses(of(trainer).turns(1)[0], batch, draws_of("student"))
    assert loss.cut is not None
    (found,) = torch.autograd.grad(loss.value, loss.cut.output, retain_graph=True)

    draws, condition = draws_of("student"), batch["prompts"].condition
    noise = draws.normal("trajectory", LATENT_SHAPE)
    velocity = models["student"](noise, torch.full((2,), 1000.0), condition).detach().requires_grad_()
    x = noise - velocity
    t, s, x_t = noised(x.detach(), draws, "score", 20, 980, shift=5)
    with torch.no_grad():
        nothing = condition.with_text(torch.zeros_like(condition.text))
        with_text, without = models["teacher"](x_t, t, condition), models["teacher"](x_t, t, nothing)
        real, online = x_t - s * (without + 5 * (with_text - without)), x_t - s * models["online"](x_t, t, condition)
    matching = distribution_matching_loss(x, real, online).loss
    gan = F.softplus(-logits(trainer, x, condition, draws, "gan_sample")).mean()
    (expected,) = torch.autograd.grad(matching + 0.7 * gan, velocity)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-8)
    torch.testing.assert_close(loss.value, matching + 0.7 * gan, rtol=1e-5, atol=1e-7)
    assert loss.metrics["matching/share"] + loss.metrics["gan/share"] == pytest.approx(1)

    loss.backward(1)
    assert any(p.grad is not None for p in trained_parameters(models["student"]).values())
    for name in ("online", "discriminator"):  # the gradient crosses them, and stays out of them
        assert all(p.grad is None for p in trained_parameters(models[name]).values())


def test_an_online_turn_is_denoising_and_the_discriminators_side_in_one_optimizer_step(
    make_trainer: MakeTrainer,
) -> None:
    trainer = make_trainer("dmd2", method=OPTIONS)
    models: dict[str, Any] = trainer.models
    batch = batches(trainer)
    turn = of(trainer).turns(1)[2]
    assert turn == Turn("online", ("prompts", "clips"), together=("discriminator",))
    found = list(of(trainer).losses(turn, batch, draws_of("online")))
    for loss in found:
        loss.backward(1)
    own = [*trained_parameters(models["online"]).values(), *trained_parameters(models["discriminator"]).values()]
    gradients = [None if p.grad is None else p.grad.full_tensor() for p in own]
    for p in own:
        p.grad = None

    draws, (condition, captions) = draws_of("online"), (batch[name].condition for name in ("prompts", "clips"))
    with torch.no_grad():
        noise = draws.normal("trajectory", LATENT_SHAPE)
        x = noise - models["student"](noise, torch.full((2,), 1000.0), condition)
    t, _, x_t = noised(x, draws, "score", 20, 980, shift=5)
    target = draws_of("online").normal("score_noise", LATENT_SHAPE) - x
    denoising = F.mse_loss(models["online"](x_t, t, condition), target)
    clip_logits = logits(trainer, batch["clips"].latents, captions, draws, "gan_clip")
    sample_logits = logits(trainer, x, condition, draws, "gan_sample")
    telling_apart = 0.3 * (F.softplus(-clip_logits).mean() + F.softplus(sample_logits).mean())
    torch.testing.assert_close([loss.value for loss in found], [denoising, telling_apart], rtol=1e-5, atol=1e-7)
    (denoising + telling_apart).backward()
    for gradient, p in zip(gradients, own, strict=True):
        assert (gradient is None) == (p.grad is None)
        if gradient is not None:
            torch.testing.assert_close(gradient, p.grad.full_tensor(), rtol=1e-4, atol=1e-8)


def test_the_first_online_turn_learns_from_the_students_sample(make_trainer: MakeTrainer) -> None:
    student, first, second = of(make_trainer("dmd2", method=OPTIONS)).turns(1)
    assert (student.data, first.data, second.data) == (("prompts",), ("clips",), ("prompts", "clips"))
