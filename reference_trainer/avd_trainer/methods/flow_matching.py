"""Flow matching: trains the small teachers that the tiny presets distil, from random weights or a teacher's."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from diffusers import WanTransformer3DModel
from pydantic import Field

from avd_core import shift_timesteps
from avd_trainer.config.sections import ArchitectureConfig, OptimizerConfig
from avd_trainer.methods.base import Batches, Call, Loss, Method, MethodConfig, Setting, Turn
from avd_trainer.models.roles import Average, Built, Model, Roles
from avd_trainer.models.samplers import EulerSampler, schedule
from avd_trainer.models.transformer import build_transformer, start_from
from avd_trainer.runtime.draws import Draws

PAPER = "Lipman et al. 2023, arXiv 2210.02747; Liu et al. 2023, arXiv 2209.03003"
NEEDS = ("clips",)
FORWARDS = (3.0,)


class FlowMatchingMethodConfig(MethodConfig):
    """Training of a small teacher: a velocity for every noise level."""

    kind: Literal["flow_matching"] = "flow_matching"
    needs_teacher: ClassVar[bool] = False
    architecture: ArchitectureConfig = ArchitectureConfig()
    """The model."""
    start: str | None = None
    """Weights to start from in place of random ones, as ``teacher`` names them. An image-to-video model can start from
    a text-to-video one: further input channels start at zero."""
    optimizer: OptimizerConfig = OptimizerConfig(lr=2e-3, schedule="one_cycle")
    """What steps on it."""
    timestep_shift: float = Field(default=2.0, gt=0)
    """Shift of the uniformly drawn timesteps that the teacher is trained at; above 1, more of them at high noise."""
    caption_dropout: float = Field(default=0.1, ge=0, le=1)
    """Share of clips trained without caption, for classifier-free guidance."""
    guidance_scale: float = Field(default=3.0, ge=1)
    """Classifier-free guidance of the sample clips, standard form."""
    sampling_shift: float = Field(default=3.0, gt=0)
    """Shift of the timesteps of the sample clips' 25 Euler steps; independent of the one trained with."""
    ema_decay: float = Field(default=0.999, ge=0, lt=1)
    """Decay of the average of the weights, which is what is exported."""

    def roles(self, student_weights: str | None = None) -> Roles:
        return {
            "teacher": Built(self.optimizer, lambda *_: self._first_model()),
            "ema": Average("teacher", self.ema_decay),
        }

    def calls(self, max_steps: int) -> Sequence[Call]:
        return (Call("teacher", 1, backward=True),)

    @property
    def main_role(self) -> str:
        return "teacher"

    def _first_model(self) -> WanTransformer3DModel:
        model = build_transformer(self.architecture)
        return model if self.start is None else start_from(model, self.start)

    def transformer_config(self, teacher: str | None) -> dict[str, Any] | None:
        return dict(build_transformer(self.architecture).config)


class FlowMatching(Method):
    """Flow matching; see :class:`FlowMatchingMethodConfig`."""

    Config = FlowMatchingMethodConfig

    def __init__(self, config: Any, models: Mapping[str, Model], setting: Setting) -> None:
        super().__init__(config, models, setting)
        self.teacher = models["teacher"]
        self.sampler = EulerSampler(guidance_scale=config.guidance_scale, shift=config.sampling_shift)

    def turns(self, step: int) -> Sequence[Turn]:
        return [Turn("teacher", ("clips",))]

    def losses(self, turn: Turn, batch: Batches, draws: Draws) -> Iterator[Loss]:
        clips_BCFHW, condition = batch["clips"]
        without_B = draws.uniform("caption_dropout") < self.config.caption_dropout
        condition = condition.with_text(
            torch.where(without_B.view(-1, 1, 1), self.setting.unconditional, condition.text)
        )
        uniform_B = schedule.num_train_timesteps * draws.uniform("timesteps")
        t_B = shift_timesteps(uniform_B, self.config.timestep_shift)
        noise_BCFHW = draws.normal("noise", clips_BCFHW.shape[1:])
        velocity_BCFHW = self.teacher(schedule.add_noise(clips_BCFHW, noise_BCFHW, t_B), t_B, condition)
        yield Loss(F.mse_loss(velocity_BCFHW, schedule.velocity(clips_BCFHW, noise_BCFHW)), {})


METHOD = FlowMatching
