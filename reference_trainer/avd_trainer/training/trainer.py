"""Distillation of a video model into a few-step student: Algorithm 1 of the paper."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from avd_core import (
    AVDObjective,
    Callback,
    CallbackList,
    CollapseMonitor,
    DistributionMatchingLoss,
    EMACallback,
    LatentStatistics,
    NonFiniteGuard,
    shift_timesteps,
    temporal_variance,
)
from avd_trainer.config.run import TrainConfig
from avd_trainer.data.batches import Batch, CaptionedExamples, read_batches
from avd_trainer.data.order import ShuffledOrder
from avd_trainer.data.sources import TrainingData
from avd_trainer.models.roles import Models
from avd_trainer.models.samplers import Rollout, few_step_rollout, guided_velocity, schedule
from avd_trainer.models.transformer import VelocityModel
from avd_trainer.runtime.draws import SampleDraws, shared_integer
from avd_trainer.runtime.errors import UserError
from avd_trainer.runtime.ranks import Ranks
from avd_trainer.training.optimizers import (
    Metrics,
    adamw,
    detached,
    indices_by_forward,
    optimizer_tensors,
    over_forwards,
    over_ranks,
    share_batch,
    whole,
)

# Real latents that the monitor's reference is measured on.
REFERENCE_CLIPS = 64


class Trainer:
    """Trains a student against a teacher.

    Three models take part: the student, the frozen teacher, and the online model that follows the student's samples. A
    step is one generator update and ``online_updates`` updates of the online model, the first of which reuses the
    generator's samples. Everything that is drawn, data included, is a function of seed, step and a sample's place in
    the global batch, so a run does not depend on the number of ranks, and resumes from the step alone.

    Args:
        config: The run.
        models: Who takes part, sharded over ``ranks``.
        data: Clips and prompts.
        ranks: The processes of the run.

    Attributes:
        step: Steps done.
        ema: Gives the averaged weights of the student by ``ema.average_parameters()``.
        monitor: What was noticed about the run is in ``monitor.findings``; on the first rank.

    Raises:
        UserError: If the batch cannot be shared out among the ranks.
    """

    def __init__(self, config: TrainConfig, models: Models, data: TrainingData, ranks: Ranks) -> None:
        self.config = config
        self.ranks = ranks
        self.data = data
        self.student, self.teacher, self.online = models
        self.step = 0
        self.latent_shape = data.latent_shape
        self.few_steps = config.objective.timesteps
        self.unconditional = data.prompts.unconditional().to(ranks.device)
        self._rows = share_batch(config.batch_size, config.micro_batch_size, ranks)

        self.student_optimizer = adamw(self.student.named_parameters(), config.student_optimizer)
        self.online_optimizer = adamw(self.online.named_parameters(), config.online_optimizer)
        self.matching = DistributionMatchingLoss(config.matching_weight)
        self.objective = _build_objective(config, accumulating=len(self._rows) > 1).to(ranks.device)

        self.ema = EMACallback(self.student.parameters(), config.ema_decay)
        # The guard comes first: what it skips, the others never see.
        callbacks: dict[str, Callback] = {
            "guard": NonFiniteGuard(config.max_skipped_steps, name="student"),
            "ema": self.ema,
        }
        self.monitor: CollapseMonitor | None = None
        if ranks.first:
            regression = config.objective.regression
            weight = None if regression is None else regression.weight
            # Only one step in so many has finished samples to look at: as many steps are averaged over as by default.
            decay = 0.95 ** len(self.few_steps)
            self.monitor = CollapseMonitor(_measure(data.clips), regression_weight=weight, decay=decay)
            callbacks["monitor"] = self.monitor
        self.callbacks = CallbackList(callbacks)
        # A step updates the online model several times; its guard stops the run after the same number of steps.
        self.online_guard = NonFiniteGuard(config.max_skipped_steps * config.online_updates, name="online model")

    def run(self) -> Iterator[Metrics]:
        """Train from the current step to ``max_steps``; yields the metrics of each step, which are those of all ranks.

        Detached tensors: scalars ``loss``, ``gradient_norm``, ``matching/loss``, ``matching/gradient_norm``,
        ``online/loss`` and ``online/gradient_norm`` (of the last of its updates), ``sample/timestep``, ``sample/std``
        (of a sample, averaged), ``sample/variance`` (temporal) and ``sample/temporal_loss`` (minus its logarithm),
        ``skipped`` (0 or 1), with a regression ``regression/timesteps`` ``[batch_size]``, and the metrics of
        :class:`AVDObjective`.
        """
        config = self.config
        prompts = self._read(self.data.prompts, config.online_updates, seed=2 * config.seed)
        clips = self._read(self.data.clips, 1, seed=2 * config.seed + 1)
        while self.step < config.max_steps:
            yield self._train_step(prompts, clips if config.objective.regression is not None else None)

    @torch.no_grad()
    def sample(self, text: Tensor, key: str) -> Tensor:
        """Finished samples ``[B, C, F, H, W]`` of the student's current weights, from noise that ``key`` names.

        A collective: every rank gets the same samples. ``text`` is ``[B, L, D]``.
        """
        draws = SampleDraws((self.config.seed, key), range(len(text)), self.ranks.device)
        text = text.to(self.ranks.device)
        return few_step_rollout(self.student, text, self.latent_shape, self.few_steps, draws.normal).x_0

    def state_tensors(self) -> dict[str, dict[str, Tensor]]:
        """All tensors of the run by owner and name: the very ones that training changes, to be saved or filled."""
        student, online = self.student.named_parameters(), self.online.named_parameters()
        return {
            "student": detached(student),
            "online": detached(online),
            "ema": dict(zip(student, self.ema.state_dict()["shadow_params"], strict=True)),
            "student_optimizer": optimizer_tensors(student, self.student_optimizer),
            "online_optimizer": optimizer_tensors(online, self.online_optimizer),
            "objective": dict(self.objective.state_dict()),
        }

    def state(self) -> dict[str, Any]:
        """The rest of the run's state: numbers, strings and containers of them."""
        callbacks = self.callbacks.state_dict()
        callbacks["ema"] = {k: v for k, v in callbacks["ema"].items() if k != "shadow_params"}
        return {"step": self.step, "callbacks": callbacks, "online_guard": self.online_guard.state_dict()}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Restore what :meth:`state` gave; the tensors are filled in place by who read them."""
        callbacks = {name: value for name, value in state["callbacks"].items() if name in self.callbacks.callbacks}
        callbacks["ema"] = {**callbacks["ema"], "shadow_params": self.ema.state_dict()["shadow_params"]}
        self.callbacks.load_state_dict(callbacks)
        self.online_guard.load_state_dict(state["online_guard"])
        self.step = int(state["step"])

    def _read(self, data: CaptionedExamples, updates: int, seed: int) -> Iterator[Batch]:
        """This rank's part of each update's batch, forward by forward, from the current step on."""
        order = ShuffledOrder(len(data), seed)
        remaining = range(self.step * updates, self.config.max_steps * updates)
        batches = indices_by_forward(order, remaining, self.config.batch_size, self._rows)
        return read_batches(data, batches, self.data.workers)

    def _train_step(self, prompts: Iterator[Batch], clips: Iterator[Batch] | None) -> Metrics:
        self.step += 1
        texts = self._next_texts(prompts)
        samples, metrics, skipped = self._update_generator(texts, clips)
        for update in range(self.config.online_updates):
            draws = [self._draws("online", rows, update) for rows in self._rows]
            if update > 0:
                texts = self._next_texts(prompts)
                last = self._last_step("online", update)
                with torch.no_grad():
                    samples = [self._rollout(text, d, last).x_0 for text, d in zip(texts, draws, strict=True)]
            online = self._update_online(samples, texts, draws)
        metrics |= online | {"skipped": torch.tensor(float(skipped), device=self.ranks.device)}
        metrics = over_ranks(metrics, self.ranks)
        # Only now: the logarithm of a mean is not the mean of logarithms.
        return metrics | {"sample/temporal_loss": -metrics["sample/variance"].log()}

    def _update_generator(
        self, texts: Sequence[Tensor], clips: Iterator[Batch] | None
    ) -> tuple[list[Tensor], Metrics, bool]:
        """Eq. 9. The two terms on samples and the one on clips have a backward pass each: half the activations."""
        last = self._last_step("generator")
        parts: list[Metrics] = []
        samples: list[Tensor] = []
        for rows, text in zip(self._rows, texts, strict=True):
            draws = self._draws("generator", rows)
            rollout = self._rollout(text, draws, last)
            # The losses are differentiated with respect to the velocity first, and from there through the student: the
            # regression is compared with this gradient after the student's graph is gone.
            velocity = rollout.velocity.detach().requires_grad_()
            x_0 = rollout._replace(velocity=velocity).x_0
            matching_loss, metrics = self._match(x_0, text, draws)
            loss = matching_loss
            if self.objective.motion is not None:
                motion_loss, motion_metrics = self.objective.on_samples(x_0)
                loss = loss + motion_loss
                metrics |= motion_metrics
            (gradient,) = torch.autograd.grad(loss, velocity, retain_graph=True)
            rollout.velocity.backward(gradient / len(self._rows))
            total = loss.detach()
            if clips is not None:
                clip_loss, clip_metrics = self._regress(next(clips), rows, matching_loss, velocity)
                (clip_loss / len(self._rows)).backward()
                total = total + clip_loss.detach()
                metrics |= clip_metrics
            samples.append(x_0.detach())
            parts.append(metrics | {"loss": total} | _describe_sample(rollout))
        metrics = over_forwards(parts)
        metrics["gradient_norm"] = self._clip_gradients(self.student)
        stepped = self._step_student(metrics, samples if last == len(self.few_steps) - 1 else None)
        return samples, metrics, not stepped

    def _match(self, x_0: Tensor, text: Tensor, draws: SampleDraws) -> tuple[Tensor, Metrics]:
        """Eq. 4: both models' clean predictions of the noised sample."""
        with torch.no_grad():
            timesteps = self._score_timesteps(draws)
            x_t = schedule.add_noise(x_0.detach(), draws.normal(self.latent_shape), timesteps)
            scale = self.config.guidance_scale
            real = guided_velocity(self.teacher, x_t, timesteps, text, self.unconditional, scale)
            fake = self.online(x_t, timesteps, text)
            real_x_0 = schedule.velocity_to_x_0(real, x_t, timesteps)
            fake_x_0 = schedule.velocity_to_x_0(fake, x_t, timesteps)
        loss, metrics = self.matching(x_0, real_x_0, fake_x_0)
        return loss, {f"matching/{name}": value for name, value in metrics.items()} | {"matching/loss": loss.detach()}

    def _regress(
        self, batch: Batch, rows: range, matching_loss: Tensor, matching_output: Tensor
    ) -> tuple[Tensor, Metrics]:
        """Eq. 5: the student's velocity on real clips, noised to one of its few steps."""
        clips, text = batch.latents.to(self.ranks.device), batch.text.to(self.ranks.device)
        draws = self._draws("regression", rows)
        choice = (draws.uniform() * len(self.few_steps)).long()
        timesteps = torch.tensor(self.few_steps, device=self.ranks.device)[choice]
        noise = draws.normal(self.latent_shape)
        prediction = self.student(schedule.add_noise(clips, noise, timesteps), timesteps, text)
        loss, metrics = self.objective.on_clips(
            prediction,
            schedule.velocity(clips, noise),
            timesteps,
            matching_loss=matching_loss,
            matching_output=matching_output,
        )
        return loss, metrics | {"regression/timesteps": timesteps}

    def _step_student(self, metrics: Metrics, finished: Sequence[Tensor] | None) -> bool:
        """The optimizer's step, if the callbacks agree; ``finished`` are samples of the last of the few steps."""
        regression = self.objective.regression
        if regression is not None and not regression.cache.auto_update:
            regression.cache.update()
        # Examples of earlier steps are blurred by nature and would look like a collapse.
        seen = metrics if finished is None else metrics | {"x_0": torch.cat(list(finished))}
        stepped = self.callbacks.before_step(self.step, seen)
        if stepped:
            self.student_optimizer.step()
            self.callbacks.after_step(self.step, seen)
        self.student_optimizer.zero_grad(set_to_none=True)
        return stepped

    def _update_online(
        self, samples: Sequence[Tensor], texts: Sequence[Tensor], all_draws: Sequence[SampleDraws]
    ) -> Metrics:
        """Eq. 2: the online model learns to denoise the student's samples."""
        losses = []
        for x_0, text, draws in zip(samples, texts, all_draws, strict=True):
            timesteps = self._score_timesteps(draws)
            noise = draws.normal(self.latent_shape)
            velocity = self.online(schedule.add_noise(x_0, noise, timesteps), timesteps, text)
            loss = F.mse_loss(velocity, schedule.velocity(x_0, noise))
            (loss / len(samples)).backward()
            losses.append(loss.detach())
        loss = torch.stack(losses).mean()
        norm = self._clip_gradients(self.online)
        if self.online_guard.before_step(self.step, {"loss": loss, "gradient_norm": norm}):
            self.online_optimizer.step()
        self.online_optimizer.zero_grad(set_to_none=True)
        return {"online/loss": loss, "online/gradient_norm": norm}

    def _rollout(self, text: Tensor, draws: SampleDraws, last: int) -> Rollout:
        """Backward simulation: the student's own trajectory, up to one of its steps."""
        return few_step_rollout(self.student, text, self.latent_shape, self.few_steps, draws.normal, last=last)

    def _last_step(self, purpose: str, update: int = 0) -> int:
        # One for the whole batch: every rank must run the same number of forwards.
        return shared_integer((self.config.seed, purpose, self.step, update, "last"), len(self.few_steps))

    def _draws(self, purpose: str, rows: range, update: int = 0) -> SampleDraws:
        # Purposes have streams of their own: runs with one seed see the same noise whatever terms they have.
        return SampleDraws((self.config.seed, purpose, self.step, update), rows, self.ranks.device)

    def _score_timesteps(self, draws: SampleDraws) -> Tensor:
        options = self.config.score_timesteps
        uniform = schedule.num_train_timesteps * draws.uniform()
        return shift_timesteps(uniform, options.shift).clamp(options.low, options.high)

    def _next_texts(self, prompts: Iterator[Batch]) -> list[Tensor]:
        return [next(prompts).text.to(self.ranks.device) for _ in self._rows]

    def _clip_gradients(self, model: VelocityModel) -> Tensor:
        return whole(nn.utils.clip_grad_norm_(model.parameters(), self.config.max_gradient_norm))


def _build_objective(config: TrainConfig, *, accumulating: bool) -> AVDObjective:
    objective = config.objective
    if accumulating and objective.regression is not None:
        regression = objective.regression.model_copy(update={"auto_update": False})
        objective = objective.model_copy(update={"regression": regression})
    return AVDObjective(objective)


def _measure(clips: CaptionedExamples) -> LatentStatistics:
    count = min(len(clips), REFERENCE_CLIPS)
    latents = torch.stack(
        [latent for index in range(count) if (latent := clips[index * len(clips) // count].latent) is not None]
    )
    if not latents.isfinite().all() or not temporal_variance(latents) > 0:
        raise UserError(
            "The real clips are not finite or do not move: there is nothing to learn motion from. Look at them with "
            "`avd data inspect`, and make the data again."
        )
    return LatentStatistics.measure(latents)


def _describe_sample(rollout: Rollout) -> Metrics:
    x_0 = rollout.x_0.detach()
    return {
        "sample/timestep": x_0.new_tensor(rollout.timestep),
        "sample/std": x_0.flatten(1).std(dim=1).mean(),
        "sample/variance": temporal_variance(x_0),
    }
