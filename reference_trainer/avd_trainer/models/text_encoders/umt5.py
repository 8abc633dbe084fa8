"""Wan2.1's text encoder: captions to token embeddings."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Self

import torch
from torch import Tensor

from avd_trainer.models.pipeline_parts import load_part, transformers_library

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase, UMT5EncoderModel


class WanTextEncoder:
    """Captions to the token embeddings that Wan's transformers read, as diffusers' ``WanPipeline`` makes them.

    Captions are cleaned as there (with ftfy where it is installed, HTML entities, white space), cut at ``length``
    tokens and never padded: the transformer's input has zeros up to ``length``.

    Args:
        encoder: UMT5's encoder.
        tokenizer: Its tokenizer.
        length: Tokens at most. Wan's transformers were trained with 512.

    Attributes:
        length: As given.
        dim: Width of a token, 4096 for UMT5-XXL.
    """

    def __init__(self, encoder: UMT5EncoderModel, tokenizer: PreTrainedTokenizerBase, length: int = 512) -> None:
        self._encoder, self._tokenizer = encoder.eval().requires_grad_(False), tokenizer
        self.length: int = length
        self.dim: int = encoder.config.d_model

    @classmethod
    def from_pretrained(
        cls, source: str, device: torch.device | str = "cpu", dtype: torch.dtype = torch.bfloat16
    ) -> Self:
        """Load the text encoder of a pipeline.

        Args:
            source: A folder that diffusers saved, with ``text_encoder/`` and ``tokenizer/`` in it, or the name of one
                on the Hugging Face hub.
            device: Where to encode.
            dtype: The type of the encoder's weights and computation. UMT5-XXL's encoder takes 11 GB in bfloat16.

        Raises:
            UserError: If transformers is not installed, or there is no such text encoder.
        """
        transformers = transformers_library("text encoder")
        encoder = load_part(transformers.UMT5EncoderModel, source, "text_encoder", dtype=dtype, use_safetensors=True)
        tokenizer = load_part(transformers.AutoTokenizer, source, "tokenizer")
        return cls(encoder.to(device), tokenizer)

    @torch.no_grad()
    def __call__(self, captions: Sequence[str]) -> list[Tensor]:
        """Embed captions, in one batch.

        Returns:
            For each caption ``[l, dim]`` float32 on the CPU, l being its tokens in use: at least 1, for the end of the
            text, and at most ``length``.
        """
        # Semi-private, but it is what makes a caption mean to the teacher what it means in diffusers.
        from diffusers.pipelines.wan.pipeline_wan import prompt_clean

        if not captions:
            return []
        # Padded to the longest of the batch instead of to `length`: padding is masked, and costs as much as text.
        tokens = self._tokenizer(
            [prompt_clean(caption) for caption in captions],
            padding="longest",
            max_length=self.length,
            truncation=True,
            return_attention_mask=True,
            return_tensors="pt",
        ).to(self._encoder.device)
        hidden = self._encoder(tokens.input_ids, tokens.attention_mask).last_hidden_state.float().cpu()
        lengths = tokens.attention_mask.sum(dim=1).tolist()
        return [row[:used].clone() for row, used in zip(hidden, lengths, strict=True)]
