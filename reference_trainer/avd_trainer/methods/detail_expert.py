"""The detail expert of DCM: at low noise, what the student predicts is to pass for what its target does.

Lv et al. 2025, after ``distill_dcm_wan_detail_expert.py`` of their code. Prediction and target are noised alike, and
the frozen teacher's blocks see both: a head is trained to tell them apart, and the student to be taken for the target
and to give the same features. Used by :mod:`avd_trainer.methods.dcm`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from avd_core import HingeLoss, LossOutput
from avd_trainer.config.sections import OptimizerConfig, Section
from avd_trainer.methods.base import Call
from avd_trainer.models.condition import Condition
from avd_trainer.models.discriminators.discriminator import HeadConfig, build_head
from avd_trainer.models.features import block_outputs, block_predictions
from avd_trainer.models.roles import Built, Model, Reads
from avd_trainer.models.samplers import schedule
from avd_trainer.runtime.draws import Draws


class DetailConfig(Section):
    """The detail expert's part of a run. "Code" is the authors' script for Wan2.1-1.3B."""

    after: int = Field(default=1000, ge=0)
    """Steps of the semantic part alone, which comes first. Code: 1000, then 1000 of the detail expert."""
    head: HeadConfig = HeadConfig(kind="light", optimizer=OptimizerConfig(lr=1e-5, betas=(0.0, 0.999)))
    """The discriminator's head. Its optimizer is the code's; its form and the blocks that it sees are ours."""
    adversarial_weight: float = Field(default=0.5, ge=0)
    """Weight of ``max(0, 1 - D)`` of predictions. Code: 0.1 times 5."""
    feature_weight: float = Field(default=1.0, ge=0)
    """Weight of the squared distance of what the teacher's output layers make of the blocks' outputs, of prediction and
    target. Code: 0.1 times 10."""

    @property
    def discriminator(self) -> Built:
        """The head, as a role."""
        reads = Reads("teacher", lambda layers: len(self.head.tapped(layers)), 2)
        return Built(self.head.optimizer, lambda _, architecture: build_head(self.head, architecture), reads)

    def calls(self) -> Sequence[Call]:
        """How often each transformer is asked in a step, besides for the pair."""
        return (
            Call("teacher", 1),  # features of the target, and of the prediction with the gradient that crosses them
            Call("teacher", 1, backward=True, beside="student"),
            Call("teacher", 2),  # both again, in the discriminator's turn
        )


class Judged(NamedTuple):
    """What the blocks see: ``[B, C, F, H, W]`` at ``timesteps`` ``[B]``."""

    prediction: Tensor
    target: Tensor
    timesteps: Tensor
    condition: Condition


class DetailExpert:
    """The losses of prediction and target.

    Args:
        config: Their options.
        models: By role.
        points: ``[N]`` timesteps of the detail expert's part of the trajectory, rising from its end: what it sees is
            noised from that end to one of them.
    """

    def __init__(self, config: DetailConfig, models: Mapping[str, Model], points: Tensor) -> None:
        teacher: Any = models["teacher"]
        self.config, self.head, self._points = config, models["discriminator"], points
        self._teacher, self._blocks = teacher, config.head.tapped(len(teacher.module.blocks))
        self._hinge = HingeLoss()
        self._judged: list[Judged] = []  # in the student's turn, by micro-batch

    def be_judged(self, prediction: Tensor, target: Tensor, condition: Condition, draws: Draws) -> LossOutput:
        """The student's side: ``w_adv max(0, 1 - D(prediction)) + w_feat |p(prediction) - p(target)|^2``, p being
        what the teacher would say if a tapped block were its last; the mean over blocks."""
        t_B = self._points[(draws.uniform("judged_points") * len(self._points)).long()]
        noise_BCFHW = draws.normal("judged_noise", prediction.shape[1:])
        noised = (self._noised(x, noise_BCFHW, t_B) for x in (prediction, target))
        seen = Judged(next(noised), next(noised), t_B, condition)
        self._judged.append(seen._replace(prediction=seen.prediction.detach()))
        with torch.no_grad():
            wanted = self._predictions(seen.target, seen)[1]
        features, found = self._predictions(seen.prediction, seen)
        adversarial = F.relu(1 - self.head(features, condition)).mean()
        feature = torch.stack([F.mse_loss(a, b) for a, b in zip(found, wanted, strict=True)]).mean()
        loss = self.config.adversarial_weight * adversarial + self.config.feature_weight * feature
        return LossOutput(loss, {"adversarial": adversarial.detach(), "feature": feature.detach()})

    def judge(self) -> LossOutput:
        """The discriminator's side, of what it saw last: ``max(0, 1 - D(target)) + max(0, 1 + D(prediction))``."""
        seen = self._judged.pop(0)
        with torch.no_grad():
            features = [self._features(x_t, seen) for x_t in (seen.target, seen.prediction)]
        return self._hinge.discriminator(*(self.head(each, seen.condition) for each in features))

    def _noised(self, x: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """``((1 - s) x + (s - s_end) noise) / (1 - s_end)``: from the trajectory's end, where ``x`` is, to ``s``."""
        s, s_end = schedule.sigma(timesteps, x), self._points[0] / schedule.num_train_timesteps
        return ((1 - s) * x + (s - s_end) * noise) / (1 - s_end)

    def _predictions(self, x_t: Tensor, seen: Judged) -> tuple[list[Tensor], list[Tensor]]:
        return block_predictions(self._teacher, x_t, seen.timesteps, seen.condition, self._blocks)

    def _features(self, x_t: Tensor, seen: Judged) -> list[Tensor]:
        return block_outputs(self._teacher, x_t, seen.timesteps, seen.condition, self._blocks)
