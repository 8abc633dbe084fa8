"""Sizes in latents, against what the codecs make; of Wan's VAE see also :mod:`test_wan`."""

from pathlib import Path

import pytest
import torch

import tiny_pipeline
from avd_trainer.config.sections import ArchitectureConfig
from avd_trainer.data.encode import FORMATS
from avd_trainer.data.moving_shapes import MovingShapes
from avd_trainer.models.codecs.block_dct import BlockDCTCodec
from avd_trainer.models.codecs.latent_space import PATCH_SIZE, SIZES, LatentSpace, latent_shape_of
from avd_trainer.models.codecs.wan import WanCodec
from avd_trainer.models.transformer import build_transformer
from avd_trainer.runtime.errors import UserError


def test_latents_have_the_size_that_their_codec_gives_them(tmp_path: Path) -> None:
    video = torch.rand(1, 3, 9, 16, 48)
    wan = WanCodec.from_pretrained(str(tiny_pipeline.build(tmp_path)), "cpu", torch.float32)
    assert latent_shape_of("48x16x9", "wan") == wan.encode(video).shape[1:] == (16, 3, 2, 6)
    assert latent_shape_of("48X16X9", "block-dct-4") == BlockDCTCodec().encode(video).shape[1:] == (16, 3, 4, 12)


def test_sizes_of_the_models_of_each_space() -> None:
    assert latent_shape_of(SIZES["wan"], "wan") == (16, 21, 60, 104)
    clip = MovingShapes(1, seed=0)[0].video
    assert latent_shape_of(SIZES["block-dct-4"], "block-dct-4") == BlockDCTCodec().encode(clip[None]).shape[1:]
    for space, own in FORMATS.items():
        assert SIZES[space] == f"{own.width}x{own.height}x{own.frames}"


def test_the_tiny_models_have_wans_patches() -> None:
    assert build_transformer(ArchitectureConfig(num_layers=1)).config.patch_size == (1, PATCH_SIZE, PATCH_SIZE)


@pytest.mark.parametrize("space", ["wan", "block-dct-4"])
@pytest.mark.parametrize("size", ["832x480", "832x480x80", "830x480x81", "832x0x81", "a x b x c", "-16x16x9"])
def test_a_size_that_a_space_has_not_is_refused(size: str, space: LatentSpace) -> None:
    with pytest.raises(UserError, match=f"{size}' is no size for latents of .*, for example {SIZES[space]}"):
        latent_shape_of(size, space)


def test_the_tiny_preset_takes_smaller_steps_of_size_than_wan() -> None:
    assert latent_shape_of("40x24x9", "block-dct-4") == (16, 3, 6, 10)
    with pytest.raises(UserError, match=r"Wan's VAE: expected .* divisible by 16 and 1 \+ 4 n frames"):
        latent_shape_of("40x24x9", "wan")
