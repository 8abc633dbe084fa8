"""The engine: runs any method, with the same result on any number of ranks, and resumes from the step number."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from avd_core import (
    Callback,
    CollapseFinding,
    CollapseMonitor,
    EMACallback,
    LatentStatistics,
    NamedCallbacks,
    NonFiniteGuard,
    SpectralRolloffMonitor,
    SpectralStatistics,
    temporal_variance,
)
from avd_trainer.data.batches import Batch, read_batches
from avd_trainer.data.examples import CaptionedExamples
from avd_trainer.data.order import ShuffledOrder
from avd_trainer.data.sources import TrainingData
from avd_trainer.methods.base import Setting, Turn
from avd_trainer.methods.registry import load_method
from avd_trainer.models.condition import Condition
from avd_trainer.models.roles import (
    Average,
    Built,
    Trained,
    averaged_weights,
    load_models,
    own_moments,
    trained_parameters,
)
from avd_trainer.runtime.draws import Draws, seed_of
from avd_trainer.runtime.errors import UserError
from avd_trainer.runtime.ranks import Ranks
from avd_trainer.training.config import TrainConfig
from avd_trainer.training.optimizers import (
    Metrics,
    adamw,
    detached,
    gather_full,
    indices_by_micro_batch,
    mean_over_micro_batches,
    mean_over_ranks,
    optimizer_tensors,
    set_rates,
    share_batch,
)

# Real latents that the monitors' references are measured on.
REFERENCE_CLIPS = 64


class Trainer:
    """Runs a method.

    A step of the run consists of the turns that the method names. In a turn, the method computes losses for each
    micro-batch, and each loss has its backward pass at once. Then gradients are clipped and checked, and the optimizer
    of the turn's role steps. Everything that is drawn, also the data, depends only on the seed, the step and a sample's
    place in the global batch. So a run does not depend on the number of ranks, and resumes from the step number.

    Args:
        config: The run.
        data: Clips and prompts.
        ranks: The processes of the run.

    Attributes:
        step: Steps done.
        method: What is run.
        models: By role, sharded over ``ranks``.
        optimizers: By trained role and part; ``""`` is that of all parts which have none of their own.
        averages: By name, for example ``averages["ema"].average_parameters()`` gives a student's averaged weights.
        guards: By trained role and part, of turns that are not finite.
        callbacks: By trained role, all that have a state to save.
        monitor: Watches samples and weights; on the first rank, where the method has one.
        spectrum: Watches the samples' roll-off points beside it, in the same runs.

    Raises:
        UserError: If weights are missing or damaged, or the batch cannot be shared out among the ranks.
    """

    def __init__(self, config: TrainConfig, data: TrainingData, ranks: Ranks) -> None:
        self.config = config
        self.ranks = ranks
        self.data = data
        self.step = 0
        self.latent_shape = data.latent_shape
        self.micro_batches = share_batch(config.batch_size, config.micro_batch_size, ranks)

        roles = config.method.roles(config.student_weights)
        self.main_role = config.method.main_role
        self.models = load_models(
            roles,
            ranks,
            teacher=config.teacher,
            latent_shape=self.latent_shape,
            precision=config.precision,
            parallel=config.parallel,
            seed=config.seed,
        )
        self._rules = {name: role.optimizer for name, role in roles.items() if isinstance(role, Trained | Built)}
        self._parameters = {name: trained_parameters(self.models[name]) for name in self._rules}
        self.optimizers = {
            (name, part): adamw(self._parameters[name], rules)
            for name, rules in self._rules.items()
            for part in ("", *own_moments(roles[name]))
        }
        self.averages = {
            name: EMACallback(
                list(self._parameters[role.of].values()),
                role.decay,
                warmup=role.warmup,
                held_in=averaged_weights(self.models[name]) if role.asked else None,
            )
            for name, role in roles.items()
            if isinstance(role, Average)
        }
        unconditional = data.prompts.unconditional() if config.method.needs_text else torch.empty(0)
        setting = Setting(self.latent_shape, unconditional.to(ranks.device), ranks.device)
        self.method = load_method(config.method.kind)(config.method, self.models, setting)

        self.guards = self._guards()
        self._monitors: dict[str, Callback] = {}
        self.monitor: CollapseMonitor | None = None
        options = self.method.monitor_options()
        self.spectrum: SpectralRolloffMonitor | None = None
        if ranks.first and options is not None:
            latents = _reference_latents(data.clips)
            judging = {"grace": config.grace, "patience": config.patience, **options}
            self.monitor = CollapseMonitor(LatentStatistics.measure(latents), **judging)
            self.spectrum = SpectralRolloffMonitor(SpectralStatistics.measure(latents), grace=config.grace)
            self._monitors = {"monitor": self.monitor, "spectrum": self.spectrum}
        callbacks: dict[str, dict[str, Callback]] = {name: {**self._averages_of(name)} for name in self._rules}
        for (role_name, part), guard in self.guards.items():
            callbacks[role_name][f"{part}_guard" if part else "guard"] = guard
        callbacks[self.main_role] |= self._monitors
        self.callbacks = {name: NamedCallbacks(named) for name, named in callbacks.items()}

    @property
    def findings(self) -> list[CollapseFinding]:
        """What the monitors noticed about the run, oldest first."""
        monitors = [monitor for monitor in (self.monitor, self.spectrum) if monitor is not None]
        return sorted((finding for each in monitors for finding in each.findings), key=lambda finding: finding.step)

    def run(self) -> Iterator[Metrics]:
        """Train from the current step to ``max_steps``; yields the metrics of each step, which are those of all ranks.

        They are detached tensors. The main role has the scalars ``loss``, ``gradient_norm`` and ``skipped``, which is 1
        if any of its turns was skipped and else 0, and the metrics of the method's losses, scalars or ``[batch_size]``.
        Those of another role are called ``ROLE/NAME``. Where a role has turns of several parts in a step, those of each
        part that has a name are called ``PART/NAME``. Of several turns of one part the last one's are given.
        """
        return self._steps(self._streams())

    @torch.no_grad()
    def sample(self, condition: Condition, key: str) -> Tensor:
        """Finished samples ``[B, C, F, H, W]`` of the main role's current weights, from noise that ``key`` names.

        A collective: every rank gets the same samples.
        """
        assert self.method.sampler is not None
        draws = Draws((self.config.seed, key), range(len(condition)), self.ranks.device)
        return self.method.sampler(
            self.models[self.main_role],
            condition.to(self.ranks.device),
            self.method.setting.unconditional,
            self.latent_shape,
            draws.named("trajectory"),
        )

    def state_tensors(self) -> dict[str, dict[str, Tensor]]:
        """All tensors of the run by owner and name. They are no copies: save them, or fill them in place."""
        tensors = {name: detached(parameters) for name, parameters in self._parameters.items()}
        for (name, part), optimizer in self.optimizers.items():
            owner = f"{name}_{part}_optimizer" if part else f"{name}_optimizer"
            tensors[owner] = optimizer_tensors(self._parameters[name], optimizer)
        for name, role in self.config.method.roles().items():
            if isinstance(role, Average):
                shadows = self.averages[name].state_dict()["shadow_params"]
                tensors[name] = dict(zip(self._parameters[role.of], shadows, strict=True))
        return tensors | {"method": dict(self.method.state.state_dict())}

    def state(self) -> dict[str, Any]:
        """The rest of the run's state: numbers, strings, and containers of these."""
        callbacks = {name: own.state_dict() for name, own in self.callbacks.items()}
        for own in callbacks.values():
            for average in own.keys() & self.averages.keys():
                own[average] = {k: v for k, v in own[average].items() if k != "shadow_params"}
        return {"step": self.step, "callbacks": callbacks}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Restore what :meth:`state` gave. Tensors are restored by filling :meth:`state_tensors`."""
        for name, own in self.callbacks.items():
            saved = {key: value for key, value in state["callbacks"][name].items() if key in own.callbacks}
            for average in saved.keys() & self.averages.keys():
                shadows = self.averages[average].state_dict()["shadow_params"]
                saved[average] = {**saved[average], "shadow_params": shadows}
            # What came to be since the checkpoint was written starts anew.
            own.load_state_dict(own.state_dict() | saved)
        self.step = int(state["step"])

    def _steps(self, streams: Mapping[str, Iterator[Batch]]) -> Iterator[Metrics]:
        while self.step < self.config.max_steps:
            yield self._train_step(streams)

    def _train_step(self, streams: Mapping[str, Iterator[Batch]]) -> Metrics:
        self.step += 1
        metrics: Metrics = {}
        turns = self.method.turns(self.step)
        for place in range(len(turns)):
            metrics |= self._take_turn(turns, place, streams, metrics)
        return self.method.summarise(mean_over_ranks(metrics, self.ranks))

    def _take_turn(
        self, turns: Sequence[Turn], place: int, streams: Mapping[str, Iterator[Batch]], before: Mapping[str, Tensor]
    ) -> Metrics:
        """One optimizer step: the one in this place of the step's turns.

        The metrics of turns ``before`` this one, as they are logged, are shown to its callbacks too.
        """
        turn = turns[place]
        number = sum(other.role == turn.role for other in turns[:place])
        last = all(other.role != turn.role for other in turns[place + 1 :])
        metrics = mean_over_micro_batches(
            [self._accumulate(turn, number, places, streams) for places in self.micro_batches]
        )
        stepping = (turn.role, *turn.together)
        metrics["gradient_norm"] = self._clip_gradients(stepping)
        accepted = self.guards[turn.role, turn.part].before_step(self.step, metrics)
        for role in stepping:
            optimizer = self.optimizers.get((role, turn.part), self.optimizers[role, ""])
            if accepted:
                set_rates(optimizer, self._rules[role], self.step, self.config.max_steps, turn.rate)
                optimizer.step()
                for average in self._averages_of(role).values():
                    average.after_step(self.step, metrics)
            optimizer.zero_grad(set_to_none=True)
        if accepted and last and turn.role == self.main_role:  # monitors count steps of the run
            for monitor in self._monitors.values():
                monitor.after_step(self.step, {**before, **metrics})
        self.method.after(turn, accepted=accepted)
        metrics.pop("x_0", None)
        parts = {other.part for other in turns if other.role == turn.role}
        if turn.part and len(parts) > 1:
            metrics = {f"{turn.part}/{name}": value for name, value in metrics.items()}
        if turn.role != self.main_role:
            return {f"{turn.role}/{name}": value for name, value in metrics.items()}
        skipped = torch.tensor(float(not accepted), device=self.ranks.device)
        return metrics | {"skipped": torch.maximum(skipped, before.get("skipped", skipped))}

    def _accumulate(self, turn: Turn, number: int, places: range, streams: Mapping[str, Iterator[Batch]]) -> Metrics:
        """The losses of one micro-batch, each with its backward pass; ``places`` are those of its samples."""
        batch = {name: next(streams[name]).to(self.ranks.device) for name in turn.data}
        draws = Draws((self.config.seed, turn.role, self.step, number), places, self.ranks.device)
        metrics: Metrics = {}
        values = []
        for loss in self.method.losses(turn, batch, draws):
            loss.backward(len(self.micro_batches))
            values.append(loss.value.detach())
            taken = metrics.keys() & loss.metrics.keys() | loss.metrics.keys() & {"loss", "gradient_norm", "skipped"}
            assert not taken, f"method {self.config.method.kind} gives metrics twice, or the engine's: {taken}"
            metrics |= loss.metrics
        return {"loss": torch.stack(values).sum(), **metrics}

    def _streams(self) -> dict[str, Iterator[Batch]]:
        """This rank's part of what turns read, by name: micro-batch by micro-batch, from the current step on."""
        steps = range(1, self.config.max_steps + 1)
        reads = [Counter(name for turn in self.method.turns(step) for name in turn.data) for step in steps]
        names = sorted(set().union(*reads))
        return {name: self._read(name, [counts[name] for counts in reads]) for name in names}

    def _read(self, name: str, reads: Sequence[int]) -> Iterator[Batch]:
        """One kind of data; ``reads`` are the batches of each step of the run."""
        data: CaptionedExamples = getattr(self.data, name)
        order = ShuffledOrder(len(data), seed_of(self.config.seed, "order", name))
        updates = range(sum(reads[: self.step]), sum(reads))
        batches = indices_by_micro_batch(order, updates, self.config.batch_size, self.micro_batches)
        return read_batches(data, batches, self.data.workers)

    def _clip_gradients(self, roles: Sequence[str]) -> Tensor:
        parameters = [parameter for role in roles for parameter in self._parameters[role].values()]
        if self.config.max_gradient_norm is not None:
            return gather_full(nn.utils.clip_grad_norm_(parameters, self.config.max_gradient_norm))
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        return gather_full(nn.utils.get_total_norm(gradients))

    def _averages_of(self, role: str) -> dict[str, EMACallback]:
        roles = self.config.method.roles().items()
        return {name: self.averages[name] for name, each in roles if isinstance(each, Average) and each.of == role}

    def _guards(self) -> dict[tuple[str, str], NonFiniteGuard]:
        # One for each part: turns of another part that are finite say nothing of it. There may be several turns of a
        # part in a step; its guard stops the run after the same number of steps.
        turns: Counter[tuple[str, str]] = Counter()
        for step in range(1, self.config.max_steps + 1):
            turns |= Counter((turn.role, turn.part) for turn in self.method.turns(step))  # the maximum of each
        most = self.config.max_skipped_steps
        return {(role, part): NonFiniteGuard(most * n, name=_spoken(role, part)) for (role, part), n in turns.items()}


def _spoken(role: str, part: str) -> str:
    name = "online model" if role == "online" else role
    return f"{name}'s part {part}" if part else name


def _reference_latents(clips: CaptionedExamples) -> Tensor:
    """``[N, C, F, H, W]`` of clips from all over the data."""
    count = min(len(clips), REFERENCE_CLIPS)
    latents = torch.stack(
        [latent for index in range(count) if (latent := clips[index * len(clips) // count].latent) is not None]
    )
    if not latents.isfinite().all() or not temporal_variance(latents) > 0:
        raise UserError(
            "The real clips are not finite or do not move: there is nothing to learn motion from. Look at them with "
            "`avd data inspect`, and make the data again."
        )
    return latents
