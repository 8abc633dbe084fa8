"""A Stable Diffusion folder of toy size with made-up weights, for hosts that load their models from one."""

import json
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers

from without_gpu import declare_torchvision_operators

# Both packages import torchvision, when something of theirs is first asked for.
declare_torchvision_operators()


def save_tokenizer(folder: Path, name: str = "tokenizer") -> int:
    """CLIP's tokenizer over single characters."""
    (folder / name).mkdir(parents=True)
    characters = [chr(c) for c in range(ord("a"), ord("z") + 1)]
    words = [*characters, *(c + "</w>" for c in characters), "<|startoftext|>", "<|endoftext|>"]
    (folder / name / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(words)}))
    (folder / name / "merges.txt").write_text("#version: 0.2\n")
    files = [str(folder / name / file) for file in ("vocab.json", "merges.txt")]
    transformers.CLIPTokenizer(*files, model_max_length=77).save_pretrained(folder / name)
    return len(words)


def text_config(vocabulary: int, width: int = 16, layers: int = 1, **options: Any) -> Any:
    return transformers.CLIPTextConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=layers,
        num_attention_heads=2,
        bos_token_id=vocabulary - 2,
        eos_token_id=vocabulary - 1,
        pad_token_id=vocabulary - 1,
        **options,
    )


def save_tiny_sd(folder: Path, xl: bool = False, seed: int = 0) -> None:
    """Latents are ``[4, H / 2, W / 2]``; the U-Net's bottleneck has half of that again.

    ``xl`` adds what SDXL has besides: a second text encoder, whose pooled output goes into the U-Net with six numbers.
    """
    torch.manual_seed(seed)
    vocabulary = save_tokenizer(folder)
    config = text_config(vocabulary)
    conditions = {}
    if xl:
        save_tokenizer(folder, "tokenizer_2")
        config = text_config(vocabulary, width=8, projection_dim=16, layers=2)
        transformers.CLIPTextModelWithProjection(config).save_pretrained(folder / "text_encoder_2")
        conditions = {
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 8,
            "projection_class_embeddings_input_dim": 16 + 6 * 8,
        }
    transformers.CLIPTextModel(config).save_pretrained(folder / "text_encoder")
    diffusers.UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 16),
        norm_num_groups=4,
        layers_per_block=1,
        cross_attention_dim=16,
        attention_head_dim=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        **conditions,
    ).save_pretrained(folder / "unet")
    diffusers.AutoencoderKL(
        block_out_channels=(8, 8),
        norm_num_groups=4,
        latent_channels=4,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
    ).save_pretrained(folder / "vae")
    diffusers.DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear").save_pretrained(
        folder / "scheduler"
    )
