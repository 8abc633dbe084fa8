"""Wan2.1's image encoder: a first frame to the tokens that an image-to-video transformer reads."""

from __future__ import annotations

from typing import TYPE_CHECKING, Self

import torch
from torch import Tensor

from avd_trainer.models.pipeline_parts import load_part, transformers_library

if TYPE_CHECKING:
    from transformers import CLIPImageProcessor, CLIPVisionModel


IMAGE_TOKENS = 257
"""Of an image, in the ViT-H/14 of Wan2.1: 16 x 16 patches and one for the whole."""


class WanImageEncoder:
    """Images to embeddings, as diffusers' ``WanImageToVideoPipeline`` makes them: CLIP's last layer but one.

    Args:
        encoder: CLIP's vision model.
        processor: What resizes, cuts and scales images for it.

    Attributes:
        tokens: T, of an image: :data:`IMAGE_TOKENS` for Wan2.1's.
        dim: Their width, 1280 for that.
    """

    def __init__(self, encoder: CLIPVisionModel, processor: CLIPImageProcessor) -> None:
        self._encoder, self._processor = encoder.eval().requires_grad_(False), processor
        self.tokens: int = (encoder.config.image_size // encoder.config.patch_size) ** 2 + 1
        self.dim: int = encoder.config.hidden_size

    @classmethod
    def from_pretrained(
        cls, source: str, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
    ) -> Self:
        """Load the image encoder of a pipeline.

        Args:
            source: A folder that diffusers saved, with ``image_encoder/`` and ``image_processor/`` in it, or the name
                of one on the Hugging Face hub.
            device: Where to encode.
            dtype: The type of its weights and computation. diffusers computes in float32: 2.5 GB.

        Raises:
            UserError: If transformers is not installed, or there is no such encoder.
        """
        transformers = transformers_library("image encoder")
        encoder = load_part(transformers.CLIPVisionModel, source, "image_encoder", dtype=dtype, use_safetensors=True)
        processor = load_part(transformers.CLIPImageProcessor, source, "image_processor")
        return cls(encoder.to(device), processor)

    @torch.no_grad()
    def __call__(self, image: Tensor) -> Tensor:
        """Embed an image ``[3, H, W]`` in [0, 1], RGB.

        Returns:
            ``[T, dim]`` float32 on the CPU.
        """
        from PIL import Image

        # Through 8 bits, as pictures come: the processor resizes those as CLIP was trained.
        pixels = (255 * image.float().clamp(0, 1)).round().to("cpu", torch.uint8).permute(1, 2, 0).numpy()
        inputs = self._processor(images=Image.fromarray(pixels), return_tensors="pt")
        weights = next(self._encoder.parameters())
        hidden = self._encoder(inputs.pixel_values.to(weights.device, weights.dtype), output_hidden_states=True)
        tokens: Tensor = hidden.hidden_states[-2][0].float().cpu()
        return tokens
