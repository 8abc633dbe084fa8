"""Loading and saving models in diffusers' layout."""

from __future__ import annotations

from importlib import resources
from pathlib import Path

import torch
from diffusers import WanTransformer3DModel
from safetensors import SafetensorError

from avd_trainer.config import ArchitectureConfig
from avd_trainer.data.codec import BlockDCTCodec
from avd_trainer.data.text import HashTextEmbedding
from avd_trainer.errors import UserError

TEXT_LENGTH = 24
BUNDLED = "bundled:"


def load_transformer(source: str) -> WanTransformer3DModel:
    """Load a transformer in float32.

    Args:
        source: ``bundled:tiny``, or a folder with ``config.json`` and safetensors weights.

    Raises:
        UserError: If there is no such model.
    """
    folder = Path(source)
    if source.startswith(BUNDLED):
        folder = Path(str(resources.files("avd_trainer") / "assets" / f"{source.removeprefix(BUNDLED)}-teacher"))
    if not (folder / "config.json").is_file():
        raise UserError(
            f"teacher {source!r}: {folder} holds no config.json. Pass 'bundled:tiny' or a folder saved by diffusers' "
            "save_pretrained."
        )
    try:
        model: WanTransformer3DModel = WanTransformer3DModel.from_pretrained(
            folder, torch_dtype=torch.float32, use_safetensors=True, local_files_only=True
        )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise UserError(f"teacher {source!r} cannot be loaded from {folder}: {error}") from error
    if model.config.in_channels != BlockDCTCodec.channels:
        raise UserError(
            f"teacher {source!r} has {model.config.in_channels} latent channels, the data has {BlockDCTCodec.channels}."
        )
    return model


def build_transformer(config: ArchitectureConfig) -> WanTransformer3DModel:
    """A small Wan2.1 transformer with random weights."""
    return WanTransformer3DModel(
        patch_size=(1, 2, 2),
        in_channels=BlockDCTCodec.channels,
        out_channels=BlockDCTCodec.channels,
        rope_max_seq_len=64,
        **config.model_dump(),
    )


def build_text_embedding(model: WanTransformer3DModel) -> HashTextEmbedding:
    """The embedding of the width that ``model`` expects."""
    return HashTextEmbedding(TEXT_LENGTH, model.config.text_dim)
