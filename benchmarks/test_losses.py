"""Forward and backward of the losses on one Wan2.1 latent of 832x480x81, beside torch's own mean squared error.

Run with ``make bench``, on a GPU where there is one. All rows are measured in one run;
benchmarks/results/losses-cpu.json (gpu in place of cpu on one) gets the medians and their ratios to ``mse_loss``.
"""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor

from avd_core import (
    AdaptiveRegressionLoss,
    ClippedTemporalVarianceLoss,
    DistributionMatchingLoss,
    LossMeanCache,
)

SHAPE_BCFHW = (1, 16, 21, 60, 104)

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")

torch.manual_seed(0)
X = torch.randn(SHAPE_BCFHW, device=DEVICE, requires_grad=True)
X_BFCHW = torch.randn(1, 21, 16, 60, 104, device=DEVICE, requires_grad=True)
Y, Z = torch.randn(2, *SHAPE_BCFHW, device=DEVICE).unbind()
TIMESTEPS = torch.tensor([900], device=DEVICE)

regression = AdaptiveRegressionLoss(LossMeanCache((1000, 900, 757, 522)).to(DEVICE))
# A floor that these samples are above, so that the gradient is a real one.
motion = ClippedTemporalVarianceLoss(floor=-5.0)
motion_frames_first = ClippedTemporalVarianceLoss(floor=-5.0, frame_dim=1)
matching = DistributionMatchingLoss()


def eager_motion() -> Tensor:
    """Eq. 8 as one would write it first."""
    return -torch.log(X.var(dim=2, correction=0).mean() + 1e-6)


def eager_motion_float64() -> Tensor:
    """The same in the released code's precision."""
    return -torch.log(X.double().var(dim=2, correction=0).mean() + 1e-6)


LOSSES: dict[str, Callable[[], Tensor]] = {
    "mse_loss": lambda: F.mse_loss(X, Y),
    "regression": lambda: regression(X, Y, TIMESTEPS).loss,
    "motion": lambda: motion(X).loss,
    "motion, frame_dim=1": lambda: motion_frames_first(X_BFCHW).loss,
    "matching": lambda: matching(X, Y, Z).loss,
    "motion, plain eager": eager_motion,
    "motion, plain eager float64": eager_motion_float64,
}


@pytest.mark.parametrize("name", LOSSES)
def test_forward_and_backward(benchmark: BenchmarkFixture, name: str) -> None:
    benchmark.group = "forward and backward, [1, 16, 21, 60, 104] float32"

    def forward_and_backward() -> None:
        X.grad = X_BFCHW.grad = None
        LOSSES[name]().backward()
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()

    benchmark.pedantic(forward_and_backward, rounds=60, warmup_rounds=10)
