"""Frames to vectors, by the real loading code from tiny random models on disk."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import CLIPImageProcessorPil, CLIPVisionModelWithProjection, ViTImageProcessorPil, ViTModel

from avd_trainer.data.preparation.image_models import BATCH, ImageEmbedder
from avd_trainer.runtime.errors import UserError
from tiny_image_models import CLIP_DIM, SIDE

FRAMES = np.random.default_rng(0).integers(0, 256, (3, SIDE, SIDE, 3), dtype=np.uint8)
PICTURES = [Image.fromarray(frame) for frame in FRAMES]


def test_clip_is_the_image_embedding_with_its_own_preprocessing(clip_folder: Path) -> None:
    model = CLIPVisionModelWithProjection.from_pretrained(clip_folder).eval()
    size = {"height": SIDE, "width": SIDE}
    pixels = CLIPImageProcessorPil(size={"shortest_edge": SIDE}, crop_size=size)(PICTURES, return_tensors="pt")
    with torch.no_grad():
        wanted = model(**pixels).image_embeds
    found = ImageEmbedder("clip", str(clip_folder), SIDE)(FRAMES)
    assert found.shape == (3, CLIP_DIM)
    torch.testing.assert_close(found, wanted / wanted.norm(dim=-1, keepdim=True), atol=1e-5, rtol=1e-4)


def test_dino_is_the_class_token(dino_folder: Path) -> None:
    model = ViTModel.from_pretrained(dino_folder, add_pooling_layer=False).eval()
    processor = ViTImageProcessorPil(
        size={"height": SIDE, "width": SIDE}, image_mean=[0.485, 0.456, 0.406], image_std=[0.229, 0.224, 0.225]
    )
    with torch.no_grad():
        wanted = model(**processor(PICTURES, return_tensors="pt")).last_hidden_state[:, 0]
    found = ImageEmbedder("dino", str(dino_folder), SIDE)(FRAMES)
    torch.testing.assert_close(found, wanted / wanted.norm(dim=-1, keepdim=True), atol=1e-5, rtol=1e-4)


def test_batches_make_no_difference(dino_folder: Path) -> None:
    many = np.random.default_rng(1).integers(0, 256, (BATCH + 3, SIDE, SIDE, 3), dtype=np.uint8)
    embed = ImageEmbedder("dino", str(dino_folder), SIDE)
    torch.testing.assert_close(embed(many), torch.cat([embed(one[None]) for one in many]), atol=1e-5, rtol=1e-4)


def test_a_model_of_another_kind_is_refused(dino_folder: Path) -> None:
    with pytest.raises(UserError, match=r"lacks \d+ weights of a CLIP model"):
        ImageEmbedder("clip", str(dino_folder), SIDE)


def test_frames_of_another_size_are_refused(dino_folder: Path) -> None:
    with pytest.raises(UserError, match=r"takes frames of 32 x 32 pixels.*Set side=32"):
        ImageEmbedder("dino", str(dino_folder), 224)
