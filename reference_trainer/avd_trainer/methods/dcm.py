"""Dual-expert consistency: layout and motion are learned at high noise, and details below it by a discriminator.

Lv et al. 2025, after their ``distill_dcm_wan_semantic_expert.py`` and ``distill_dcm_wan_detail_expert.py``, in whose
terms the losses are said. The trajectory has two phases, each with an expert. Above ``boundary`` the semantic one is a
consistency model whose predictions also have to move as their targets do. Below it, the detail expert
(:mod:`.detail_expert`) is judged beside its targets. The authors' second expert is an adapter on the first. Here one
student is both, so the semantic turns go on where the details are trained. docs/methods/dcm.md says what else differs.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar, Literal, Self

import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor

from avd_core import LossOutput
from avd_core.sampling import SamplerKind
from avd_trainer.methods.base import Batches, Call, Loss, Setting, Turn, prefixed, weighted_sum
from avd_trainer.methods.consistency import Consistency, ConsistencyConfig
from avd_trainer.methods.consistency_pair import Pair
from avd_trainer.methods.detail_expert import DetailConfig, DetailExpert
from avd_trainer.models.roles import Model, Roles, Trained
from avd_trainer.runtime.draws import Draws

PAPER = "Lv et al. 2025, arXiv 2506.03123 (DCM)"
NEEDS = ("teacher", "clips")
FORWARDS = (6.6, 18.6)
SAMPLED = "6 steps, ode"


class DCMMethodConfig(ConsistencyConfig):
    """Dual-expert consistency distillation. "Code" is the authors' scripts for Wan2.1-1.3B."""

    kind: Literal["dcm"] = "dcm"
    sampled_by: ClassVar[SamplerKind] = "ode"
    few_steps: tuple[float, ...] = Field(default=(1000.0, 992.0, 982.0, 949.0, 905.0, 810.0), min_length=1)
    """The student's timesteps, falling, in (0, 1000]. Code: these; the first three are the semantic expert's."""
    points: int = Field(default=50, ge=2)
    """Points of a trajectory. Code: 50."""
    shift: float = Field(default=17.0, gt=0)
    """Shift of these points. Code: 17."""
    lowest: float = Field(default=1.0, ge=0)
    """Where trajectories end, in timesteps before the shift. Code: 1."""
    guidance_scale: float = Field(default=6.0, ge=1)
    """Classifier-free guidance of the teacher's step, standard form. Code: w = 5, which is 6 in it."""
    boundary: int = Field(default=35, ge=1)
    """The point where the semantic expert's phase ends and the detail expert's begins. Code: 35."""
    coherence_weight: float = Field(default=1.0, ge=0)
    """Weight of the temporal coherence loss. Code: 1."""
    coherence_stride: int = Field(default=3, ge=1)
    """Latent frames between two whose difference it compares; shorter clips have no such loss. Code: 3."""
    detail: DetailConfig | None = DetailConfig()
    """The detail expert's part; None trains the semantic expert alone, and below the boundary nothing."""

    @property
    def edges(self) -> tuple[int, ...]:
        return (0, self.boundary)

    def roles(self, student_weights: str | None = None) -> Roles:
        roles = super().roles(student_weights)
        if self.detail is None:
            return roles
        student = roles["student"]
        assert isinstance(student, Trained)
        # The details' gradients are some hundred times the layout's.
        student = replace(student, own_moments=("detail",))
        return {**roles, "student": student, "discriminator": self.detail.discriminator}

    def begins_later(self) -> Mapping[str, tuple[int, str]]:
        return {} if self.detail is None else {"detail.after": (self.detail.after, "the training of details")}

    def scaled(self, by: float) -> Self:
        if self.detail is None:
            return self
        after = round(by * self.detail.after)
        return self.model_copy(update={"detail": self.detail.model_copy(update={"after": after})})

    def own_calls(self, max_steps: int) -> Sequence[Call]:
        semantic = super().own_calls(max_steps)
        if self.detail is None or self.detail.after >= max_steps:
            return semantic
        share = 1 - self.detail.after / max_steps
        details = (*self.pair_calls(), *self.detail.calls())
        return (*semantic, *(call._replace(times=share * call.times) for call in details))

    @model_validator(mode="after")
    def _check_boundary(self) -> Self:
        if not self.boundary < self.points:
            raise ValueError(f"boundary must be below points, {self.points}, got {self.boundary}")
        return self


class DCM(Consistency):
    """Dual-expert consistency distillation; see :class:`DCMMethodConfig`."""

    Config: ClassVar[type[DCMMethodConfig]] = DCMMethodConfig

    def __init__(self, config: Any, models: Mapping[str, Model], setting: Setting) -> None:
        super().__init__(config, models, setting)
        self._details: DetailExpert | None = None
        if config.detail is not None:
            self._details = DetailExpert(config.detail, models, self._trajectory[: config.boundary])

    def own_turns(self, step: int) -> Sequence[Turn]:
        semantic = super().own_turns(step)
        if self.config.detail is None or step <= self.config.detail.after:
            return semantic
        return [Turn("student", ("clips",), "detail"), Turn("discriminator"), *semantic]

    def own_losses(self, turn: Turn, batch: Batches, draws: Draws) -> Iterator[Loss]:
        if turn.part == "" and turn.role == "student":
            pair = self.pair(batch, draws, above=self.config.boundary, upto=self.config.points)
            loss, metrics = weighted_sum(
                prefixed("consistency", self.distance(pair)), prefixed("coherence", self._coherence(pair))
            )
            yield Loss(loss, metrics | self.describe(pair, turn, batch, draws), pair.cut, samples=pair.x_0)
            return
        assert self._details is not None, "only a run with a detail expert has its turns"
        if turn.role == "discriminator":
            yield Loss(*self._details.judge())
            return
        pair = self.pair(batch, draws, above=0, upto=self.config.boundary)
        judged = self._details.be_judged(pair.prediction, pair.target, batch["clips"].condition, draws)
        loss, metrics = weighted_sum(prefixed("consistency", self.distance(pair)), judged)
        # Not handed to AVD's terms: they act on what decides about motion, in the semantic turn.
        yield Loss(loss, metrics, pair.cut)

    def _coherence(self, pair: Pair) -> LossOutput:
        """Mean squared error of the differences between frames, of prediction against target."""
        stride = self.config.coherence_stride
        if pair.target.shape[2] <= stride:
            return LossOutput(0 * pair.prediction.sum(), {})
        change, wanted = (_change(x, stride) for x in (pair.prediction, pair.target))
        return LossOutput(self.config.coherence_weight * F.mse_loss(change, wanted), {})


def _change(x: Tensor, stride: int) -> Tensor:
    """``[B, C, F, H, W]`` to ``[B, C, F - stride, H, W]``: each frame less the one ``stride`` before it."""
    return x[:, :, stride:] - x[:, :, :-stride]


METHOD = DCM
