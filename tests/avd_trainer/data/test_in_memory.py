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


def test_a_share_of_clips_has_wrong_captions() -> None:
    right = ShapesData(clips=16, held_out=4, seed=3)
    (own, held_out), (exchanged, same) = (
        load_clips(data, BlockDCTCodec()) for data in (right, right.model_copy(update={"wrong_captions": 0.25}))
    )
    assert torch.equal(own.latents, exchanged.latents)
    assert [a == b for a, b in zip(own.captions, exchanged.captions, strict=True)] == [False] * 4 + [True] * 12
    assert sorted(own.captions) == sorted(exchanged.captions)
    assert held_out.captions == same.captions


def test_one_clip_has_nobody_to_exchange_captions_with() -> None:
    with pytest.raises(ValueError, match=r"wrong_captions=0\.1 of 12 clips are 1, and two are needed"):
        ShapesData(clips=12, wrong_captions=0.1)


def test_captions_belong_to_latents() -> None:
    with pytest.raises(ValueError, match="2 captions"):
        CaptionedLatents(torch.zeros(3, 16, 2, 2, 2), ["one", "two"])
