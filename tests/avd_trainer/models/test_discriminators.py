"""Heads of discriminators: one logit for each video, whatever else is in the batch."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from avd_trainer.models.condition import Condition
from avd_trainer.models.discriminators.attention import Attention
from avd_trainer.models.discriminators.light import LightHead
from avd_trainer.models.discriminators.semantic import SemanticHead, image_token_dim, image_tokens

WIDTH, DIM, TEXT_DIM, IMAGE_DIM, BLOCKS = 64, 12, 6, 10, 3

HEADS: dict[str, Callable[[], nn.Module]] = {
    "light": lambda: LightHead(DIM, BLOCKS, width=WIDTH),
    "semantic": lambda: SemanticHead(DIM, BLOCKS, TEXT_DIM, width=WIDTH),
    "semantic with image": lambda: SemanticHead(DIM, BLOCKS, TEXT_DIM, IMAGE_DIM, width=WIDTH),
}


def inputs(batch: int, image: bool) -> tuple[list[Tensor], Condition]:
    draws = torch.Generator().manual_seed(1)
    features = [torch.randn(batch, 20, DIM, generator=draws) for _ in range(BLOCKS)]
    text = torch.randn(batch, 4, TEXT_DIM, generator=draws)
    embedding = torch.randn(batch, 5, IMAGE_DIM, generator=draws) if image else None
    return features, Condition(text, image_embedding=embedding)


@pytest.fixture(params=list(HEADS))
def head(request: pytest.FixtureRequest) -> nn.Module:
    torch.manual_seed(0)
    return HEADS[request.param]()


def has_image(head: nn.Module) -> bool:
    return getattr(head, "see_image", None) is not None


def test_each_video_has_a_logit_that_does_not_depend_on_the_others(head: nn.Module) -> None:
    features, condition = inputs(3, has_image(head))
    logits = head(features, condition)
    assert logits.shape == (3,)
    assert logits.std() > 0
    for place in range(3):
        one = slice(place, place + 1)
        alone = head([f[one] for f in features], condition[one])
        torch.testing.assert_close(alone, logits[one], rtol=1e-5, atol=1e-6)


def test_all_of_it_is_trained_and_a_gradient_reaches_every_tapped_block(head: nn.Module) -> None:
    features, condition = inputs(2, has_image(head))
    features = [feature.requires_grad_() for feature in features]
    head(features, condition).square().sum().backward()
    # A bias of keys moves all scores of a query alike, which softmax does not see.
    idle = {name for name, p in head.named_parameters() if p.grad is None or p.grad.abs().max() < 1e-9}
    assert all(name.endswith("key.bias") for name in idle)
    for feature in features:
        assert feature.grad is not None
        assert feature.grad.abs().sum(dim=2).all()


def test_the_order_of_tokens_within_a_block_is_the_blocks_to_tell(head: nn.Module) -> None:
    features, condition = inputs(2, has_image(head))
    turned = [feature.flip(1) for feature in features]
    torch.testing.assert_close(head(turned, condition), head(features, condition), rtol=1e-5, atol=1e-6)
    assert not torch.allclose(head(features[::-1], condition), head(features, condition))


@pytest.mark.parametrize("name", list(HEADS))
def test_the_semantic_head_alone_reads_the_caption(name: str) -> None:
    torch.manual_seed(0)
    head = HEADS[name]()
    features, condition = inputs(2, has_image(head))
    other = condition.with_text(condition.text.flip(0))
    assert torch.equal(head(features, condition), head(features, other)) == (name == "light")


def test_the_semantic_head_sees_the_condition_image() -> None:
    torch.manual_seed(0)
    head = HEADS["semantic with image"]()
    features, condition = inputs(2, True)
    assert condition.image_embedding is not None
    other = replace(condition, image_embedding=condition.image_embedding.flip(0))
    assert not torch.allclose(head(features, condition), head(features, other))


def test_without_an_embedding_the_first_frames_latents_are_what_is_seen_of_the_image() -> None:
    latents = torch.arange(2 * 3 * 2 * 2 * 2.0).reshape(2, 3, 2, 2, 2)
    tokens = image_tokens(Condition(torch.zeros(2, 4, 6), image_latents=latents))
    assert tokens is not None
    assert tokens.shape == (2, 4, 3)
    assert torch.equal(tokens[1, 2], latents[1, :, 0, 1, 0])
    assert image_token_dim({"in_channels": 36, "out_channels": 16}) == 20
    assert image_token_dim({"in_channels": 36, "out_channels": 16, "image_dim": 1280}) == 1280
    assert image_token_dim({"in_channels": 16, "out_channels": None}) is None


@pytest.mark.parametrize(("name", "image"), [("semantic", True), ("semantic with image", False)])
def test_an_image_must_be_there_just_where_the_head_has_eyes(name: str, image: bool) -> None:
    with pytest.raises(ValueError, match=r"expected (no|an) image, got (no|an) image\. Build the head with image_dim"):
        HEADS[name]()(*inputs(2, image))


def test_attention_is_that_of_pytorch() -> None:
    torch.manual_seed(0)
    attention = Attention(WIDTH, DIM)
    x, y = torch.randn(2, 3, WIDTH), torch.randn(2, 7, DIM)
    reference = nn.MultiheadAttention(WIDTH, WIDTH // 32, kdim=DIM, vdim=DIM, batch_first=True)
    layers = (attention.query, attention.key, attention.value)
    with torch.no_grad():
        for name, layer in zip("qkv", layers, strict=True):
            getattr(reference, f"{name}_proj_weight").copy_(layer.weight)
        reference.in_proj_bias.copy_(torch.cat([layer.bias for layer in layers]))
        reference.out_proj.load_state_dict(attention.out.state_dict())
        seen = F.layer_norm(y, (DIM,))
        between = x + reference(F.layer_norm(x, (WIDTH,)), seen, seen, need_weights=False)[0]
        first, _, last = attention.feed_forward
        expected = between + last(F.silu(first(F.layer_norm(between, (WIDTH,)))))
        torch.testing.assert_close(attention(x, y), expected, rtol=1e-5, atol=1e-6)
