"""Naive regression."""

import torch
import torch.nn.functional as F

from avd_trainer.data.examples import condition_of
from avd_trainer.models.transformer import VelocityModel, load_transformer
from avd_trainer.runtime.draws import Draws
from runs import LATENT_SHAPE, MakeTrainer, order_of, step_gradients


def test_a_step_is_that_of_the_plain_algorithm(make_trainer: MakeTrainer) -> None:
    trainer = make_trainer("regression", max_gradient_norm=1e6)
    assert trainer.models.keys() == {"student"}  # the teacher's weights are its start, and nothing else
    student = VelocityModel(load_transformer(str(trainer.config.teacher)))
    student.module.requires_grad_(True)
    chosen = [trainer.data.clips[place] for place in order_of("clips").batch(0, 2)]
    clips = torch.stack([example.latent for example in chosen if example.latent is not None])

    draws = Draws((0, "student", 1, 0), range(2), torch.device("cpu"))
    t = torch.tensor([1000.0, 900.0, 757.0, 522.0])[(4 * draws.uniform("timesteps")).long()]
    noise, s = draws.normal("noise", LATENT_SHAPE), (t / 1000).view(2, 1, 1, 1, 1)
    velocity = student((1 - s) * clips + s * noise, t, condition_of(chosen))
    F.mse_loss(velocity, noise - clips).backward()
    expected = torch.cat([p.grad.flatten() for p in student.module.parameters() if p.grad is not None])
    torch.testing.assert_close(step_gradients(trainer), expected, rtol=1e-4, atol=1e-7)
