"""One step in two phases: distribution matching, then a discriminator that is the student's own average.

V-PAE, arXiv 2508.21019. Where the paper is silent, a reading of ours is an option; docs/methods/vpae.md lists them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar, Literal, Self

import torch
from pydantic import Field, model_validator

from avd_trainer.config.sections import LoRAConfig, ScoreTimestepsConfig
from avd_trainer.methods.base import Batches, Call, Loss, Setting, Turn, draw_noised
from avd_trainer.methods.consistency_pair import consistency_pair, mean_distance
from avd_trainer.methods.distillation import StudentRoleConfig, describe_samples
from avd_trainer.methods.dmd import DMD, DMDMethodConfig
from avd_trainer.methods.equilibrium import Equilibrium, EquilibriumConfig
from avd_trainer.models.roles import Model, Roles
from avd_trainer.models.samplers import Rollout, guided, predict, schedule
from avd_trainer.runtime.draws import Draws

PAPER = "AAAI 2026, arXiv 2508.21019 (V-PAE)"
NEEDS = ("teacher", "clips", "prompts")
FORWARDS = (25.0, 12.0)
SAMPLED = "1 step, re-noise"

# Of trajectories that consistency priming distils: 50 steps from noise to clip.
STRIDE = 20.0


class VPAEMethodConfig(EquilibriumConfig, DMDMethodConfig):
    """Phased adversarial equilibrium in one step: the paper's values are the defaults, where it states one."""

    kind: Literal["vpae"] = "vpae"  # type: ignore[assignment]
    few_steps: tuple[float, ...] = (1000.0,)
    """One step, from pure noise."""
    online: StudentRoleConfig = StudentRoleConfig(lora=LoRAConfig())
    """The model that follows the student's samples, where phase I matches distributions; it takes part only there.
    Paper: LoRA on the frozen teacher, zero-initialised."""
    ema_decay: float = Field(default=0.995, ge=0, lt=1)
    """Decay of the average of the student's weights: the critic of phase II, and what is exported. Paper: 0.995."""
    priming_steps: int = Field(default=500, ge=0)
    """Steps of phase I; 0 leaves it out. Paper: 500, then 1000 of phase II."""
    priming: Literal["vsd", "consistency"] = "vsd"
    """Phase I: ``vsd`` is distribution matching, as in the paper; ``consistency``, to compare with, makes clean
    predictions agree along the teacher's trajectories."""
    priming_rate: float = Field(default=0.5, gt=0)
    """Learning rate of the student in phase I, as a share of ``student.optimizer.lr``. Paper: 1e-6 of 2e-6."""
    priming_low: float = Field(default=900.0, ge=0, le=1000)
    """In phase I samples are made from clips that are noised to times between this and 1000. Paper: 900."""

    def roles(self, student_weights: str | None = None) -> Roles:
        roles = {**super().roles(student_weights), **self.equilibrium_roles()}
        if self.priming == "consistency" or not self.priming_steps:
            del roles["online"]  # nothing is matched
        return roles

    def begins_later(self) -> Mapping[str, tuple[int, str]]:
        return {"priming_steps": (self.priming_steps, "phase II, the adversarial one,")}

    def scaled(self, by: float) -> Self:
        return self.model_copy(update={"priming_steps": round(by * self.priming_steps)})

    def own_calls(self, max_steps: int) -> Sequence[Call]:
        priming = super().own_calls(max_steps)
        if self.priming == "consistency":
            target = (Call("teacher", 1, guidance_scale=self.guidance_scale), Call("ema", 1))
            priming = (*target, Call("student", 1, backward=True))
        primed = min(self.priming_steps / max_steps, 1.0)
        shares = [(call, primed) for call in priming] + [(call, 1 - primed) for call in self.equilibrium_calls()]
        return [call._replace(times=share * call.times) for call, share in shares if share * call.times]

    @property
    def asks_average(self) -> bool:
        return super().asks_average or (self.priming == "consistency" and self.priming_steps > 0)

    @model_validator(mode="after")
    def _check_parts(self) -> Self:
        if self.few_steps != (1000.0,):
            raise ValueError(f"few_steps must be [1000], one step from pure noise, got {list(self.few_steps)}")
        return self


class VPAE(DMD):
    """Phased adversarial equilibrium; see :class:`VPAEMethodConfig`."""

    Config: ClassVar[type[VPAEMethodConfig]] = VPAEMethodConfig

    made_from = "clips"

    def __init__(self, config: Any, models: Mapping[str, Model], setting: Setting) -> None:
        super().__init__(config, models, setting)
        self.equilibrium = Equilibrium(config, models, setting)

    def own_turns(self, step: int) -> Sequence[Turn]:
        if step > self.config.priming_steps:
            trained_too = ("critic",) if self.config.critic == "separate" else ()
            judging = Turn("discriminator", ("clips",), "equilibrium", trained_too)
            return [judging, Turn("student", ("prompts",), "equilibrium")]
        priming = (
            super().own_turns(step) if self.config.priming == "vsd" else [Turn("student", ("clips",), "consistency")]
        )
        return [turn._replace(rate=self.config.priming_rate) if turn.role == "student" else turn for turn in priming]

    def own_losses(self, turn: Turn, batch: Batches, draws: Draws) -> Iterator[Loss]:
        if turn.part == "equilibrium":  # phase II
            side = self.equilibrium.judge if turn.role == "discriminator" else self.equilibrium.be_judged
            yield side(batch, draws)
        elif turn.part == "consistency":
            yield self._stay_consistent(batch, draws)
        else:  # phase I: distribution matching of what `generate` makes, and the online model that follows it
            yield from super().own_losses(turn, batch, draws)

    def generate(self, batch: Batches, draws: Draws) -> Rollout:
        """One prediction from a clip at tau ~ U[0.9, 1] T; at T it is pure noise."""
        clips_BCFHW, condition = batch["clips"]
        low, high = self.config.priming_low, schedule.num_train_timesteps
        tau_B = low + (high - low) * draws.uniform("input_timesteps")
        x_tau_BCFHW = schedule.add_noise(clips_BCFHW, draws.normal("input_noise", clips_BCFHW.shape[1:]), tau_B)
        return predict(self.student, x_tau_BCFHW, tau_B, condition, finished=True)

    def _stay_consistent(self, batch: Batches, draws: Draws) -> Loss:
        """The student at t predicts what its average does a step of the teacher's trajectory further on."""
        clips_BCFHW, condition = batch["clips"]
        times = ScoreTimestepsConfig(shift=self.config.score_timesteps.shift, low=STRIDE, high=1000)
        t_B, x_t_BCFHW, _ = draw_noised(clips_BCFHW, draws, "consistency", times)
        pair = consistency_pair(
            self.student,
            self.models["ema"],
            guided(self.teacher, self.setting.unconditional, self.config.guidance_scale),
            x_t_BCFHW,
            condition,
            upper=t_B,
            lower=t_B - STRIDE,
            end=torch.zeros_like(t_B),
        )
        loss, metrics = mean_distance(pair.prediction, pair.target), describe_samples(pair.x_0.detach(), pair.rollout)
        return Loss(loss, metrics, pair.cut, pair.prediction)


METHOD = VPAE
