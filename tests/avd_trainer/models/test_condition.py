"""What a model is told: it travels as one value, and guidance exchanges its text alone."""

from __future__ import annotations

import pytest
import torch
from diffusers import WanTransformer3DModel
from torch import Tensor

from avd_trainer.models.condition import Condition
from avd_trainer.models.samplers import clean_predictor, guided_velocity, schedule
from avd_trainer.models.transformer import VelocityModel


def condition(batch: int = 2, frames: int = 5) -> Condition:
    draws = torch.Generator().manual_seed(1)
    return Condition(
        torch.randn(batch, 3, 6, generator=draws),
        torch.randn(batch, 4, frames, 4, 4, generator=draws),
        torch.randn(batch, 7, 10, generator=draws),
    )


def image_model() -> WanTransformer3DModel:
    torch.manual_seed(0)
    return WanTransformer3DModel(
        patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=12, in_channels=6, out_channels=2, text_dim=6,
        freq_dim=8, ffn_dim=16, num_layers=1, image_dim=10, added_kv_proj_dim=24, rope_max_seq_len=16,
    ).eval()  # fmt: skip


def test_it_is_counted_cut_and_joined_by_samples() -> None:
    whole = condition(3)
    assert len(whole) == 3
    joined = Condition.cat([whole[:1], whole[[1, 2]]])
    for mine, other in zip(joined.tensors, whole.tensors, strict=True):
        assert torch.equal(mine, other)
    text = Condition(whole.text)
    assert text.tensors == (whole.text,)
    assert torch.equal(Condition.cat([text, text]).text, torch.cat([whole.text, whole.text]))
    assert all(tensor.device.type == "meta" for tensor in whole.to(torch.device("meta")).tensors)


def test_an_image_is_further_channels_and_tokens_of_the_transformer() -> None:
    module, told, x_t = image_model(), condition(), torch.randn(2, 2, 5, 4, 4)
    timesteps = torch.tensor([757.0, 300.0])
    assert told.image_latents is not None
    with torch.no_grad():
        expected = module(
            torch.cat([x_t, told.image_latents], dim=1), timesteps, told.text, told.image_embedding, return_dict=False
        )[0]
        assert torch.equal(VelocityModel(module)(x_t, timesteps, told), expected)
        low = VelocityModel(module.to(torch.bfloat16), dtype=torch.bfloat16)(x_t, timesteps, told)
    assert low.dtype == torch.float32
    torch.testing.assert_close(low, expected, rtol=0, atol=0.05)


@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_guidance_exchanges_the_text_and_keeps_the_image(scale: float) -> None:
    model, told, x_t = VelocityModel(image_model()), condition(), torch.randn(2, 2, 5, 4, 4)
    timesteps, negative = torch.tensor([757.0, 300.0]), torch.randn(3, 6)
    with torch.no_grad():
        guided = guided_velocity(model, x_t, timesteps, told, negative, scale)
        with_text = model(x_t, timesteps, told)
        without = Condition(negative.expand(2, 3, 6), told.image_latents, told.image_embedding)
        expected = model(x_t, timesteps, without)
    torch.testing.assert_close(guided, expected + scale * (with_text - expected), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("frames", "kept"), [(5, [0, 1, 2, 3, 4]), (3, [0, 2, 4]), (2, [0, 4])])
def test_at_a_lower_frame_rate_the_model_sees_the_image_latents_of_those_frames(frames: int, kept: list[int]) -> None:
    told = condition()
    seen: list[Tensor | None] = []

    def model(x_t: Tensor, timesteps: Tensor, condition: Condition) -> Tensor:
        seen.append(condition.image_latents)
        return 0.5 * x_t

    x_t, timesteps = torch.randn(2, 2, frames, 4, 4), torch.tensor([757.0, 300.0])
    x_0 = clean_predictor(model)(x_t, timesteps, told)
    assert torch.equal(x_0, schedule.velocity_to_x_0(0.5 * x_t, x_t, timesteps))
    (latents,) = seen
    assert latents is not None
    assert told.image_latents is not None
    assert torch.equal(latents, told.image_latents[:, :, kept])
    clean_predictor(model)(x_t, timesteps, Condition(told.text))
    assert seen[-1] is None
