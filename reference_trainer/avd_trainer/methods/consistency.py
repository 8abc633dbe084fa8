"""What LCM, PCM and DCM have in common: clips noised to points of a teacher's trajectory, each with its phase's end.

The loss is of a pair of neighbouring points (:mod:`avd_trainer.methods.consistency_pair`). The discrete form is
Algorithm 1 and Eq. 12-14 of Luo et al. 2023 (arXiv 2310.04378); PCM (arXiv 2405.18407) and DCM (arXiv 2506.03123) move
its end.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor

from avd_core import LossOutput, shift_timesteps
from avd_trainer.methods.base import Batches, Call, Loss, Setting, Turn, prefixed
from avd_trainer.methods.consistency_pair import Pair, consistency_pair, mean_distance
from avd_trainer.methods.distillation import describe_samples
from avd_trainer.methods.watching import Watched, WatchedConfig
from avd_trainer.models.roles import Average, Model, Roles
from avd_trainer.models.samplers import FewStepSampler, guided, schedule
from avd_trainer.runtime.draws import Draws

# Of 1000: how far a step may be from a point of the trajectory. Steps may be rounded; DCM's 949 is of 948.50.
NEAR = 0.51


class ConsistencyConfig(WatchedConfig):
    """Options of consistency distillation."""

    points: int = Field(default=50, ge=1)
    """Points of a trajectory above its end, evenly spaced before the shift. The student is trained at them, and the
    teacher steps from each to the one below."""
    shift: float = Field(default=3.0, gt=0)
    """Shift of these points; above 1, more of them are at high noise."""
    lowest: float = Field(default=0.0, ge=0)
    """Where trajectories end, in timesteps before the shift."""
    guidance_scale: float = Field(default=5.0, ge=1)
    """Classifier-free guidance of the teacher's step, standard form. The authors' ``w`` is one less."""
    target: Literal["average", "student"] = "student"
    """Who goes on from the lower point: the average of the student, or the student itself without gradient."""
    huber: float | None = Field(default=0.001, gt=0)
    """``c`` of the pseudo-Huber distance ``sqrt(d^2 + c^2) - c``, in units of the latents; None is the squared one."""

    @property
    def edges(self) -> tuple[int, ...]:
        """Where phases end, as points of the trajectory, rising; point 0 is its end."""
        return (0,)

    def trajectory(self) -> Tensor:
        """``[points + 1]`` float32 timesteps of the points, rising from the trajectory's end to 1000."""
        even = torch.linspace(0, schedule.num_train_timesteps, self.points + 1, dtype=torch.float64)
        even[0] = self.lowest
        return shift_timesteps(even, self.shift).float()

    def roles(self, student_weights: str | None = None) -> Roles:
        asked = self.target == "average"
        # A target has its decay from the first update on: a warm-up would keep it beside the student.
        return {**super().roles(student_weights), "ema": Average("student", self.ema_decay, asked, warmup=not asked)}

    def own_calls(self, max_steps: int) -> Sequence[Call]:
        return (*self.pair_calls(), *self.watching_calls(max_steps))

    def pair_calls(self) -> Sequence[Call]:
        """What a pair of points costs."""
        return (
            Call("teacher", 1, guidance_scale=self.guidance_scale),
            Call("ema" if self.target == "average" else "student", 1),
            Call("student", 1, backward=True),
        )

    @model_validator(mode="after")
    def _check_lowest(self) -> Self:
        first = schedule.num_train_timesteps / self.points
        if not self.lowest < first:
            raise ValueError(f"lowest must be below the first of {self.points} points, {first:g}, got {self.lowest:g}")
        return self

    def nearest_point(self, timestep: float) -> int:
        """The point of the trajectory that is nearest to a timestep, without its end, where nothing is trained."""
        return 1 + int((self.trajectory()[1:] - timestep).abs().argmin())

    def steps_off_points(self) -> str:
        """What is wrong with few steps that are no points of the trajectory; nothing if all of them are."""
        points = self.trajectory()
        nearest = [points[self.nearest_point(step)].item() for step in self.few_steps]
        if all(abs(step - point) <= NEAR for step, point in zip(self.few_steps, nearest, strict=True)):
            return ""
        return (
            f"few_steps must be points of the trajectory, where the student is trained, got {list(self.few_steps)} for "
            f"points={self.points} and shift={self.shift:g}. The nearest are {[round(point, 2) for point in nearest]}"
        )

    def warnings(self, max_steps: int, student_weights: str | None) -> Sequence[str]:
        off = self.steps_off_points()
        return [*super().warnings(max_steps, student_weights), *([f"{off}."] if off else [])]


class Consistency(Watched):
    """Consistency distillation; see :class:`ConsistencyConfig`."""

    Config: ClassVar[type[ConsistencyConfig]]

    def __init__(self, config: Any, models: Mapping[str, Model], setting: Setting) -> None:
        super().__init__(config, models, setting)
        self.sampler: FewStepSampler = FewStepSampler(config.few_steps, config.sampled_by)
        self._target = models["ema" if config.target == "average" else "student"]
        self._trajectory = config.trajectory().to(setting.device)
        self._edges = torch.tensor(config.edges, device=setting.device)

    def own_losses(self, turn: Turn, batch: Batches, draws: Draws) -> Iterator[Loss]:
        pair = self.pair(batch, draws, above=0, upto=self.config.points)
        loss, metrics = prefixed("consistency", self.distance(pair))
        yield Loss(loss, metrics | self.describe(pair, turn, batch, draws), pair.cut, samples=pair.x_0)

    def pair(self, batch: Batches, draws: Draws, *, above: int, upto: int) -> Pair:
        """Clips noised to points that are drawn from those above one and up to another, each with its phase's end."""
        clips_BCFHW, condition = batch["clips"]
        n_B = above + 1 + (draws.uniform("points") * (upto - above)).long()
        end_B = self._edges[torch.searchsorted(self._edges, n_B) - 1]  # the next edge below
        noise_BCFHW = draws.normal("points_noise", clips_BCFHW.shape[1:])
        t_B = self._trajectory[n_B]
        return consistency_pair(
            self.student,
            self._target,
            guided(self.teacher, self.setting.unconditional, self.config.guidance_scale),
            schedule.add_noise(clips_BCFHW, noise_BCFHW, t_B),
            condition,
            upper=t_B,
            lower=self._trajectory[n_B - 1],
            end=self._trajectory[end_B],
        )

    def distance(self, pair: Pair) -> LossOutput:
        """Mean distance of prediction and target."""
        return LossOutput(mean_distance(pair.prediction, pair.target, huber=self.config.huber), {})

    def describe(self, pair: Pair, turn: Turn, batch: Batches, draws: Draws) -> dict[str, Tensor]:
        """Metrics of the clean predictions, and in a watched turn samples of the clips' captions for the monitors."""
        return describe_samples(pair.x_0.detach(), pair.rollout) | self.watch(turn, batch, draws)
