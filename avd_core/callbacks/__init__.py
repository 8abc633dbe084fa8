"""Callbacks that any training loop can call; see :class:`Callback` for how."""

from avd_core.callbacks.base import Callback, CallbackList
from avd_core.callbacks.collapse import CollapseFinding, CollapseMonitor, LatentStatistics
from avd_core.callbacks.ema import EMACallback
from avd_core.callbacks.non_finite import NonFiniteError, NonFiniteGuard

__all__ = [
    "Callback",
    "CallbackList",
    "CollapseFinding",
    "CollapseMonitor",
    "EMACallback",
    "LatentStatistics",
    "NonFiniteError",
    "NonFiniteGuard",
]
