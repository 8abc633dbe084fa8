"""CLIP and DINO with random weights, small enough for tests, as folders that transformers loads."""

from pathlib import Path

import torch
from transformers import CLIPConfig, CLIPModel, ViTConfig, ViTModel

SIDE = 32
CLIP_DIM = 24


def save_clip_model(folder: Path) -> Path:
    torch.manual_seed(0)
    small = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    vision = small | {"image_size": SIDE, "patch_size": 8, "projection_dim": CLIP_DIM}
    text = small | {"vocab_size": 64, "max_position_embeddings": 8}
    CLIPModel(CLIPConfig(vision_config=vision, text_config=text, projection_dim=CLIP_DIM)).save_pretrained(folder)
    return folder


def save_dino_model(folder: Path) -> Path:
    torch.manual_seed(1)
    config = ViTConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=SIDE,
        patch_size=8,
    )
    ViTModel(config, add_pooling_layer=False).save_pretrained(folder)
    return folder
