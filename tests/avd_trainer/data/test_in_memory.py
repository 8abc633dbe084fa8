import pytest
import torch

from avd_trainer.config.sections import ShapesData
from avd_trainer.data.in_memory import CaptionedLatents
from avd_trainer.data.sources import load_clips
from avd_trainer.models.codecs.block_dct import BlockDCTCodec


def test_held_out_clips_are_not_among_the_training_clips() -> None:
    train, held_out = load_clips(ShapesData(clips=12, held_out=6, seed=3), BlockDCTCodec())
    assert (len(train), len(held_out)) == (12, 6)
    assert torch.cdist(train.latents.flatten(1), held_out.latents.flatten(1)).min() > 1


def test_captions_belong_to_latents() -> None:
    with pytest.raises(ValueError, match="2 captions"):
        CaptionedLatents(torch.zeros(3, 16, 2, 2, 2), ["one", "two"])
