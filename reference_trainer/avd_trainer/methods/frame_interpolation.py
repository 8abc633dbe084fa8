"""Frame interpolation: trains the network that inserts latent frames, for half-rate sampling.

Sec. 8 of You et al. 2026: regression on real clips, every second frame of which is left out and has to be inserted.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn

from avd_core import LatentFrameInterpolator, interpolate_linearly, repeat_frames
from avd_trainer.config.sections import OptimizerConfig
from avd_trainer.data.examples import Examples
from avd_trainer.methods.base import Batches, Call, Loss, Method, MethodConfig, Setting, Turn
from avd_trainer.models.roles import Built, Model, Roles
from avd_trainer.runtime.draws import Draws
from avd_trainer.runtime.errors import UserError

PAPER = "You et al., CVPR 2026, Sec. 8"
NEEDS = ("clips",)
FORWARDS = ()

# Held-out clips that are measured at once.
EVALUATION_BATCH = 8


class FrameInterpolationMethodConfig(MethodConfig):
    """Training of a :class:`avd_core.LatentFrameInterpolator`."""

    kind: Literal["frame_interpolation"] = "frame_interpolation"
    needs_teacher: ClassVar[bool] = False
    needs_text: ClassVar[bool] = False
    widths: tuple[Annotated[int, Field(ge=8, multiple_of=8)], ...] = Field(
        default=(32, 64, 128), min_length=3, max_length=3
    )
    """Channels of the network's three levels."""
    optimizer: OptimizerConfig = OptimizerConfig(lr=1e-5)
    """Paper: AdamW, 1e-5."""
    held_out: int = Field(default=64, ge=1)
    """Of data of kind shards: how many of the last clips are held out for the evaluation. Shapes and videos have
    held-out clips of their own."""

    def roles(self, student_weights: str | None = None) -> Roles:
        return {
            "interpolator": Built(self.optimizer, lambda shape, _: LatentFrameInterpolator(shape[0], self.widths)),
        }

    def calls(self, max_steps: int) -> Sequence[Call]:
        return ()  # of transformers there are none

    @property
    def main_role(self) -> str:
        return "interpolator"

    @property
    def held_out_clips(self) -> int:
        return self.held_out


class InterpolatorErrors(BaseModel):
    """Mean squared errors of inserted frames on held-out clips."""

    model_config = ConfigDict(frozen=True, use_attribute_docstrings=True)

    clips: int
    """Number of held-out clips."""
    frames: int
    """Number of frames that were left out of them and inserted again."""
    network: float
    """Of the trained network."""
    linear: float
    """Of :func:`avd_core.interpolate_linearly`."""
    repeat: float
    """Of :func:`avd_core.repeat_frames`."""


class FrameInterpolation(Method):
    """Frame interpolation; see :class:`FrameInterpolationMethodConfig`."""

    Config = FrameInterpolationMethodConfig

    def __init__(self, config: Any, models: Mapping[str, Model], setting: Setting) -> None:
        super().__init__(config, models, setting)
        check_shape(setting.latent_shape)
        self.interpolator = models["interpolator"]

    def turns(self, step: int) -> Sequence[Turn]:
        return [Turn("interpolator", ("clips",))]

    def losses(self, turn: Turn, batch: Batches, draws: Draws) -> Iterator[Loss]:
        # The frames that were kept are those of the clip by construction; counting them would only scale the loss.
        kept_BCFHW, missing_BCFHW = split_frames(batch["clips"].latents)
        yield Loss(F.mse_loss(self.interpolator(kept_BCFHW)[:, :, 1::2], missing_BCFHW), {})

    @torch.no_grad()
    def evaluate(self, module: nn.Module, held_out: Examples) -> InterpolatorErrors:
        """Measure a network, and what it has to beat, on clips that it was not trained on."""
        device = next(module.parameters()).device
        candidates: dict[str, Callable[[Tensor], Tensor]] = {
            "network": module,
            "linear": interpolate_linearly,
            "repeat": repeat_frames,
        }
        sums = dict.fromkeys(candidates, 0.0)
        frames = numbers = 0
        for start in range(0, len(held_out), EVALUATION_BATCH):
            places = range(start, min(start + EVALUATION_BATCH, len(held_out)))
            clips = [latent for place in places if (latent := held_out[place].latent) is not None]
            kept, missing = split_frames(torch.stack(clips).to(device))
            frames += len(missing) * missing.shape[2]
            numbers += missing.numel()
            for name, insert in candidates.items():
                difference = insert(kept)[:, :, 1::2].double() - missing
                sums[name] += float(difference.square().sum())
        means = {name: value / numbers for name, value in sums.items()}
        return InterpolatorErrors(clips=len(held_out), frames=frames, **means)


def split_frames(clips: Tensor) -> tuple[Tensor, Tensor]:
    """Every second frame of clips ``[B, C, F, H, W]``, and the frames between those.

    Of an even number of frames the last is left out, so that kept frames are always two apart. (Sampling keeps it
    there, as it must end at the last frame; the network sees such a pair for the first time then.)
    """
    odd = clips[:, :, : (clips.shape[2] - 1) // 2 * 2 + 1]
    return odd[:, :, ::2], odd[:, :, 1::2]


def check_shape(latent_shape: Sequence[int]) -> None:
    """Require clips ``(C, F, H, W)`` that frames can be left out of, and that the network can take."""
    _, frames, height, width = latent_shape
    if frames < 3:
        raise UserError(
            f"data has clips of {frames} latent frame(s); an interpolator learns from at least 3, of which it inserts "
            "the middle one. Encode longer clips: 9 frames of video make 3 of Wan2.1's latents."
        )
    if min(height, width) < 4:
        raise UserError(
            f"data has latents {height} high and {width} wide; the network's three levels need at least 4 of each. "
            "Encode larger videos."
        )


METHOD = FrameInterpolation
