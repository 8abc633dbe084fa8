"""Whether a student that draws the mean of all scenes is told from one that draws one of them."""

import pytest
import torch

from means_of_scenes import compare


def test_scenes_and_their_mean_are_told_apart() -> None:
    generator = torch.Generator().manual_seed(0)
    means = 3 * torch.randn(16, 1, 500, generator=generator)
    real, others = (means + 2 * torch.randn(16, 32, 500, generator=generator) for _ in range(2))
    close = pytest.approx
    assert [*compare(others, real).values()] == [close(1, abs=0.02), close(0, abs=0.005)]
    assert [*compare(means.expand(-1, 32, -1), real).values()] == [0, close(0, abs=0.005)]
    # One scene, whatever the noise: as far from the mean as scenes are.
    assert [*compare(others[:, :1].expand(-1, 32, -1), real).values()] == [0, close(1, abs=0.05)]
    # All scenes of another caption.
    far = (means - means.roll(1, 0)).square().mean() / 4
    assert [*compare(others.roll(1, 0), real).values()] == [close(1, abs=0.02), close(float(far), rel=0.05)]
