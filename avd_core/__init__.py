"""Losses and callbacks that keep few-step video students from oversaturating and from standing still.

The parts, for a training loop of your own:

- :class:`AdaptiveRegressionLoss` over a :class:`LossMeanCache`: regression on real clips with adaptive weights.
- :class:`ClippedTemporalVarianceLoss`: keeps generated clips moving. :func:`derive_floor` fits it to a latent space.
- :class:`DistributionMatchingLoss`: the DMD term, for loops that have none.
- :class:`HingeLoss`, :class:`SpatioTemporalR1Loss` and :class:`ConditionalScoreDistillationLoss`: the terms of V-PAE's
  adversarial phase; :class:`LogisticLoss`: DMD2's in place of the first.
- :class:`AVDObjective`: the first two in one module, configured by :class:`AVDConfig`.
- :class:`GradientBalance`: measures or holds the ratio of the regression's gradient to distribution matching's.
- :func:`gradient_shares`: which of several terms trains the student.
- :class:`FlowMatchingSchedule` and functions beside it: velocity, x_0, noise, shift, guidance.
- :class:`HalfRateInterpolationSampler`: few-step sampling whose first steps run on every second frame, with a
  :class:`LatentFrameInterpolator` or :func:`interpolate_linearly` to insert the others.
- :func:`spectral_rolloff` and :func:`temporal_rolloff`: how fine maps are, and how fast they change.
- :class:`Callback` and :class:`EMACallback`, :class:`CollapseMonitor`, :class:`SpectralRolloffMonitor`,
  :class:`NonFiniteGuard`; several of them as one: :class:`NamedCallbacks`.

Every loss returns a :class:`LossOutput`, whose ``scalars()`` go to any logger. Options are given by keyword, and have
the same names and order in a loss, its function and its configuration.

After You et al., "Adaptive Video Distillation: Mitigating Oversaturation and Temporal Collapse in Few-Step Generation"
(CVPR 2026), whose equation numbers the docstrings use.
"""

from avd_core.adversarial import HingeLoss, LogisticLoss, SpatioTemporalR1Loss, spatio_temporal_r1_loss
from avd_core.balance import GradientBalance, gradient_shares
from avd_core.cache import LossMeanCache, LossStatistics
from avd_core.callbacks import (
    MAX_SWITCHED,
    MIN_WEIGHT_SPREAD,
    OUTER_WEIGHTS,
    Callback,
    CollapseFinding,
    CollapseMonitor,
    EMACallback,
    LatentStatistics,
    NamedCallbacks,
    NonFiniteError,
    NonFiniteGuard,
    SpectralRolloffMonitor,
    SpectralStatistics,
)
from avd_core.config import AVDConfig, BalanceConfig, MotionConfig, RegressionConfig
from avd_core.interpolation import LatentFrameInterpolator, interpolate_linearly, repeat_frames
from avd_core.matching import DistributionMatchingLoss, distribution_matching_loss
from avd_core.motion import (
    ClippedTemporalVarianceLoss,
    clipped_temporal_variance_loss,
    derive_floor,
    temporal_variance,
)
from avd_core.objective import AVDObjective
from avd_core.output import LossOutput
from avd_core.regression import PAPER_SPREAD, AdaptiveRegressionLoss, adaptive_regression_loss
from avd_core.sampling import HalfRateInterpolationSampler, SamplingStep, kept_frames, raise_frame_rate, step_rates
from avd_core.schedule import (
    FlowMatchingSchedule,
    classifier_free_guidance,
    shift_timesteps,
    standard_guidance_scale,
)
from avd_core.score_distillation import ConditionalScoreDistillationLoss, conditional_score_distillation_loss
from avd_core.spectrum import spectral_rolloff, temporal_rolloff

__version__ = "0.1.0"

__all__ = [
    "MAX_SWITCHED",
    "MIN_WEIGHT_SPREAD",
    "OUTER_WEIGHTS",
    "PAPER_SPREAD",
    "AVDConfig",
    "AVDObjective",
    "AdaptiveRegressionLoss",
    "BalanceConfig",
    "Callback",
    "ClippedTemporalVarianceLoss",
    "CollapseFinding",
    "CollapseMonitor",
    "ConditionalScoreDistillationLoss",
    "DistributionMatchingLoss",
    "EMACallback",
    "FlowMatchingSchedule",
    "GradientBalance",
    "HalfRateInterpolationSampler",
    "HingeLoss",
    "LatentFrameInterpolator",
    "LatentStatistics",
    "LogisticLoss",
    "LossMeanCache",
    "LossOutput",
    "LossStatistics",
    "MotionConfig",
    "NamedCallbacks",
    "NonFiniteError",
    "NonFiniteGuard",
    "RegressionConfig",
    "SamplingStep",
    "SpatioTemporalR1Loss",
    "SpectralRolloffMonitor",
    "SpectralStatistics",
    "adaptive_regression_loss",
    "classifier_free_guidance",
    "clipped_temporal_variance_loss",
    "conditional_score_distillation_loss",
    "derive_floor",
    "distribution_matching_loss",
    "gradient_shares",
    "interpolate_linearly",
    "kept_frames",
    "raise_frame_rate",
    "repeat_frames",
    "shift_timesteps",
    "spatio_temporal_r1_loss",
    "spectral_rolloff",
    "standard_guidance_scale",
    "step_rates",
    "temporal_rolloff",
    "temporal_variance",
]
