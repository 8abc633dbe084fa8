"""Training the small teacher that the tiny preset distils: plain flow matching on shapes."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from diffusers import WanTransformer3DModel

from avd_core import EMACallback, shift_timesteps
from avd_trainer.config.run import TeacherConfig
from avd_trainer.data.in_memory import encode_shapes
from avd_trainer.data.moving_shapes import MovingShapes
from avd_trainer.data.order import ShuffledOrder
from avd_trainer.models.codecs.block_dct import BlockDCTCodec
from avd_trainer.models.samplers import schedule
from avd_trainer.models.text_encoders.hashed import TEXT_LENGTH, HashTextEmbedding
from avd_trainer.models.transformer import VelocityModel, build_transformer


class TeacherTrainer:
    """Trains a teacher from random weights.

    Args:
        config: The run.

    Attributes:
        model: The teacher.
        ema: Gives the averaged weights by ``ema.average_parameters()``.
    """

    def __init__(self, config: TeacherConfig) -> None:
        self.config = config
        torch.manual_seed(config.seed)  # the model's initial weights
        self.model: WanTransformer3DModel = build_transformer(config.architecture)
        self.clips = encode_shapes(MovingShapes(config.data.clips, config.data.seed), BlockDCTCodec())
        self.text = HashTextEmbedding(TEXT_LENGTH, config.architecture.text_dim)(self.clips.captions)
        options = config.optimizer
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(), lr=options.lr, betas=options.betas, weight_decay=options.weight_decay
        )
        self.lr = torch.optim.lr_scheduler.OneCycleLR(self.optimizer, options.lr, total_steps=config.max_steps)
        self.ema = EMACallback(self.model.parameters(), config.ema_decay)

    def run(self) -> Iterator[float]:
        """Train; yields the loss of each step."""
        config = self.config
        draws = torch.Generator().manual_seed(config.seed)
        order = ShuffledOrder(len(self.clips), config.seed)
        predict_velocity = VelocityModel(self.model)
        for step in range(config.max_steps):
            index = order.batch(step * config.batch_size, config.batch_size)
            clips, text = self.clips.latents[index], self.text[index]
            without_caption = torch.rand(len(index), generator=draws) < config.caption_dropout
            text = text.masked_fill(without_caption.view(-1, 1, 1), 0.0)
            uniform = schedule.num_train_timesteps * torch.rand(len(index), generator=draws)
            timesteps = shift_timesteps(uniform, config.timestep_shift)
            noise = torch.randn(clips.shape, generator=draws)
            velocity = predict_velocity(schedule.add_noise(clips, noise, timesteps), timesteps, text)
            loss = F.mse_loss(velocity, schedule.velocity(clips, noise))
            self.optimizer.zero_grad(set_to_none=True)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), config.max_gradient_norm)
            self.optimizer.step()
            self.lr.step()
            self.ema.after_step(step, {})
            yield loss.item()
