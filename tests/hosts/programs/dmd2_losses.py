"""DMD2's own loss functions beside method ``dmd2``, on the same tensors, weights and draws: values and gradients.

Theirs run as they are, on small U-Nets that predict noise. Their path of noise is the method's in another scale: at
``s = t / 1000`` theirs is ``x_t / c`` with ``c^2 = (1 - s)^2 + s^2``, if their table of alphas says so.
"""

import json
import sys
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

from tiny_sd import save_tiny_sd  # declares operators that diffusers' models ask for

# isort: split
from avd_trainer.data.batches import Batch
from avd_trainer.methods.base import Cut, Loss, Setting
from avd_trainer.methods.dmd2 import DMD2, DMD2MethodConfig
from avd_trainer.models.condition import Condition

SHAPE = (4, 8, 8)
GUIDANCE = 3.0
TIMES = torch.arange(1000) / 1000
SCALE = ((1 - TIMES) ** 2 + TIMES**2).sqrt()


class Given:
    """Draws that are said beforehand, by the method's names for them."""

    def __init__(self, **drawn: tuple[list[int], Tensor]) -> None:
        self.drawn = drawn

    def uniform(self, name: str) -> Tensor:
        times, _ = self.drawn[name.removesuffix("_timesteps")]
        return torch.tensor(times) / 1000

    def normal(self, name: str, shape: Any) -> Tensor:
        return self.drawn[name.removesuffix("_noise")][1].unsqueeze(2)

    def in_order(self, *names: str) -> Any:
        """The same for theirs, which draw from PyTorch's generator one after the other."""
        times = iter([torch.tensor(self.drawn[name][0]) for name in names])
        noise = iter([self.drawn[name][1] for name in names])
        return mock.patch.multiple(torch, randint=lambda *_, **__: next(times), randn_like=lambda *_, **__: next(noise))


def their_guidance(folder: Path) -> Any:
    """Their class by its own constructor, with a classifier for this U-Net and the method's path of noise."""
    from main.sd_guidance import SDGuidance

    switches = dict.fromkeys(("gan_alone", "use_fp16", "sdxl", "gradient_checkpointing"), False)
    args = Namespace(
        model_id=folder, num_train_timesteps=1000, min_step_percent=0.02, max_step_percent=0.98,
        real_guidance_scale=GUIDANCE, fake_guidance_scale=1.0, cls_on_clean_image=True, gen_cls_loss=True,
        diffusion_gan=True, diffusion_gan_max_timestep=1000, **switches,
    )  # fmt: skip
    guidance = SDGuidance(args, SimpleNamespace(is_local_main_process=False))
    guidance.cls_pred_branch = nn.Conv2d(16, 1, 4)
    guidance.alphas_cumprod = guidance.scheduler.alphas_cumprod = ((1 - TIMES) / SCALE) ** 2
    with torch.no_grad():  # or else teacher and online model would be the same
        for parameter in guidance.fake_unet.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return guidance


def velocity_of(unet: nn.Module) -> Callable[[Tensor, Tensor, Condition], Tensor]:
    """The velocity of a U-Net that predicts noise of their x_t."""

    def velocity(x_t: Tensor, timesteps: Tensor, condition: Condition) -> Tensor:
        scaled, times = theirs(x_t, timesteps)
        noise = unet(scaled, times, condition.text).sample.unsqueeze(2)
        return (noise - x_t) / (1 - timesteps.view(-1, 1, 1, 1, 1) / 1000)

    return velocity


def theirs(x_t: Tensor, timesteps: Tensor) -> tuple[Tensor, Tensor]:
    """A noised video of one frame as their U-Net takes it."""
    times = timesteps.round().long()
    return x_t.squeeze(2) / SCALE[times].view(-1, 1, 1, 1), times


def our_method(guidance: Any, unconditional: Tensor) -> DMD2:
    """The method over the same networks."""

    def judge(x_t: Tensor, timesteps: Tensor, condition: Condition) -> Tensor:
        scaled, times = theirs(x_t, timesteps)
        features = guidance.fake_unet.forward(scaled, times, condition.text, classify_mode=True)
        return guidance.cls_pred_branch(features[-1]).flatten()

    online = velocity_of(guidance.fake_unet)
    online.module = SimpleNamespace(blocks=[None])
    config = DMD2MethodConfig(guidance_scale=GUIDANCE, score_timesteps={"shift": 1.0})
    models = {"student": None, "teacher": velocity_of(guidance.real_unet), "online": online, "discriminator": None}
    method = DMD2(config, models, Setting((4, 1, 8, 8), unconditional, torch.device("cpu")))
    method.discriminator = judge
    return method


def distance(ours: Tensor, theirs: Tensor) -> float:
    """The largest difference, as a share of the largest number; a gradient of nothing but zeros proves nothing."""
    assert theirs.abs().max() > 0
    return ((ours - theirs).abs().max() / theirs.abs().max()).item()


def main(folder: Path) -> dict[str, float]:
    save_tiny_sd(folder)
    torch.manual_seed(1)
    guidance = their_guidance(folder)
    image, clip, *noises = (torch.randn(2, *SHAPE) for _ in range(5))
    text, caption, nothing = (torch.randn(2, 3, 16) for _ in range(3))
    nothing = nothing[:1].expand(2, -1, -1)
    method = our_method(guidance, nothing[0])
    batch = {
        "prompts": Batch(None, Condition(text)),
        "clips": Batch(clip.unsqueeze(2), Condition(caption)),
    }
    found = {}

    # The generator's turn: distribution matching, and the GAN's side of the generator.
    draws = Given(score=([250, 625], noises[0]), gan_sample=([750, 125], noises[1]))
    x = image.clone().requires_grad_()
    with draws.in_order("score", "gan_sample"):
        losses, _ = guidance.generator_forward(x, text, nothing)
    config = method.config
    total = losses["loss_dm"] + config.gan_weight * losses["gen_cls_loss"]
    gradients = {name: torch.autograd.grad(loss, x, retain_graph=True)[0] for name, loss in losses.items()}

    cut = Cut(image.unsqueeze(2))
    matching = method.match(cut.output, batch, draws)
    ours = method.with_gan(Loss(matching.loss, {}, cut, samples=cut.output), batch["prompts"].condition, draws)
    found["matching"] = distance(matching.loss, losses["loss_dm"])
    found["generator's GAN"] = distance(ours.metrics["gan/loss"], losses["gen_cls_loss"])
    found["generator's total"] = distance(ours.value, total)
    (gradient,) = torch.autograd.grad(matching.loss, cut.output, retain_graph=True)
    found["gradient of matching"] = distance(gradient.squeeze(2), gradients["loss_dm"])
    (gradient,) = torch.autograd.grad(ours.value, cut.output)
    expected = gradients["loss_dm"] + config.gan_weight * gradients["gen_cls_loss"]
    found["gradient of the total"] = distance(gradient.squeeze(2), expected)

    # The guidance turn: the online model's denoising, and the GAN's side of the discriminator. Theirs denoises in the
    # space of noise, whose error is (1 - s) times the velocity's: so its samples have one time here.
    draws = Given(score=([375, 375], noises[0]), gan_clip=([500, 875], noises[1]), gan_sample=([125, 750], noises[2]))
    real = {"images": clip, "text_embedding": caption, "unet_added_conditions": None}
    with draws.in_order("score", "gan_clip", "gan_sample"):
        losses, _ = guidance.guidance_forward(image, text, nothing, real)
    weights = [*guidance.fake_unet.parameters(), *guidance.cls_pred_branch.parameters()]

    def gradient_of(loss: Tensor) -> Tensor:
        taken = torch.autograd.grad(loss, weights, retain_graph=True, allow_unused=True)
        pairs = zip(taken, weights, strict=True)  # of the layers behind the features, the GAN knows nothing
        return torch.cat([(torch.zeros_like(w) if g is None else g).flatten() for g, w in pairs])

    denoised = method.denoise(image.unsqueeze(2), Condition(text), draws)
    judged = method.tell_apart(image.unsqueeze(2), Condition(text), batch, draws)
    found["denoising"] = distance(denoised.value * (1 - 0.375) ** 2, losses["loss_fake_mean"])
    found["gradient of denoising"] = distance(
        gradient_of(denoised.value) * (1 - 0.375) ** 2, gradient_of(losses["loss_fake_mean"])
    )
    expected = config.discriminator_weight * losses["guidance_cls_loss"]
    found["discriminator's GAN"] = distance(judged.value, expected)
    found["gradient of the discriminator's GAN"] = distance(gradient_of(judged.value), gradient_of(expected))
    return found


if __name__ == "__main__":
    print(json.dumps(main(Path(sys.argv[1]))))
