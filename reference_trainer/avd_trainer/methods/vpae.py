"""One step in two phases: a student primed by distribution matching, then in equilibrium with a critic that is itself.

V-PAE, arXiv 2508.21019. Where the paper is silent, a reading of ours is an option; docs/vpae.md lists them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar, Literal, Self

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor

from avd_core import (
    ClippedTemporalVarianceLoss,
    ConditionalScoreDistillationLoss,
    HingeLoss,
    LossOutput,
    MotionConfig,
    SpatioTemporalR1Loss,
)
from avd_trainer.config.sections import LoRAConfig, ScoreTimestepsConfig
from avd_trainer.methods.base import (
    Batches,
    Call,
    Cut,
    Loss,
    Setting,
    StudentRoleConfig,
    Turn,
    describe_samples,
    draw_noised,
    prefixed,
    weighted_sum,
    without_graph,
)
from avd_trainer.methods.dmd import DMD, DMDMethodConfig
from avd_trainer.models.condition import Condition
from avd_trainer.models.discriminators.discriminator import Discriminator, HeadConfig, build_head
from avd_trainer.models.roles import Average, Built, Model, Roles, Trained
from avd_trainer.models.samplers import Rollout, few_step_rollout, guided_velocity, predict, schedule
from avd_trainer.runtime.draws import Draws

PAPER = "Cheng et al., AAAI 2026, arXiv 2508.21019 (V-PAE)"
