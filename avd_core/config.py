"""The method's hyperparameters, validated, with the paper's as defaults."""

from __future__ import annotations

from itertools import pairwise
from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from avd_core.cache import CacheOrder
from avd_core.regression import Deviation, Judged


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)


class RegressionConfig(_Section):
    """Options of :class:`AdaptiveRegressionLoss` and its :class:`LossMeanCache`."""

    weight: float = Field(default=2.0, ge=0)
    """``w_reg`` of Eq. 9. Paper: 2, so that a sample of average loss has weight 1. Released code: 1."""
    sharpness: float = Field(default=3.0, ge=0)
    """``k`` of Eq. 7. Paper and released code: 3."""
    deviation: Deviation = "absolute"
    """Unit of the deviations that the weight judges by. Paper and released code: ``absolute``, that of the losses.
    ``standardized`` is that of their spread at each timestep, and the paper's where the spread is 0.3."""
    judged: Judged = "loss"
    """What is compared with its mean. Paper and released code: ``loss``. ``relative`` is the loss over the clip's own
    energy, ``excess`` the loss less the teacher's own, see :class:`AdaptiveRegressionLoss`."""
    decay: float = Field(default=0.95, ge=0, lt=1)
    """``alpha`` of Eq. 6. Paper and released code: 0.95."""
    order: CacheOrder = "weight_first"
    """Paper: ``weight_first``. Released code: ``update_first``."""
    auto_update: bool = True
    """Whether each call is an iteration. False with gradient accumulation, see :class:`LossMeanCache`."""
    sync_ranks: bool = True
    """Whether all ranks share one cache, as the paper has it. Released code: one per process."""

    @model_validator(mode="after")
    def _check_order(self) -> Self:
        if self.order == "update_first" and not self.auto_update:
            raise ValueError("order='update_first' needs auto_update=True")
        return self


class MotionConfig(_Section):
    """Options of :class:`ClippedTemporalVarianceLoss`."""

    weight: float = Field(default=0.05, ge=0)
    """``w_temp`` of Eq. 9. Paper and released code: 0.05."""
    floor: float = 0.6
    """Truncation, in nats, for Wan2.1's latents. Paper: 0.6 (tried: 1.2, 1.0, 0.6, 0.4). Released code: 0.8."""
    eps: float = Field(default=1e-6, gt=0)
    """``eps`` of Eq. 8."""
    frame_dim: Literal[1, 2] = 2
    """Dimension of frames: 2 for ``[B, C, F, H, W]``, 1 for ``[B, F, C, H, W]``."""
    channels: int | None = Field(default=None, ge=1)
    """Channels of the latent space, to refuse samples in another layout. None does not look."""
    sync_ranks: bool = True
    """Whether the expectation of Eq. 8 runs over the samples of all ranks. Released code: over those of each."""


class BalanceConfig(_Section):
    """How :class:`GradientBalance` measures the ratio of gradients; ``AVDConfig.gradient_ratio`` is what it holds."""

    decay: float = Field(default=0.9, ge=0, lt=1)
    """Decay of the running means per call. Ours: the paper has no such measurement."""
    sync_ranks: bool = True
    """Whether the means run over all ranks."""


class AVDConfig(_Section):
    """Adaptive Video Distillation: what is added to a distribution-matching loss.

    The defaults are the paper's; :meth:`released_code` gives the values of the authors' published code. A part set to
    None is left out.
    """

    timesteps: tuple[float, ...] = Field(default=(1000, 900, 757, 522), min_length=1)
    """The student's few steps, which are also the grid of the cache. Strictly falling or rising."""
    regression: RegressionConfig | None = RegressionConfig()
    """The adaptive regression on real clips, Eq. 5-7."""
    motion: MotionConfig | None = MotionConfig()
    """The clipped temporal variance of generated clips, Eq. 8."""
    gradient_ratio: float | None = Field(default=None, gt=0)
    """Ratio of the regression's gradient to the matching term's to hold by :class:`GradientBalance`. Paper: None, a
    constant weight."""
    balance: BalanceConfig = BalanceConfig()
    """How that ratio is measured."""

    @model_validator(mode="after")
    def _check_grid(self) -> Self:
        steps = [b - a for a, b in pairwise(self.timesteps)]
        if not (all(s > 0 for s in steps) or all(s < 0 for s in steps)):
            raise ValueError(f"timesteps must be strictly falling or strictly rising, got {self.timesteps}")
        if self.gradient_ratio is not None and self.regression is None:
            raise ValueError("gradient_ratio needs a regression whose gradient it could hold")
        return self

    @classmethod
    def paper(cls) -> Self:
        """The paper's hyperparameters (the defaults)."""
        return cls()

    @classmethod
    def released_code(cls) -> Self:
        """The released code's: ``w_reg`` 1, cache updated before the weight is taken, floor 0.8, variance of each rank.

        Its cache is one per process, which no checkpoint can hold; here it stays one for all ranks.
        """
        return cls(
            regression=RegressionConfig(weight=1.0, order="update_first"),
            motion=MotionConfig(floor=0.8, sync_ranks=False),
        )
