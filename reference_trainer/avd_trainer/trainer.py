"""Distillation of a video model into a few-step student: Algorithm 1 of the paper."""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from diffusers import WanTransformer3DModel
from torch import Tensor

from avd_core import (
    AVDObjective,
    CallbackList,
    CollapseMonitor,
    DistributionMatchingLoss,
    EMACallback,
    LatentStatistics,
    NonFiniteGuard,
    shift_timesteps,
    temporal_variance,
)
from avd_trainer.config import OptimizerConfig, TrainConfig
from avd_trainer.data.latents import CaptionedLatents, shuffled_indices
from avd_trainer.data.text import HashTextEmbedding
from avd_trainer.rollout import (
    Rollout,
    few_step_rollout,
    guided_velocity,
    predict_velocity,
    schedule,
)

logger = logging.getLogger(__name__)

Metrics = dict[str, Tensor]


class Trainer:
    """Trains a student against a teacher.

    Three models take part, all starting from the teacher's weights: the student, the frozen teacher, and the online
    model that follows the student's samples. A step is one generator update and ``online_updates`` updates of the
    online model, the first of which reuses the generator's sample.

    Args:
        config: The run.
        teacher: The teacher; it is frozen.
        clips: Real clips; their captions are the prompts.
        embed: Text embedding.

    Attributes:
        student: The student with its current weights.
        ema: Gives the averaged weights by ``ema.average_parameters()``.
        monitor: What was noticed about the run is in ``monitor.findings``.
    """

    def __init__(
        self, config: TrainConfig, teacher: WanTransformer3DModel, clips: CaptionedLatents, embed: HashTextEmbedding
    ) -> None:
        self.config = config
        self.clips = clips
        self.text = embed(clips.captions)
        self.sample_shape = clips.latents.shape[1:]
        self.few_steps = config.objective.timesteps

        self.teacher = teacher.requires_grad_(False).eval()
        self.student = copy.deepcopy(teacher).requires_grad_(True).train()
        self.online = copy.deepcopy(teacher).requires_grad_(True).train()
        self.student_optimizer = _adamw(self.student, config.student_optimizer)
        self.online_optimizer = _adamw(self.online, config.online_optimizer)

        self.matching = DistributionMatchingLoss(config.matching_weight)
        has_terms = config.objective.regression is not None or config.objective.motion is not None
        self.objective = AVDObjective(config.objective) if has_terms else None

        self.ema = EMACallback(self.student.parameters(), config.ema_decay)
        regression = config.objective.regression
        self.monitor = CollapseMonitor(
            LatentStatistics.measure(clips.latents), regression_weight=None if regression is None else regression.weight
        )
        # The guard comes first: what it skips, the others never see.
        self.callbacks = CallbackList(
            {
                "guard": NonFiniteGuard(config.max_skipped_steps, name="student"),
                "ema": self.ema,
                "monitor": self.monitor,
            }
        )
        # A step updates the online model several times; its guard stops the run after the same number of steps.
        self.online_guard = NonFiniteGuard(config.max_skipped_steps * config.online_updates, name="online model")

        # Separate streams, so that two runs with one seed see the same prompts and noise whatever terms they have.
        self._generator_draws = torch.Generator().manual_seed(3 * config.seed)
        self._online_draws = torch.Generator().manual_seed(3 * config.seed + 1)
        self._regression_draws = torch.Generator().manual_seed(3 * config.seed + 2)
        self._prompt_order = shuffled_indices(len(clips), config.batch_size, seed=2 * config.seed)
        self._clip_order = shuffled_indices(len(clips), config.batch_size, seed=2 * config.seed + 1)
        self.step = 0

    def run(self) -> Iterator[Metrics]:
        """Train until ``max_steps``; yields the metrics of each step."""
        while self.step < self.config.max_steps:
            yield self.train_step()

    def train_step(self) -> Metrics:
        """One generator update and the online model's updates that go with it.

        Returns:
            Detached tensors: ``loss``, ``gradient_norm``, ``matching/loss``, ``matching/gradient_norm``,
            ``online/loss``, ``sample/timestep``, ``sample/std``, ``sample/temporal_loss``, with a regression
            ``regression/timesteps``, and the metrics of :class:`AVDObjective`.
        """
        self.step += 1
        text = self.text[next(self._prompt_order)]
        rollout, metrics = self._update_generator(text)
        online_loss = self._update_online(rollout.x_0.detach(), text)
        for _ in range(self.config.online_updates - 1):
            text = self.text[next(self._prompt_order)]
            with torch.no_grad():
                x_0 = self._rollout(text, self._online_draws).x_0
            online_loss = self._update_online(x_0, text)
        return metrics | {"online/loss": online_loss}

    def _update_generator(self, text: Tensor) -> tuple[Rollout, Metrics]:
        rollout = self._rollout(text, self._generator_draws)
        matching_loss, matching_metrics = self._matching(rollout.x_0, text)
        metrics = {"matching/loss": matching_loss.detach()}
        metrics |= {f"matching/{name}": value for name, value in matching_metrics.items()}
        loss = matching_loss
        if self.objective is not None:
            prediction, target, timesteps = self._predict_real() if self.objective.regression else (None, None, None)
            added, added_metrics = self.objective(
                rollout.x_0,
                prediction,
                target,
                timesteps,
                matching_loss=matching_loss,
                matching_output=rollout.velocity,
            )
            loss = matching_loss + added
            metrics |= added_metrics
            if timesteps is not None:
                metrics["regression/timesteps"] = timesteps
        self.student_optimizer.zero_grad(set_to_none=True)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(self.student.parameters(), self.config.max_gradient_norm)
        metrics |= {"loss": loss.detach(), "gradient_norm": norm}
        metrics |= _describe_sample(rollout)
        seen_by_callbacks = metrics | {"x_0": rollout.x_0.detach()}
        if (
            self.objective is not None
            and (regression := self.objective.regression)
            and not regression.cache.auto_update
        ):
            regression.cache.update()
        if self.callbacks.before_step(self.step, seen_by_callbacks):
            self.student_optimizer.step()
            self.callbacks.after_step(self.step, seen_by_callbacks)
        return rollout, metrics

    def _matching(self, x_0: Tensor, text: Tensor) -> tuple[Tensor, Metrics]:
        """Eq. 4: both models' clean predictions of the noised sample."""
        with torch.no_grad():
            timesteps = self._score_timesteps(len(x_0), self._generator_draws)
            x_t = schedule.add_noise(x_0.detach(), _noise(x_0.shape, self._generator_draws), timesteps)
            real = guided_velocity(self.teacher, x_t, timesteps, text, self.config.guidance_scale)
            fake = predict_velocity(self.online, x_t, timesteps, text)
            real_x_0 = schedule.velocity_to_x_0(real, x_t, timesteps)
            fake_x_0 = schedule.velocity_to_x_0(fake, x_t, timesteps)
        loss, metrics = self.matching(x_0, real_x_0, fake_x_0)
        return loss, metrics

    def _predict_real(self) -> tuple[Tensor, Tensor, Tensor]:
        """Eq. 5: the student's velocity on real clips, its target, and the few steps at which they were noised."""
        index = next(self._clip_order)
        clips, text = self.clips.latents[index], self.text[index]
        choice = torch.randint(len(self.few_steps), (len(index),), generator=self._regression_draws)
        timesteps = torch.tensor(self.few_steps)[choice]
        noise = _noise(clips.shape, self._regression_draws)
        prediction = predict_velocity(self.student, schedule.add_noise(clips, noise, timesteps), timesteps, text)
        return prediction, schedule.velocity(clips, noise), timesteps

    def _update_online(self, x_0: Tensor, text: Tensor) -> Tensor:
        """Eq. 2: the online model learns to denoise the student's samples."""
        timesteps = self._score_timesteps(len(x_0), self._online_draws)
        noise = _noise(x_0.shape, self._online_draws)
        velocity = predict_velocity(self.online, schedule.add_noise(x_0, noise, timesteps), timesteps, text)
        loss = F.mse_loss(velocity, schedule.velocity(x_0, noise))
        self.online_optimizer.zero_grad(set_to_none=True)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(self.online.parameters(), self.config.max_gradient_norm)
        if self.online_guard.before_step(self.step, {"loss": loss.detach(), "gradient_norm": norm}):
            self.online_optimizer.step()
        return loss.detach()

    def _rollout(self, text: Tensor, draws: torch.Generator) -> Rollout:
        """Backward simulation: the student's own trajectory, up to a random one of its steps."""
        last = int(torch.randint(len(self.few_steps), (), generator=draws))
        return few_step_rollout(
            self.student, text, self.sample_shape, self.few_steps, lambda shape: _noise(shape, draws), last=last
        )

    def _score_timesteps(self, batch: int, draws: torch.Generator) -> Tensor:
        options = self.config.score_timesteps
        uniform = schedule.num_train_timesteps * torch.rand(batch, generator=draws)
        return shift_timesteps(uniform, options.shift).clamp(options.low, options.high)


def _describe_sample(rollout: Rollout) -> Metrics:
    x_0 = rollout.x_0.detach()
    return {
        "sample/timestep": torch.tensor(rollout.timestep),
        "sample/std": x_0.std(),
        "sample/temporal_loss": -temporal_variance(x_0).log(),
    }


def _noise(shape: torch.Size, draws: torch.Generator) -> Tensor:
    return torch.randn(shape, generator=draws)


def _adamw(model: torch.nn.Module, config: OptimizerConfig) -> torch.optim.AdamW:
    return torch.optim.AdamW(model.parameters(), lr=config.lr, betas=config.betas, weight_decay=config.weight_decay)
