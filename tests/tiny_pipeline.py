"""A complete Wan pipeline with random weights, small enough for a test, in diffusers' layout on disk."""

from __future__ import annotations

import string
from collections.abc import Sequence
from pathlib import Path

import torch
from diffusers import (
    AutoencoderKLWan,
    UniPCMultistepScheduler,
    WanImageToVideoPipeline,
    WanPipeline,
    WanTransformer3DModel,
)
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    CLIPVisionModel,
    T5TokenizerFast,
    UMT5Config,
    UMT5EncoderModel,
)

from avd_core import LatentFrameInterpolator
from avd_integrations.diffusers import FewStepScheduler

WORDS = ("a", "and", "blue", "circle", "down", "green", "left", "moves", "red", "right", "square", "the", "up")


def build(
    folder: Path,
    *,
    seed: int = 0,
    text_dim: int = 16,
    layers: int = 2,
    heads: int = 2,
    head_dim: int = 12,
    freq_dim: int = 16,
    image_dim: int | None = None,
    few_steps: Sequence[float] | None = None,
) -> Path:
    """Save a pipeline; the same arguments give the same bytes of weights.

    The VAE has Wan's strides (4 in time, 8 in space) and 16 channels; the tokenizer knows :data:`WORDS` and spells
    others in letters.

    Args:
        folder: Where to; made where it is missing.
        seed: Seed of all weights.
        text_dim: Width of the text encoder's tokens; even.
        layers: Blocks of the transformer.
        heads: Its attention heads.
        head_dim: Their width.
        freq_dim: Width of its timestep embedding.
        image_dim: Makes it one of image to video, in the layout of Wan2.1: width of the image encoder's tokens; an
            image has 5.
        few_steps: Makes it a student that is sampled at these timesteps; None for a teacher of many.

    Returns:
        The folder.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        tokenizer = _tokenizer()
        encoder = UMT5EncoderModel(
            UMT5Config(vocab_size=len(tokenizer), d_model=text_dim, d_kv=4, d_ff=16, num_layers=1, num_heads=2)
        )
        vae = AutoencoderKLWan(base_dim=4, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1)
        transformer = WanTransformer3DModel(
            num_attention_heads=heads,
            attention_head_dim=head_dim,
            ffn_dim=32,
            num_layers=layers,
            freq_dim=freq_dim,
            text_dim=text_dim,
            rope_max_seq_len=64,
            **({} if image_dim is None else _image_options(image_dim, heads * head_dim)),
        )
        image_encoder = None if image_dim is None else _image_encoder(image_dim)
    many_steps = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)
    parts = {
        "tokenizer": tokenizer,
        "text_encoder": encoder.eval(),
        "vae": vae.eval(),
        "transformer": transformer.eval(),
        "scheduler": many_steps if few_steps is None else FewStepScheduler(few_steps),
    }
    if image_encoder is None:
        WanPipeline(**parts).save_pretrained(folder)
    else:
        processor = CLIPImageProcessor(size={"shortest_edge": 16}, crop_size=16)
        WanImageToVideoPipeline(image_encoder=image_encoder, image_processor=processor, **parts).save_pretrained(folder)
    return folder


def save_interpolator(folder: Path, channels: int = 16, *, seed: int = 5) -> Path:
    """A network for half rate whose output is not zero, as that of an untrained one is."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        interpolator = LatentFrameInterpolator(channels, (8, 8, 8))
        torch.nn.init.normal_(interpolator.output.weight, std=0.3)
    interpolator.save_pretrained(folder)
    return folder


def _image_options(image_dim: int, width: int) -> dict[str, int]:
    return {"in_channels": 36, "out_channels": 16, "image_dim": image_dim, "added_kv_proj_dim": width}


def _image_encoder(image_dim: int) -> CLIPVisionModel:
    return CLIPVisionModel(
        CLIPVisionConfig(
            hidden_size=image_dim,
            intermediate_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            image_size=16,
            patch_size=8,
        )
    ).eval()


def _tokenizer() -> T5TokenizerFast:
    """A Unigram model, as UMT5's; ``▁`` begins a word."""
    special = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", -10.0)]
    words = [(f"▁{word}", -2.0) for word in WORDS]
    letters = [(letter, -5.0) for letter in ("▁", *string.ascii_lowercase)]
    return T5TokenizerFast(vocab=special + words + letters, extra_ids=0)
