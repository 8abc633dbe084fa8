import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from avd_trainer.data.moving_shapes import MovingShapes
from avd_trainer.models.codecs.block_dct import COEFFICIENTS, BlockDCTCodec

CODEC = BlockDCTCodec()
IN_TIME = [channel for channel, (_, kt, _, _) in enumerate(COEFFICIENTS) if kt]


@given(frames=st.integers(1, 4), height=st.integers(1, 3), width=st.integers(1, 3), seed=st.integers(0, 99))
def test_encoding_inverts_decoding(frames: int, height: int, width: int, seed: int) -> None:
    latents = torch.randn(2, 16, frames, height, width, generator=torch.Generator().manual_seed(seed))
    latents[:, IN_TIME, 0] = 0  # one frame has no change in time
    torch.testing.assert_close(CODEC.encode(CODEC.decode(latents)), latents, atol=1e-4, rtol=0)


def test_decoding_is_the_closest_video_that_the_codec_can_show() -> None:
    video = torch.rand(1, 3, 5, 16, 16)
    shown = CODEC.decode(CODEC.encode(video))
    error = video - shown
    nearby = CODEC.decode(CODEC.encode(video) + 0.1 * torch.randn(1, 16, 2, 2, 2))
    assert (error * (nearby - shown)).sum().abs() < 1e-3
    assert error.square().sum() < (video - nearby).square().sum()


def test_geometry_is_that_of_wan() -> None:
    assert CODEC.encode(torch.rand(1, 3, 81, 48, 80)).shape == (1, 16, 21, 6, 10)
    assert CODEC.decode(torch.zeros(1, 16, 21, 6, 10)).shape == (1, 3, 81, 48, 80)


def test_the_first_latent_frame_depends_on_the_first_frame_alone() -> None:
    video = torch.rand(1, 3, 9, 16, 16)
    changed = video.clone()
    changed[:, :, 1:] = torch.rand(1, 3, 8, 16, 16)
    assert torch.equal(CODEC.encode(video)[:, :, 0], CODEC.encode(changed)[:, :, 0])


def test_a_still_video_has_the_same_latents_in_every_frame() -> None:
    latents = CODEC.encode(torch.rand(1, 3, 1, 16, 16).expand(-1, -1, 9, -1, -1))
    torch.testing.assert_close(latents, latents[:, :, :1].expand_as(latents), atol=1e-5, rtol=0)
    assert latents[:, IN_TIME].abs().max() < 1e-5


def test_one_coefficient_is_the_dct_of_its_block() -> None:
    """By the definition of the DCT-II, with loops, for the luma coefficient (time 1, y 0, x 1)."""
    video = torch.rand(1, 3, 5, 8, 8)
    channel = COEFFICIENTS.index((0, 1, 0, 1))
    total = 0.0
    for t in range(4):
        for y in range(8):
            for x in range(8):
                luma = sum(2 * float(video[0, c, 1 + t, y, x]) - 1 for c in range(3)) / math.sqrt(3)
                total += luma * math.cos(math.pi * (t + 0.5) / 4) * math.cos(math.pi * (x + 0.5) / 8) * 2
    expected = total / (4 * 8 * 8) / float(CODEC.std.flatten()[channel])
    assert float(CODEC.encode(video)[0, channel, 1, 0, 0]) == pytest.approx(expected, rel=1e-4)


def test_latents_of_shapes_have_about_unit_scale() -> None:
    shapes = MovingShapes(64, seed=9)
    latents = CODEC.encode(torch.stack([shapes[i].video for i in range(64)]))
    std = latents.std(dim=(0, 2, 3, 4))
    assert (std - 1).abs().max() < 0.2
    assert latents.mean(dim=(0, 2, 3, 4)).abs().max() < 0.25


def test_clips_survive_the_codec() -> None:
    video = MovingShapes(1, seed=0)[0].video.unsqueeze(0)
    shown = CODEC.decode(CODEC.encode(video))
    assert (shown - video).square().mean() < 0.15 * video.var(dim=(2, 3, 4)).mean()


@pytest.mark.parametrize("shape", [(1, 3, 4, 16, 16), (1, 3, 5, 12, 16), (1, 1, 5, 16, 16), (3, 5, 16, 16)])
def test_video_of_another_form_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="encode needs"):
        CODEC.encode(torch.zeros(shape))


def test_latents_of_another_form_are_refused() -> None:
    with pytest.raises(ValueError, match=r"shape \[B, 16, F, h, w\], got \[1, 4, 2, 2, 2\]"):
        CODEC.decode(torch.zeros(1, 4, 2, 2, 2))
