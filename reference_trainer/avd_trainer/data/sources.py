"""From a configuration to clips: what to train on, and what to hold out."""

from __future__ import annotations

from typing import NamedTuple

import torch

from avd_trainer.config import ShapesData, VideosData
from avd_trainer.data.codec import BlockDCTCodec
from avd_trainer.data.latents import CaptionedLatents, encode_shapes
from avd_trainer.data.shapes import MovingShapes
from avd_trainer.data.videos import load_videos, video_files
from avd_trainer.progress import ProgressBar


class Clips(NamedTuple):
    """Attributes: train: clips to train on. held_out: clips that only evaluation sees."""

    train: CaptionedLatents
    held_out: CaptionedLatents


def load_clips(config: ShapesData | VideosData, codec: BlockDCTCodec) -> Clips:
    """Make or read the clips of a run, and encode them.

    Videos are split clip by clip, every fourth one is held out; with fewer than four clips both sets are all of them.

    Raises:
        UserError: If there is no readable video.
    """
    if isinstance(config, ShapesData):
        train = MovingShapes(config.clips, seed=2 * config.seed)
        held_out = MovingShapes(config.held_out, seed=2 * config.seed + 1)
        with ProgressBar("clips", len(train) + len(held_out)) as bar:
            return Clips(encode_shapes(train, codec, bar.advance), encode_shapes(held_out, codec, bar.advance))
    with ProgressBar("videos", len(video_files(config.path))) as bar:
        clips = load_videos(config.path, codec, on_file=bar.advance)
    is_held_out = torch.arange(len(clips)) % 4 == 3
    if not is_held_out.any():
        return Clips(clips, clips)
    return Clips(_select(clips, ~is_held_out), _select(clips, is_held_out))


def _select(clips: CaptionedLatents, mask: torch.Tensor) -> CaptionedLatents:
    return CaptionedLatents(clips.latents[mask], [clips.captions[i] for i in mask.nonzero().flatten().tolist()])
