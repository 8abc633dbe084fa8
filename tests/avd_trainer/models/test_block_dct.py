import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

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
    nearby = CODEC.decode(CODEC.encode(video) + 0.1 * torch.randn(1, 16, 2, 4, 4))
    assert (error * (nearby - shown)).sum().abs() < 1e-3
    assert error.square().sum() < (video - nearby).square().sum()


def test_blocks_are_of_4_by_4_pixels_and_4_frames_after_the_first() -> None:
    assert CODEC.encode(torch.rand(1, 3, 81, 24, 40)).shape == (1, 16, 21, 6, 10)
    assert CODEC.decode(torch.zeros(1, 16, 21, 6, 10)).shape == (1, 3, 81, 24, 40)


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
    """By the definition of the DCT-II, with loops, for red against blue, (time 1, y 0, x 1)."""
    video = torch.rand(1, 3, 5, 8, 8)
    channel = COEFFICIENTS.index((1, 1, 0, 1))
    total = 0.0
    for t in range(4):
        for y in range(4):
            for x in range(4):
                red, _, blue = (2 * float(video[0, c, 1 + t, y, 4 + x]) - 1 for c in range(3))
                waves = math.cos(math.pi * (t + 0.5) / 4) * math.cos(math.pi * (x + 0.5) / 4)
                total += (red - blue) / math.sqrt(2) * waves * 2
    expected = total / (4 * 4 * 4) / float(CODEC.std.flatten()[channel])
    assert float(CODEC.encode(video)[0, channel, 1, 0, 1]) == pytest.approx(expected, rel=1e-4)


@pytest.fixture(scope="module")
def shapes() -> Tensor:
    """``[N, 3, F, H, W]``, of another seed than the codec's constants."""
    clips = MovingShapes(128, seed=9)
    return torch.stack([clips[index].video for index in range(len(clips))])


def test_latents_of_shapes_have_about_unit_scale(shapes: Tensor) -> None:
    latents = CODEC.encode(shapes)
    latents[:, IN_TIME, 0] = torch.nan  # zeros, whatever the clip
    channels = latents.transpose(0, 1).flatten(1)
    mean = channels.nanmean(1)
    std = (channels - mean.unsqueeze(1)).square().nanmean(1).sqrt()
    assert (std - 1).abs().max() < 0.1
    assert mean.abs().max() < 0.1


def test_shapes_survive_the_codec(shapes: Tensor) -> None:
    error = (CODEC.decode(CODEC.encode(shapes)) - shapes).square()
    assert -10 * math.log10(error.mean()) == pytest.approx(34.7, abs=0.3)  # PSNR in dB


@pytest.mark.parametrize("shape", [(1, 3, 4, 16, 16), (1, 3, 5, 14, 16), (1, 1, 5, 16, 16), (3, 5, 16, 16)])
def test_video_of_another_form_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="encode needs"):
        CODEC.encode(torch.zeros(shape))


def test_latents_of_another_form_are_refused() -> None:
    with pytest.raises(ValueError, match=r"shape \[B, 16, F, h, w\], got \[1, 4, 2, 2, 2\]"):
        CODEC.decode(torch.zeros(1, 4, 2, 2, 2))
