"""Adaptive Video Distillation: distribution matching, and two terms that keep colours and motion.

You et al. 2026, Eq. 9: ``L_G = L_matching + w_reg w_{t,s} L_reg + w_temp L_temp``.
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from pydantic import field_validator

from avd_trainer.methods.dmd import DMD, DMDMethodConfig
from avd_trainer.methods.terms import TermsConfig

PAPER = "You et al., CVPR 2026"
NEEDS = ("teacher", "clips", "prompts")
FORWARDS = (35.5,)
SAMPLED = "4 steps, re-noise"


class AVDMethodConfig(TermsConfig, DMDMethodConfig):
    """Adaptive Video Distillation: the paper's values are the defaults."""

    kind: Literal["avd"] = "avd"  # type: ignore[assignment]
    avd: None = None
    """Not here: the terms are this method's own options."""

    set_at: ClassVar[str] = "method"
    without_both: ClassVar[str] = "which is method dmd. Choose that one"

    @property
    def terms(self) -> TermsConfig:
        return self

    @field_validator("avd", mode="before")
    @classmethod
    def _check_avd(cls, value: Any) -> None:
        if value is not None:
            raise ValueError("method avd has the terms itself. Set method.regression and method.motion")


class AVD(DMD):
    """Distribution matching, and on top of it what :mod:`avd_trainer.methods.terms` adds to any method."""

    Config: ClassVar[type[AVDMethodConfig]] = AVDMethodConfig


METHOD = AVD
