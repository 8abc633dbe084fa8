"""The real clips of a demo: what students learn from, and what they are compared with."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from avd_trainer.config.sections import ShapesData, VideosData
from avd_trainer.data.in_memory import CaptionedLatents, encode_shapes
from avd_trainer.data.moving_shapes import MovingShapes
from avd_trainer.data.sources import held_out_shapes, load_clips
from avd_trainer.evaluation.controls import Encoded, RealClips, controls_of_shapes, make_controls
from avd_trainer.evaluation.reference import SETS, Reference, reference_of_clips, reference_of_shapes
from avd_trainer.models.codecs.block_dct import BlockDCTCodec
from avd_trainer.runtime.errors import UserError
from avd_trainer.runtime.progress import ProgressBar

FEWEST_CLIPS = 4
"""Held-out clips without which nothing is known of how real clips vary."""


@dataclass(frozen=True)
class RealSide:
    """Real clips.

    Attributes:
        train: For training.
        held_out: For comparing; nothing is trained on them, and of shapes not on their captions either.
        shapes: What the held-out clips are made from, where they are moving shapes.
    """

    train: CaptionedLatents
    held_out: CaptionedLatents
    shapes: MovingShapes | None

    @classmethod
    def load(cls, data: ShapesData | VideosData, samples: int, codec: BlockDCTCodec) -> RealSide:
        """Make or read clips.

        Args:
            data: Which.
            samples: How many are held out, of shapes. Of videos an even number, at most twice as many, in random order:
                halves of them are what a model's samples are compared with.
            codec: Encodes them.

        Raises:
            UserError: If there is no readable video, or too little of them.
        """
        if isinstance(data, ShapesData):
            shapes = held_out_shapes(data, samples)
            return cls(load_clips(data, codec, held_out=False).train, encode_shapes(shapes, codec), shapes)
        train, held_out = load_clips(data, codec)
        if len(held_out) < FEWEST_CLIPS:
            raise UserError(
                f"The last quarters of the videos in {data.path} give {len(held_out)} clips, and at least "
                f"{FEWEST_CLIPS} are needed to compare with. Add more or longer videos."
            )
        count = min(len(held_out) // 2, samples) * 2
        order = torch.randperm(len(held_out), generator=torch.Generator().manual_seed(0))[:count]
        captions = [held_out.captions[place] for place in order.tolist()]
        return cls(train, CaptionedLatents(held_out.latents[order], captions), None)

    def reference(self, codec: BlockDCTCodec) -> Reference:
        """What sets of real clips score."""
        if self.shapes is None:
            return reference_of_clips(self.held_out.latents, codec.decode)
        with ProgressBar("real clips, rendered and measured", SETS) as bar:
            return reference_of_shapes(self.shapes, codec, on_set=bar.advance)

    def controls(self, codec: BlockDCTCodec) -> Mapping[str, Encoded]:
        """Real clips, spoiled in known ways."""
        if self.shapes is None:
            return make_controls(RealClips(codec.decode(self.held_out.latents)), codec)
        return controls_of_shapes(self.shapes, codec)
