"""What a method is to the engine: who takes part, who steps when, and the losses.

A method owns what its paper's algorithm box says. The engine (:class:`avd_trainer.training.trainer.Trainer`) owns the
rest: streams of data, draws, micro-batches, backward passes, clipping, optimizers, averages, checkpoints and metrics.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple, Self

import torch
from pydantic import BaseModel
from torch import Tensor, nn

from avd_core import LossOutput, shift_timesteps
from avd_core.sampling import SamplerKind
from avd_trainer.config.sections import ScoreTimestepsConfig, Section
from avd_trainer.data.batches import Batch
from avd_trainer.data.examples import Examples
from avd_trainer.models.roles import Model, Roles
from avd_trainer.models.samplers import Sampler, schedule
from avd_trainer.models.weights import open_weights
from avd_trainer.runtime.draws import Draws

Batches = Mapping[str, Batch]
"""The batches that a turn asked for, by name: ``prompts``, ``clips``."""


class Turn(NamedTuple):
    """One optimizer step within a step of the run.

    Attributes:
        role: Whose optimizer steps.
        data: What is read for it: ``prompts``, ``clips``, both or neither.
        part: Which of the method's losses, where a role has turns of several kinds. In a step with several of them, the
            metrics of a part are called ``PART/NAME``.
        together: Further roles whose optimizers step on the same losses.
        rate: Share of the learning rate that the role's configuration says.
        watched: Whether the method also makes samples for the monitors.
    """

    role: str
    data: tuple[str, ...] = ()
    part: str = ""
    together: tuple[str, ...] = ()
    rate: float = 1.0
    watched: bool = False


class Call(NamedTuple):
    """How often a method asks a model in a step of the run.

    Attributes:
        role: Which model.
        times: Forwards for each example of the batch; the mean, if the number is drawn.
        backward: Whether a backward pass follows each forward.
        guidance_scale: Of classifier-free guidance, which needs two forwards; 1 needs one.
        beside: The role whose graph is kept in memory meanwhile; None for none.
        differentiated: Whether the forward also gives its derivative along a direction
            (:func:`.forward_derivative.directional_derivative`), which counts as one more.
    """

    role: str
    times: float
    backward: bool = False
    guidance_scale: float = 1.0
    beside: str | None = None
    differentiated: bool = False

    @property
    def forwards(self) -> float:
        """Forwards of one example, guidance and derivative counted."""
        return self.times * (1 if self.guidance_scale == 1 else 2) * (2 if self.differentiated else 1)


def forward_equivalents(calls: Sequence[Call]) -> float:
    """Forwards of one example in a step, a backward pass counted as two."""
    return sum(call.forwards * (3 if call.backward else 1) for call in calls)


class Setting(NamedTuple):
    """What a method is given when it starts.

    Attributes:
        latent_shape: ``(C, F, H, W)`` of a clip.
        unconditional: ``[L, D]`` the text embedding of the negative prompt, on ``device``; empty if no text is read.
        device: Where this process computes.
    """

    latent_shape: tuple[int, ...]
    unconditional: Tensor
    device: torch.device


class Cut:
    """A model's output, separated from its graph, so that several losses share one backward pass through the model.

    Compute losses from ``output``, which is a leaf. The engine takes their gradient at ``output`` and sends it through
    the model once. That frees the model's graph, and the losses can still be differentiated at ``output``.

    Args:
        of: What the model returned, with its graph.
    """

    def __init__(self, of: Tensor) -> None:
        self.of = of
        self.output = of.detach().requires_grad_()


class Loss(NamedTuple):
    """A loss that a method yields. The engine runs its backward pass before it asks for the next one.

    Attributes:
        value: Scalar.
        metrics: Detached tensors to log: scalars, or ``[B]``. An entry ``x_0``, finished samples ``[B, C, F, H, W]``,
            is not logged but shown to the monitor.
        cut: The :class:`Cut` from whose output ``value`` was computed; None if its graph reaches the parameters.
        samples: ``[B, C, F, H, W]``, the student's clean prediction computed from the cut's output, for terms that
            others add to the method's own; None where nothing is to be added.
    """

    value: Tensor
    metrics: Mapping[str, Tensor]
    cut: Cut | None = None
    samples: Tensor | None = None

    def backward(self, parts: int) -> None:
        """Add the gradient of ``value / parts`` to that of the parameters. Called by the engine."""
        if self.cut is None:
            (self.value / parts).backward()  # type: ignore[no-untyped-call]
        else:
            (gradient,) = torch.autograd.grad(self.value, self.cut.output, retain_graph=True)
            self.cut.of.backward(gradient / parts)  # type: ignore[no-untyped-call]


class MethodConfig(Section):
    """Options of a method; ``kind`` is the name of the method's file."""

    kind: str

    needs_teacher: ClassVar[bool] = True
    """Whether a run needs a teacher, from which its models start."""
    needs_text: ClassVar[bool] = True
    """Whether the method reads captions or prompts."""
    sampled_by: ClassVar[SamplerKind] = "re-noise"
    """How a student that the method trains goes from one of its few steps to the next."""

    def roles(self, student_weights: str | None = None) -> Roles:
        """The models that take part. A student starts from ``student_weights``, or without them from the teacher."""
        raise NotImplementedError

    def calls(self, max_steps: int) -> Sequence[Call]:
        """How often each transformer is asked in a step, for planning; a contract test counts it in a trainer.

        It is the mean over a run of ``max_steps``, where a step's turns depend on its number.
        """
        raise NotImplementedError

    def scaled(self, by: float) -> Self:
        """The same method for a run of ``by`` times as many steps: its phases keep their shares of the run."""
        return self

    def unwatched(self) -> Self:
        """The same method without samples that are made for the monitors alone."""
        return self

    @property
    def main_role(self) -> str:
        """The role whose model is the result of the run: it is averaged, sampled and exported."""
        return "student"

    @property
    def held_out_clips(self) -> int:
        """How many of the last clips of encoded data are kept from training, for :meth:`Method.evaluate`."""
        return 0

    def transformer_config(self, teacher: str | None) -> dict[str, Any] | None:
        """Keyword arguments of the transformers that take part; None if there are none."""
        if teacher is None:
            return None
        with open_weights(teacher) as weights:
            return weights.config

    def begins_later(self) -> Mapping[str, tuple[int, str]]:
        """What begins behind the first steps of a run: by option the number of these steps, and what it is."""
        return {}

    def warnings(self, max_steps: int, student_weights: str | None) -> Sequence[str]:
        """What a person should know before a run of so many steps that starts its student so; sentences."""
        return [
            f"method.{option} is {steps}, and the run has max_steps {max_steps}: {what} never comes. Choose fewer, or "
            "more max_steps."
            for option, (steps, what) in self.begins_later().items()
            if steps >= max_steps
        ]

    def check_student_weights(self) -> None:
        """Raise ValueError where the student cannot start from weights of its own."""

    def check_accumulation(self) -> None:
        """Raise ValueError if gradients cannot be accumulated over micro-batches."""

    def check_precision(self, precision: str) -> None:
        """Raise ValueError where transformers that compute in ``float32`` or ``bfloat16`` are of no use."""


class Method(ABC):
    """A training method.

    Args:
        config: Its options.
        models: By role.
        setting: What it is given besides.

    Attributes:
        state: Buffers that have to survive a restart besides models, such as those of a cache.
        sampler: How samples are made with the main role's model; None if it makes none.
    """

    Config: ClassVar[type[MethodConfig]]

    sampler: Sampler | None = None

    def __init__(self, config: Any, models: Mapping[str, Model], setting: Setting) -> None:
        self.config = config
        self.models = models
        self.setting = setting
        self.state = nn.Module()

    @abstractmethod
    def turns(self, step: int) -> Sequence[Turn]:
        """The turns of a step of the run, in order. They depend on the step only."""

    @abstractmethod
    def losses(self, turn: Turn, batch: Batches, draws: Draws) -> Iterator[Loss]:
        """The losses of one micro-batch of a turn. After each yield its backward pass is run."""

    def after(self, turn: Turn, *, accepted: bool) -> None:  # noqa: B027 - most methods have nothing to do here
        """Called after a turn. ``accepted`` says whether the optimizer has stepped, or else a value was not finite."""

    def summarise(self, metrics: dict[str, Tensor]) -> dict[str, Tensor]:
        """Metrics of a step, averaged over micro-batches and ranks, as they are logged."""
        return metrics

    def monitor_options(self) -> dict[str, Any] | None:
        """Options of the :class:`avd_core.CollapseMonitor` that watches the samples, beside which a
        :class:`avd_core.SpectralRolloffMonitor` does; None for no monitor. The trainer sets the ``grace`` of both."""
        return None

    def evaluate(self, module: nn.Module, held_out: Examples) -> BaseModel | None:
        """Measure the exported module on held-out clips when the run is done; None if nothing is measured."""
        return None


def draw_noised(x_0: Tensor, draws: Draws, name: str, options: ScoreTimestepsConfig) -> tuple[Tensor, Tensor, Tensor]:
    """Clips or samples ``[B, C, F, H, W]`` at drawn timesteps: these ``[B]``, the noised ones, and their velocity.

    What is drawn is called ``NAME_timesteps`` and ``NAME_noise``.
    """
    uniform_B = schedule.num_train_timesteps * draws.uniform(f"{name}_timesteps")
    t_B = shift_timesteps(uniform_B, options.shift).clamp(options.low, options.high)
    noise_BCFHW = draws.normal(f"{name}_noise", x_0.shape[1:])
    return t_B, schedule.add_noise(x_0, noise_BCFHW, t_B), schedule.velocity(x_0, noise_BCFHW)


def prefixed(part: str, output: LossOutput) -> LossOutput:
    """A loss whose metrics are named after it, itself among them."""
    metrics = {f"{part}/{name}": value for name, value in output.metrics.items()}
    return LossOutput(output.loss, metrics | {f"{part}/loss": output.loss.detach()})


def weighted_sum(*terms: LossOutput) -> tuple[Tensor, dict[str, Tensor]]:
    """The sum of terms that are weighted already, and all their metrics."""
    total = terms[0].loss
    for term in terms[1:]:
        total = total + term.loss
    return total, {name: value for term in terms for name, value in term.metrics.items()}
