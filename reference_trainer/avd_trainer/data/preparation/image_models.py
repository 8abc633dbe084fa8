"""Models that turn frames into vectors: CLIP and DINO, through transformers, without torchvision."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from avd_trainer.data.preparation.stage import Frames
from avd_trainer.runtime.errors import UserError

ImageModel = Literal["clip", "dino"]

# Means and standard deviations of red, green and blue that the models were trained with: CLIP's own, and ImageNet's.
NORMALISATION: dict[ImageModel, tuple[tuple[float, float, float], tuple[float, float, float]]] = {
    "clip": ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)),
    "dino": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
}
# Frames that go through the model at once.
BATCH = 16


class ImageEmbedder:
    """Frames to vectors of length 1.

    Args:
        kind: ``clip``: the projected image embedding. ``dino``: the class token of a vision transformer, behind its
            last normalisation.
        source: Folder, or id of the Hugging Face hub.
        side: Height and width of the frames that it will get; has to be the model's own.

    Raises:
        UserError: If the source is no such model, lacks weights, or takes frames of another size.
        OSError: If it cannot be loaded.
    """

    def __init__(self, kind: ImageModel, source: str, side: int) -> None:
        from transformers import CLIPModel, ViTModel
        from transformers.utils import logging

        logging.disable_progress_bar()
        self._is_clip = kind == "clip"
        model, loading = (
            CLIPModel.from_pretrained(source, output_loading_info=True)
            if self._is_clip
            else ViTModel.from_pretrained(source, output_loading_info=True, add_pooling_layer=False)
        )
        if loading["missing_keys"]:
            raise UserError(
                f"{source} lacks {len(loading['missing_keys'])} weights of a {kind.upper()} model, such as "
                f"{min(loading['missing_keys'])}. Name a model of that kind."
            )
        own = (model.config.vision_config if self._is_clip else model.config).image_size
        if own != side:
            raise UserError(
                f"{source} takes frames of {own} x {own} pixels, got the setting side={side}. Set side={own}."
            )
        self._device = "cuda" if torch.cuda.is_available() else "cpu"
        self._model: Any = model.float().eval().to(self._device)
        self._mean, self._std = (torch.tensor(values).view(3, 1, 1) for values in NORMALISATION[kind])

    @torch.inference_mode()
    def __call__(self, frames: Frames) -> Tensor:
        """``[F, side, side, 3]`` uint8 RGB to ``[F, D]`` float32 on the CPU."""
        vectors = []
        for part in torch.split(torch.from_numpy(frames), BATCH):
            pixels = ((part.permute(0, 3, 1, 2).float() / 255 - self._mean) / self._std).to(self._device)
            if self._is_clip:
                vectors.append(self._model.visual_projection(self._model.vision_model(pixels).pooler_output))
            else:
                vectors.append(self._model(pixels).last_hidden_state[:, 0])
        return F.normalize(torch.cat(vectors).cpu(), dim=-1)
