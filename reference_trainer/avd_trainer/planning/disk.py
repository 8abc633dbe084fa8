"""What a run writes and reads: clips, checkpoints, the student."""

from __future__ import annotations

import math
from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch
from diffusers import AutoencoderKLWan
from torch.utils.flop_counter import FlopCounterMode

from avd_trainer.models.image_encoder import IMAGE_TOKENS
from avd_trainer.planning.description import Run, are_there
from avd_trainer.planning.meta_models import META, trained_shapes

LATENT_BYTES = 2
"""Of a latent's number: ``avd data`` stores float16."""
TEXT_BYTES = 2
"""Of a text embedding's number: bfloat16, where that loses nothing, as with UMT5."""

UMT5_DIM = 4096
"""Width of Wan2.1's text embedding: what tells its models, whose clips its VAE encodes, from the tiny one."""


class DiskPlan(NamedTuple):
    """Bytes on disk, and what encoding costs.

    Attributes:
        clips: Number of clips; 0 where none are stored.
        latent: Of a clip.
        image: Of what is kept of its first frame; 0 for text to video.
        text: Of its text embedding, at most: a caption that fills all tokens. A prompt takes as much.
        stored: Of the clips that are there; None where they are yet to be encoded.
        encoding: Operations that the VAE takes to encode a clip; None where there is nothing to encode.
        checkpoint: Of one.
        checkpoints: How many there are at most at once, the one in writing included.
        product: Of what the run leaves.
    """

    clips: int
    latent: int
    image: int
    text: int
    stored: int | None
    encoding: int | None
    checkpoint: int
    checkpoints: int
    product: int

    @property
    def data(self) -> int:
        """Of all clips: what is there, or what will be at most."""
        return self.clips * (self.latent + self.image + self.text) if self.stored is None else self.stored

    @property
    def together(self) -> int:
        """Of all of it."""
        return self.data + self.checkpoint * self.checkpoints + self.product


def plan_disk(run: Run, clips: int) -> DiskPlan:
    """What a run takes on disk.

    Args:
        run: The run.
        clips: How many clips there will be, where they are not there yet.
    """
    there = are_there(run.clip_folders)
    trained = trained_shapes(run)
    numbers = {name: sum(math.prod(shape.shape) for shape in shapes) for name, shapes in trained.items()}
    averaged = sum(numbers[role.name] for role in run.trained if role.averaged)
    # Two moments and a number of steps for each parameter.
    moments = sum(role.optimizers * (2 * numbers[role.name] + len(trained[role.name])) for role in run.trained)
    checkpoint = 4 * (sum(numbers.values()) + moments + averaged)  # all in float32
    encodes = bool(run.clip_folders) and not there and run.text_dim == UMT5_DIM
    return DiskPlan(
        clips=0 if not run.clip_folders else clips,
        latent=LATENT_BYTES * math.prod(run.latent_shape),
        image=_image_bytes(run),
        text=TEXT_BYTES * run.text_length * run.text_dim,
        stored=sum(map(_size, run.clip_folders)) if there else None,
        # For image to video also of the first frame, padded to a clip.
        encoding=vae_operations(run.latent_shape) * (1 if run.image is None else 2) if encodes else None,
        checkpoint=checkpoint,
        checkpoints=most_checkpoints(run),
        product=run.product_bytes * numbers[run.main],
    )


def most_checkpoints(run: Run) -> int:
    """The most checkpoints that are on disk at once, the one in writing included."""
    saved = {*range(run.checkpoint.every, run.steps + 1, run.checkpoint.every), run.steps}
    kept = {step for step in saved if run.checkpoint.keep_every and step % run.checkpoint.keep_every == 0}
    return len(kept) + min(len(saved - kept), run.checkpoint.keep_latest + 1)


def vae_operations(latent_shape: tuple[int, int, int, int]) -> int:
    """Operations that Wan2.1's VAE takes to encode a clip with latents ``(16, F, H, W)``, counted on the meta device.

    It takes the first frame alone and then four frames at a time, so from the third group on each takes the same.
    """
    _, frames, height, width = latent_shape
    if frames <= 3:
        return _encode(frames, height, width)
    two, three = _encode(2, height, width), _encode(3, height, width)
    return three + (frames - 3) * (three - two)


@cache
def _encode(frames: int, height: int, width: int) -> int:
    with torch.device(META):
        vae = AutoencoderKLWan()
    video = torch.empty(1, 3, 1 + 4 * (frames - 1), 8 * height, 8 * width, device=META)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        vae.encode(video)
    return int(counter.get_total_flops())


def _image_bytes(run: Run) -> int:
    if run.image is None:
        return 0
    # The mask is not stored: it is the same for all.
    return LATENT_BYTES * (math.prod(run.latent_shape) + IMAGE_TOKENS * (run.image.embedding_dim or 0))


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.iterdir() if path.is_file())
