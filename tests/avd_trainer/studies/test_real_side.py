"""Real clips of the demo: of the data that is configured, and never compared with themselves."""

import torch

from avd_trainer.config.sections import ShapesData
from avd_trainer.data.sources import held_out_shapes
from avd_trainer.evaluation.controls import RealClips, make_controls
from avd_trainer.models.codecs.block_dct import BlockDCTCodec
from avd_trainer.studies.real_side import RealSide


def test_held_out_shapes_are_in_the_colours_of_the_data() -> None:
    codec = BlockDCTCodec()
    data = ShapesData(clips=4, saturation=1.3)
    real = RealSide.load(data, 3, codec)
    assert real.shapes is not None
    assert real.shapes.saturation == 1.3
    assert real.held_out.captions == [held_out_shapes(data, 3)[index].caption for index in range(3)]
    plain = RealSide.load(ShapesData(clips=4), 3, codec)
    assert not torch.equal(real.held_out.latents, plain.held_out.latents)


def test_controls_are_not_of_the_clips_that_rows_are_compared_with() -> None:
    codec = BlockDCTCodec()
    real = RealSide.load(ShapesData(clips=4), 3, codec)
    assert real.shapes is not None
    found = real.controls(codec)
    for rendering, same in ((0, False), (1, True)):
        clips = RealClips.of_shapes([real.shapes.render(index, rendering) for index in range(3)])
        own = make_controls(clips, codec)
        assert all(torch.equal(found[name].latents, own[name].latents) is same for name in found if name != "noise")
