"""Callbacks that any training loop can call; see :class:`Callback` for how."""

from avd_core.callbacks.base import Callback, NamedCallbacks
from avd_core.callbacks.collapse import (
    MAX_SWITCHED,
    MIN_WEIGHT_SPREAD,
    OUTER_WEIGHTS,
    CollapseMonitor,
    LatentStatistics,
)
from avd_core.callbacks.ema import EMACallback
from avd_core.callbacks.non_finite import NonFiniteError, NonFiniteGuard
from avd_core.callbacks.rules import CollapseFinding
from avd_core.callbacks.spectrum import SpectralRolloffMonitor, SpectralStatistics

__all__ = [
    "MAX_SWITCHED",
    "MIN_WEIGHT_SPREAD",
    "OUTER_WEIGHTS",
    "Callback",
    "CollapseFinding",
    "CollapseMonitor",
    "EMACallback",
    "LatentStatistics",
    "NamedCallbacks",
    "NonFiniteError",
    "NonFiniteGuard",
    "SpectralRolloffMonitor",
    "SpectralStatistics",
]
