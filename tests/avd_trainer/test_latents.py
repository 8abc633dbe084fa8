from itertools import islice

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from avd_trainer.config import ShapesData
from avd_trainer.data.codec import BlockDCTCodec
from avd_trainer.data.latents import CaptionedLatents, shuffled_indices
from avd_trainer.data.sources import load_clips


@given(length=st.integers(1, 30), batch_size=st.integers(1, 12), seed=st.integers(0, 9))
def test_every_epoch_has_each_sample_once(length: int, batch_size: int, seed: int) -> None:
    stream = torch.cat(list(islice(shuffled_indices(length, batch_size, seed), 1 + 3 * length // batch_size)))
    for epoch in stream[: len(stream) // length * length].view(-1, length):
        assert sorted(epoch.tolist()) == list(range(length))


def test_the_order_depends_on_seed_and_epoch() -> None:
    first, second = islice(shuffled_indices(50, 50, seed=1), 2)
    assert not torch.equal(first, second)
    assert torch.equal(first, next(shuffled_indices(50, 50, seed=1)))
    assert not torch.equal(first, next(shuffled_indices(50, 50, seed=2)))


def test_held_out_clips_are_not_among_the_training_clips() -> None:
    train, held_out = load_clips(ShapesData(clips=12, held_out=6, seed=3), BlockDCTCodec())
    assert (len(train), len(held_out)) == (12, 6)
    assert torch.cdist(train.latents.flatten(1), held_out.latents.flatten(1)).min() > 1


def test_captions_belong_to_latents() -> None:
    with pytest.raises(ValueError, match="2 captions"):
        CaptionedLatents(torch.zeros(3, 16, 2, 2, 2), ["one", "two"])
