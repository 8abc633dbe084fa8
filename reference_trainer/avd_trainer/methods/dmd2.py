"""DMD2: distribution matching, and a GAN whose discriminator is a head on the online model.

Yin et al. 2024, arXiv 2405.14867, Sec. 4.3. The matching term and the samples (Sec. 4.5) are those of method dmd.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar, Literal

from pydantic import Field
from torch import Tensor

from avd_core import LogisticLoss, gradient_shares
from avd_trainer.config.sections import OptimizerConfig, ScoreTimestepsConfig
from avd_trainer.methods.base import Batches, Call, Loss, Setting, Turn, draw_noised, prefixed
from avd_trainer.methods.dmd import DMD, DMDMethodConfig
from avd_trainer.models.condition import Condition
from avd_trainer.models.discriminators.discriminator import Discriminator, HeadConfig, build_head
from avd_trainer.models.roles import Built, Model, Reads, Roles
from avd_trainer.runtime.draws import Draws

PAPER = "Yin et al. 2024, arXiv 2405.14867 (DMD2), Sec. 4.3"
NEEDS = ("teacher", "clips", "prompts")
FORWARDS = (65.5,)
SAMPLED = "4 steps, re-noise"


class DMD2MethodConfig(DMDMethodConfig):
    """DMD2 with its GAN. The GAN's values are those of the released code for four steps, all else is as in ``dmd``."""

    kind: Literal["dmd2"] = "dmd2"  # type: ignore[assignment]
    head: HeadConfig = HeadConfig(kind="light", optimizer=OptimizerConfig(lr=2e-6))
    """What judges by the outputs of the online model's blocks; it steps with that model. Released code: convolutions on
    the bottleneck of a U-Net, with the online model's optimizer. A transformer has no bottleneck."""
    gan_weight: float = Field(default=5e-3, gt=0)
    """Weight of the student's side of the GAN. Released code: 5e-3 (``gen_cls_loss_weight``)."""
    discriminator_weight: float = Field(default=1e-2, gt=0)
    """Weight of the discriminator's side beside the online model's denoising. Released code: 1e-2
    (``guidance_cls_loss_weight``)."""
    gan_timesteps: ScoreTimestepsConfig = ScoreTimestepsConfig(shift=1.0, low=0.0, high=1000.0)
    """Times that clips and samples are noised to before they are judged, each by itself. Released code: uniform over
    all (``diffusion_gan_max_timestep``)."""

    def roles(self, student_weights: str | None = None) -> Roles:
        reads = Reads("online", lambda layers: len(self.head.tapped(layers)), 2)
        head = Built(self.head.optimizer, lambda _, architecture: build_head(self.head, architecture), reads)
        return {**super().roles(student_weights), "discriminator": head}

    def own_calls(self, max_steps: int) -> Sequence[Call]:
        return (
            *super().own_calls(max_steps),
            Call("online", 1, backward=True, beside="student"),
            Call("online", self.online_updates, backward=True),  # judges a clip,
            Call("online", self.online_updates, backward=True, beside="online"),  # and a sample by the same weights
        )


class DMD2(DMD):
    """DMD2 with its GAN; see :class:`DMD2MethodConfig`."""

    Config: ClassVar[type[DMD2MethodConfig]] = DMD2MethodConfig

    def __init__(self, config: Any, models: Mapping[str, Model], setting: Setting) -> None:
        super().__init__(config, models, setting)
        backbone: Any = self.online
        blocks = config.head.tapped(len(backbone.module.blocks))
        self.discriminator = Discriminator(backbone, models["discriminator"], blocks)
        self.gan = LogisticLoss()

    def own_turns(self, step: int) -> Sequence[Turn]:
        student, *online = super().own_turns(step)
        return [student, *(turn._replace(data=(*turn.data, "clips"), together=("discriminator",)) for turn in online)]

    def own_losses(self, turn: Turn, batch: Batches, draws: Draws) -> Iterator[Loss]:
        if turn.role == "online":
            x_BCFHW, condition = self.take_sample(turn, batch, draws)
            yield self.denoise(x_BCFHW, condition, draws)  # as in dmd
            yield self.tell_apart(x_BCFHW, condition, batch, draws)
            return
        for own in super().own_losses(turn, batch, draws):  # distribution matching
            yield self.with_gan(own, batch["prompts"].condition, draws)

    def tell_apart(self, x_BCFHW: Tensor, condition: Condition, batch: Batches, draws: Draws) -> Loss:
        """Sec. 4.3, the discriminator: -E log D(clip_t, t) - E log(1 - D(sample_t', t')), D the sigmoid of a logit."""
        clips_BCFHW, captions = batch["clips"]
        loss, metrics = self.gan.discriminator(
            self._logits(clips_BCFHW, captions, draws, "clip"), self._logits(x_BCFHW, condition, draws, "sample")
        )
        return Loss(self.config.discriminator_weight * loss, metrics)

    def with_gan(self, own: Loss, condition: Condition, draws: Draws) -> Loss:
        """Sec. 4.3, the student, in the released code's form: -E log D(sample_t, t), beside the matching term."""
        assert own.cut is not None
        assert own.samples is not None
        loss, metrics = prefixed("gan", self.gan.generator(self._logits(own.samples, condition, draws, "sample")))
        terms = {"matching": own.value, "gan": self.config.gan_weight * loss}
        # This is the backward pass through the online model; what comes back has the gradient at the cut already.
        total, shares = gradient_shares(own.cut.output, terms)
        metrics = {**own.metrics, **metrics, **{f"{name}/share": share for name, share in shares.items()}}
        return own._replace(value=total, metrics=metrics)

    def _logits(self, x_BCFHW: Tensor, condition: Condition, draws: Draws, name: str) -> Tensor:
        """D of clips or samples at times of their own."""
        t_B, x_t_BCFHW, _ = draw_noised(x_BCFHW, draws, f"gan_{name}", self.config.gan_timesteps)
        return self.discriminator(x_t_BCFHW, t_B, condition)


METHOD = DMD2
