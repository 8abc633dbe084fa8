"""Adapters that attach ``avd_core`` to other people's trainers.

:class:`HostTerms` is the recipe for any distiller: three callables say how it counts time, what its model predicts and
where its real clips are. One module per known host is made of it, and imports that host only when it is used.
"""

from avd_integrations.parametrisation import (
    Parametrisation,
    phase_end_to_velocity,
    rectified_flow,
    trigflow,
    variance_preserving,
)
from avd_integrations.terms import HostTerms

__all__ = [
    "HostTerms",
    "Parametrisation",
    "phase_end_to_velocity",
    "rectified_flow",
    "trigflow",
    "variance_preserving",
]
