"""Encoders of the model that data is made for."""

from __future__ import annotations

import torch

from avd_trainer.config.sections import ArchitectureConfig
from avd_trainer.data.encode import WAN_NEGATIVE_PROMPT, HashTextEncoder, ImageCondition, TextEncoder, VideoEncoder
from avd_trainer.models.codecs.block_dct import BlockDCTCodec
from avd_trainer.models.pipeline_parts import TINY, has_part, part_not_loaded
from avd_trainer.models.text_encoders.hashed import TEXT_LENGTH


def load_video_encoder(model: str) -> VideoEncoder:
    """The codec of a Wan pipeline (folder or hub id) or of :data:`TINY`, on the GPU if there is one.

    Raises:
        UserError: If it cannot be loaded.
    """
    if model == TINY:
        return BlockDCTCodec()
    from avd_trainer.models.codecs.wan import WanCodec

    # float32 as in Wan2.1's own code: encoding is done once, and its rounding would be learnt.
    return WanCodec.from_pretrained(model, device(), torch.float32)


def load_text_encoder(model: str) -> TextEncoder:
    """The text encoder of a Wan pipeline (folder or hub id) or of :data:`TINY`, on the GPU if there is one.

    Raises:
        UserError: If it cannot be loaded.
    """
    if model == TINY:
        return HashTextEncoder(TEXT_LENGTH, ArchitectureConfig().text_dim)
    from avd_trainer.models.text_encoders.umt5 import WanTextEncoder

    return WanTextEncoder.from_pretrained(model, device(), torch.bfloat16)


def load_image_condition(model: str) -> ImageCondition:
    """What makes the condition of image to video; with the image encoder of a Wan pipeline that has one.

    Raises:
        UserError: If it cannot be loaded.
    """
    if model == TINY or not has_part(model, "image_encoder"):
        return ImageCondition(None)
    from avd_trainer.models.image_encoder import WanImageEncoder

    return ImageCondition(WanImageEncoder.from_pretrained(model, device()))


def fetch_encoders(model: str) -> None:
    """Get what the functions above load from the Hugging Face hub, once for all processes that do.

    Args:
        model: An id of the hub.

    Raises:
        UserError: If it cannot be had.
    """
    from huggingface_hub import snapshot_download

    parts = ("vae", "text_encoder", "tokenizer", "image_encoder", "image_processor")
    try:
        snapshot_download(model, allow_patterns=["model_index.json", *(f"{part}/*" for part in parts)])
    except Exception as error:  # of the hub's HTTP library, and more
        raise part_not_loaded(model, "vae", error) from error


def negative_prompt_for(model: str, given: str | None) -> str:
    """The prompt of the unconditional prediction; that of the model where none is given."""
    if given is not None:
        return given
    # The tiny teacher was trained with empty captions for guidance.
    return "" if model == TINY else WAN_NEGATIVE_PROMPT


def device() -> str:
    """Where to encode."""
    return "cuda" if torch.cuda.is_available() else "cpu"
