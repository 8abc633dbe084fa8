import math

import pytest
import torch

from avd_trainer.evaluation.clip_metrics import evaluate


def test_metrics_move_with_what_they_measure() -> None:
    latents, held_out = torch.randn(6, 16, 3, 2, 2), torch.randn(6, 16, 3, 2, 2)
    gray = torch.full((6, 3, 9, 16, 16), 0.5)
    still = evaluate(latents, gray, held_out)
    assert still.saturation == 0
    assert still.pixel_motion == 0
    flashing = gray.clone()
    flashing[:, :, ::2] += 0.25
    assert evaluate(latents, flashing, held_out).pixel_motion == pytest.approx(0.25)
    halved = evaluate(0.5 * latents, gray, held_out)
    assert halved.temporal_loss == pytest.approx(still.temporal_loss + math.log(4), rel=1e-4)


def test_pixels_beyond_the_screen_count_as_the_screen_shows_them() -> None:
    latents = torch.randn(2, 16, 3, 2, 2)
    video = torch.tensor([2.0, 1.0, 1.0]).view(1, 3, 1, 1, 1).expand(2, 3, 9, 16, 16)
    assert evaluate(latents, video, latents).saturation == 0
