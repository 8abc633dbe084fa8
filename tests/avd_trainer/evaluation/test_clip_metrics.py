import colorsys
import math

import pytest
import torch

from avd_trainer.evaluation.clip_metrics import energy_distance, evaluate, hsv_saturation


def test_saturation_is_that_of_the_hsv_colour_model() -> None:
    video = torch.rand(1, 3, 2, 3, 4)
    video[0, :, 0, 0, 0] = 0  # black has no saturation
    expected = [colorsys.rgb_to_hsv(*pixel)[1] for pixel in video.permute(0, 2, 3, 4, 1).reshape(-1, 3).tolist()]
    assert hsv_saturation(video).flatten().tolist() == pytest.approx(expected, abs=1e-6)


def test_energy_distance_is_its_definition() -> None:
    x, y = torch.randn(4, 2, 3), torch.randn(5, 2, 3) + 1

    def mean_distance(pairs: list[tuple[torch.Tensor, torch.Tensor]]) -> float:
        return sum(math.dist(a.flatten().tolist(), b.flatten().tolist()) for a, b in pairs) / len(pairs)

    between = mean_distance([(a, b) for a in x for b in y])
    within_x = mean_distance([(a, b) for i, a in enumerate(x) for j, b in enumerate(x) if i != j])
    within_y = mean_distance([(a, b) for i, a in enumerate(y) for j, b in enumerate(y) if i != j])
    assert energy_distance(x, y) == pytest.approx((2 * between - within_x - within_y) / math.sqrt(6), rel=1e-5)


def test_energy_distance_is_zero_for_one_distribution_and_grows_with_scale() -> None:
    real, same = torch.randn(200, 64), torch.randn(200, 64)
    distances = [energy_distance(scale * same, real) for scale in (1.0, 1.2, 1.5)]
    assert abs(distances[0]) < 0.005
    assert distances[0] < distances[1] < distances[2]


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
