"""From a configuration to clips: what to train on, and what to hold out."""

from __future__ import annotations

from typing import NamedTuple

from avd_trainer.config import ShapesData, VideosData
from avd_trainer.data.codec import BlockDCTCodec
from avd_trainer.data.latents import CaptionedLatents, encode_shapes
from avd_trainer.data.shapes import MovingShapes
from avd_trainer.data.videos import load_videos, video_files
from avd_trainer.progress import ProgressBar

# Seeds from here on are for clips that nothing trains on.
HELD_OUT = 1_000_000


class Clips(NamedTuple):
    """What a run trains on, and what only evaluation sees."""

    train: CaptionedLatents
    held_out: CaptionedLatents


def load_clips(config: ShapesData | VideosData, codec: BlockDCTCodec) -> Clips:
    """Make or read the clips of a run, and encode them.

    Of each video the last quarter is held out.

    Raises:
        UserError: If there is no readable video.
    """
    if isinstance(config, ShapesData):
        train = MovingShapes(config.clips, config.seed)
        held_out = MovingShapes(config.held_out, HELD_OUT + config.seed)
        with ProgressBar("clips", len(train) + len(held_out)) as bar:
            return Clips(encode_shapes(train, codec, bar.advance), encode_shapes(held_out, codec, bar.advance))
    with ProgressBar("videos", len(video_files(config.path))) as bar:
        return Clips(*load_videos(config.path, codec, on_file=bar.advance))
