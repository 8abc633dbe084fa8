"""Real clips of the demo: of the data that is configured, and never compared with themselves."""

from pathlib import Path

import pytest
import torch

from avd_trainer.config.sections import ShapesData, VideosData
from avd_trainer.data.in_memory import CaptionedLatents
from avd_trainer.data.moving_shapes import MovingShapes
from avd_trainer.data.sources import Clips, held_out_shapes
from avd_trainer.evaluation.controls import CONTROLS, Encoded, RealClips, make_controls
from avd_trainer.evaluation.reference import caught
from avd_trainer.models.codecs.block_dct import BlockDCTCodec
from avd_trainer.studies import real_side
from avd_trainer.studies.findings import measure_rows
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


def test_of_few_videos_frozen_samples_are_caught_by_their_motion(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Seven clips of two videos, and more samples than there are clips."""
    codec, shapes = BlockDCTCodec(), MovingShapes(15, 3)
    latents = codec.encode(torch.stack([shapes[index].video for index in range(15)]))
    held_out = CaptionedLatents(latents[:7], [f"video {index // 4}" for index in range(7)])
    monkeypatch.setattr(real_side, "load_clips", lambda *_: Clips(held_out, held_out))
    real = RealSide.load(VideosData(path=tmp_path), 16, codec)
    assert len(real.held_out) == 6
    places = [next(i for i in range(7) if torch.equal(clip, latents[i])) for clip in real.held_out.latents]
    assert real.held_out.captions == [held_out.captions[place] for place in places]
    assert len(set(places)) == 6
    assert places != sorted(places)

    others = Encoded(latents[7:], codec.decode(latents[7:]))
    frozen = CONTROLS["frozen"].spoil(RealClips(others.video), 1.0, codec)
    captions = [real.held_out.captions[index % 6] for index in range(8)]
    reference = real.reference(codec)
    found = measure_rows(
        {"teacher": others, "dmd": frozen, "avd": others},
        captions,
        real.held_out.captions,
        reference,
        real.controls(codec),
        of_shapes=False,
    )
    assert found.groups == {"dmd": [], "avd": []}
    assert "motion_distance" in caught(found.rows["dmd"], reference)
    assert "motion_distance" in caught(found.controls["frozen"], reference)
    assert "motion_distance" not in caught(found.rows["avd"], reference)
