"""Data-forcing: what the teacher is shown, and that nothing else differs from distribution matching."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from avd_core import distribution_matching_loss
from avd_trainer.data.batches import Batch
from avd_trainer.methods.base import Batches
from avd_trainer.methods.data_forcing import DataForcing
from avd_trainer.models.condition import Condition
from avd_trainer.runtime.draws import Draws
from avd_trainer.training.trainer import Trainer
from runs import LATENT_SHAPE, MakeTrainer


def of(trainer: Trainer) -> DataForcing:
    assert isinstance(trainer.method, DataForcing)
    return trainer.method


def draws_of(count: int = 2) -> Draws:
    return Draws((0, "student", 1, 0), range(count), torch.device("cpu"))


def shown(trainer: Trainer, x: Tensor, clips: Tensor, draws: Draws) -> tuple[Tensor, Tensor, Tensor]:
    """What the teacher is shown of samples and clips, the noised samples, and the noised clips with their noise."""
    s = torch.linspace(0.1, 0.9, len(x))
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(1))
    level = s.view(-1, 1, 1, 1, 1)
    x_t, clips_t = ((1 - level) * latents + level * noise for latents in (x, clips))
    batch: Batches = {"clips": Batch(clips, Condition(torch.zeros(len(x), 1, 6)))}
    return of(trainer).show_teacher(x, x_t, 1000 * s, batch, draws), x_t, clips_t


def samples_and_clips(count: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(2)
    return torch.randn(count, *LATENT_SHAPE, generator=generator), torch.randn(
        count, *LATENT_SHAPE, generator=generator
    )


def test_half_of_the_samples_are_replaced_by_clips_at_the_same_noise(make_trainer: MakeTrainer) -> None:
    seen, x_t, clips_t = shown(make_trainer("data_forcing"), *samples_and_clips(400), draws_of(400))
    of_clips = (seen - clips_t).abs().amax((1, 2, 3, 4)) < 1e-5
    of_samples = (seen == x_t).flatten(1).all(1)
    assert bool((of_clips ^ of_samples).all())
    assert 160 < int(of_clips.sum()) < 240


def test_the_probability_is_an_option(make_trainer: MakeTrainer) -> None:
    for probability in (0.0, 1.0):
        trainer = make_trainer("data_forcing", method={"forcing": probability})
        seen, x_t, clips_t = shown(trainer, *samples_and_clips(20), draws_of(20))
        torch.testing.assert_close(seen, clips_t if probability else x_t, rtol=0, atol=1e-5)


def test_the_clips_noise_can_be_its_own(make_trainer: MakeTrainer) -> None:
    trainer = make_trainer("data_forcing", method={"forcing": 1.0, "forcing_noise": "own"})
    x, clips = samples_and_clips(2)
    seen, _, _ = shown(trainer, x, clips, draws_of())
    level = torch.tensor([0.1, 0.9]).view(2, 1, 1, 1, 1)
    torch.testing.assert_close(seen, (1 - level) * clips + level * draws_of().normal("forcing_noise", LATENT_SHAPE))


@pytest.mark.parametrize("forcing", [0.0, 1.0])
def test_the_matching_term_is_that_of_the_plain_algorithm(make_trainer: MakeTrainer, forcing: float) -> None:
    """The online model sees the sample in any case, and both predictions are compared as clean ones."""
    trainer = make_trainer("data_forcing", method={"forcing": forcing})
    models: dict[str, Any] = trainer.models
    batch = {"clips": next(trainer._streams()["clips"])}
    x = torch.randn(2, *LATENT_SHAPE, generator=torch.Generator().manual_seed(5)).requires_grad_()
    found = of(trainer).match(x, batch, draws_of())

    draws, (clips, condition) = draws_of(), batch["clips"]
    u = draws.uniform("score_timesteps")
    t = (5000 * u / (1 + 4 * u)).clamp(20, 980)
    s, noise = (t / 1000).view(2, 1, 1, 1, 1), draws.normal("score_noise", LATENT_SHAPE)
    x_t = (1 - s) * x.detach() + s * noise
    seen = (1 - s) * clips + s * noise if forcing else x_t
    with torch.no_grad():
        nothing = condition.with_text(torch.zeros_like(condition.text))
        with_text, without = models["teacher"](seen, t, condition), models["teacher"](seen, t, nothing)
        real = seen - s * (without + 5 * (with_text - without))
        online = x_t - s * models["online"](x_t, t, condition)
    expected = distribution_matching_loss(x, real, online)
    torch.testing.assert_close(found.loss, expected.loss, rtol=1e-4, atol=1e-7)
    (gradient,), (reference,) = (torch.autograd.grad(each.loss, x) for each in (found, expected))
    assert reference.abs().max() > 0
    torch.testing.assert_close(gradient, reference, rtol=1e-4, atol=1e-5 * float(reference.abs().max()))


def test_samples_are_made_for_the_captions_of_the_clips(make_trainer: MakeTrainer) -> None:
    method = of(make_trainer("data_forcing", method={"online_updates": 2}))
    assert [turn.data for turn in method.turns(1)] == [("clips",), (), ("clips",)]
