"""Naive regression: the student learns the velocity of real clips at its few steps, and nobody teaches it.

Sec. 3.2 and Table 2 of You et al. 2026, who put it beside distribution matching; alone it is what their adaptive term
is to improve upon. At pure noise its optimum is the mean of all clips that fit the caption: blurred, and still.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F

from avd_trainer.methods.base import Batches, Call, Cut, Loss, Setting, Turn
from avd_trainer.methods.distillation import describe_samples
from avd_trainer.methods.watching import Watched, WatchedConfig
from avd_trainer.models.roles import Model
from avd_trainer.models.samplers import FewStepSampler, predict, schedule
from avd_trainer.runtime.draws import Draws

PAPER = "You et al., CVPR 2026 (the regression of Table 2, alone)"
NEEDS = ("teacher", "clips")
FORWARDS = (3.4,)
SAMPLED = "4 steps, re-noise"


class RegressionMethodConfig(WatchedConfig):
    """Naive regression at the few steps."""

    kind: Literal["regression"] = "regression"

    own_losses_ask_teacher: ClassVar[bool] = False

    def own_calls(self, max_steps: int) -> Sequence[Call]:
        return (Call("student", 1, backward=True), *self.watching_calls(max_steps))


class Regression(Watched):
    """Naive regression; see :class:`RegressionMethodConfig`."""

    Config = RegressionMethodConfig

    def __init__(self, config: Any, models: Mapping[str, Model], setting: Setting) -> None:
        super().__init__(config, models, setting)
        self.sampler = FewStepSampler(config.few_steps)
        self.few_steps = torch.tensor(config.few_steps, device=setting.device)

    def own_losses(self, turn: Turn, batch: Batches, draws: Draws) -> Iterator[Loss]:
        """L = E ||v(x_t, t, c) - (noise - clip)||^2, Eq. 5 with all weights equal; t is one of the few steps."""
        clips_BCFHW, condition = batch["clips"]
        t_B = self.few_steps[(draws.uniform("timesteps") * len(self.few_steps)).long()]
        noise_BCFHW = draws.normal("noise", clips_BCFHW.shape[1:])
        x_t_BCFHW = schedule.add_noise(clips_BCFHW, noise_BCFHW, t_B)
        rollout = predict(self.student, x_t_BCFHW, t_B, condition, finished=False)
        cut = Cut(rollout.velocity)
        x_BCFHW = rollout._replace(velocity=cut.output).x_0
        loss = F.mse_loss(cut.output, schedule.velocity(clips_BCFHW, noise_BCFHW))
        metrics = describe_samples(x_BCFHW.detach(), rollout) | self.watch(turn, batch, draws)
        yield Loss(loss, metrics, cut, samples=x_BCFHW)


METHOD = Regression
