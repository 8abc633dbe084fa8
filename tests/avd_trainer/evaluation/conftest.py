"""Clips of moving shapes, and what they score."""

from typing import NamedTuple

import pytest

from avd_trainer.data.moving_shapes import MovingShapes, ShapeClip
from avd_trainer.evaluation.controls import Encoded
from avd_trainer.evaluation.reference import Reference, reference_of_shapes, score
from avd_trainer.models.codecs.block_dct import BlockDCTCodec


class Measured(NamedTuple):
    """Held-out captions, real clips of them, and the reference."""

    clips: list[ShapeClip]
    captions: list[str]
    reference: Reference

    def __call__(self, spoiled: Encoded) -> dict[str, float]:
        return score(spoiled, self.captions, self.reference)


@pytest.fixture(scope="session")
def codec() -> BlockDCTCodec:
    return BlockDCTCodec()


@pytest.fixture(scope="session")
def measured(codec: BlockDCTCodec) -> Measured:
    return make_measured(MovingShapes(24, 1_000_007, held_out=True), codec)


@pytest.fixture(scope="session")
def measured_open(codec: BlockDCTCodec) -> Measured:
    """Of captions that name the subjects alone; more of them, since sets of open ones differ more."""
    return make_measured(MovingShapes(96, 1_000_007, held_out=True, captions="subjects"), codec)


def make_measured(shapes: MovingShapes, codec: BlockDCTCodec) -> Measured:
    # Renderings that are not in the reference.
    clips = [shapes.render(index, 100) for index in range(len(shapes))]
    return Measured(clips, [clip.caption for clip in clips], reference_of_shapes(shapes, codec, sets=8))
