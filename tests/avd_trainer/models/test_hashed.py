import pytest
import torch

from avd_trainer.models.text_encoders.hashed import HashTextEmbedding


def test_a_caption_has_one_embedding_everywhere() -> None:
    assert torch.equal(HashTextEmbedding(8, 16)(["a red circle"]), HashTextEmbedding(8, 16)(["A red circle!"]))


def test_words_and_their_order_matter() -> None:
    one, other, reordered = HashTextEmbedding(8, 16)(["red blue", "red green", "blue red"])
    assert not torch.equal(one, other)
    assert not torch.equal(one, reordered)


def test_the_empty_caption_and_the_padding_are_zero() -> None:
    embedding = HashTextEmbedding(8, 16)(["", "two words"])
    assert torch.equal(embedding[0], torch.zeros(8, 16))
    assert embedding[1, :2].abs().sum() > 0
    assert torch.equal(embedding[1, 2:], torch.zeros(6, 16))


def test_long_captions_are_cut() -> None:
    embed = HashTextEmbedding(3, 16)
    assert torch.equal(embed(["one two three four"]), embed(["one two three"]))


def test_impossible_sizes_are_refused() -> None:
    with pytest.raises(ValueError, match="got 0 and 16"):
        HashTextEmbedding(0, 16)
