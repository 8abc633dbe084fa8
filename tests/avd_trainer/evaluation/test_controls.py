"""Spoiled clips are caught; real ones are not."""

import pytest
import torch

from avd_trainer.data.moving_shapes import MovingShapes
from avd_trainer.evaluation.controls import CONTROLS, ERASED, OF_SHAPES, REPEATED, Encoded, RealClips, make_controls
from avd_trainer.evaluation.reference import caught, reference_of_clips, score
from avd_trainer.models.codecs.block_dct import BlockDCTCodec

from .conftest import Measured

# By which headline measures each has to be caught, whatever else sees it.
SEEN_BY = {
    "noise": {"visible", "kind", "preserved", "direction", "jerk", "spatial_frequency", "motion_distance"},
    "frozen": {"direction", "temporal_frequency", "motion_distance"},
    "shuffled": {"preserved", "direction", "jerk", "temporal_frequency", "motion_distance"},
    "saturated": {"color_error", "saturation_error"},
    "erased": {"visible", "preserved"},
    "blurred": {"spatial_frequency"},
}
FULL = [name for name in CONTROLS if name != REPEATED]


@pytest.mark.parametrize("name", FULL)
def test_every_control_is_caught(name: str, measured: Measured, codec: BlockDCTCodec) -> None:
    control = CONTROLS[name]
    spoiled = control.spoil(RealClips.of_shapes(measured.clips), control.strength, codec)
    found = caught(measured(spoiled), measured.reference)
    assert set(found) >= SEEN_BY[name]


@pytest.mark.parametrize("name", CONTROLS)
def test_every_control_of_open_captions_is_caught(name: str, measured_open: Measured, codec: BlockDCTCodec) -> None:
    control = CONTROLS[name]
    spoiled = control.spoil(RealClips.of_shapes(measured_open.clips), control.strength, codec)
    found = set(caught(measured_open(spoiled), measured_open.reference))
    if name == REPEATED:
        # Each clip is as real as can be. What is no share may show that there are few, each with errors of its own.
        assert found >= {"variety", "repetition"}
        assert not found & {"visible", "kind", "preserved", "placed", "direction", "background_error"}
    else:
        assert found >= SEEN_BY[name]


def test_real_clips_of_open_captions_are_not_caught(measured_open: Measured, codec: BlockDCTCodec) -> None:
    same = CONTROLS[REPEATED].spoil(RealClips.of_shapes(measured_open.clips), CONTROLS[REPEATED].unspoiled, codec)
    assert caught(measured_open(same), measured_open.reference) == []


@pytest.mark.parametrize("name", FULL)
def test_without_strength_clips_are_real_and_not_caught(name: str, measured: Measured, codec: BlockDCTCodec) -> None:
    clips = RealClips.of_shapes(measured.clips)
    same = CONTROLS[name].spoil(clips, CONTROLS[name].unspoiled, codec)
    assert torch.allclose(same.latents, codec.encode(clips.video), atol=1e-4)
    assert caught(measured(same), measured.reference) == []


@pytest.mark.parametrize("rendering", range(101, 106))
def test_other_renderings_are_not_caught(rendering: int, measured: Measured, codec: BlockDCTCodec) -> None:
    shapes = MovingShapes(len(measured.clips), 1_000_007, held_out=True)
    latents = codec.encode(torch.stack([shapes.render(i, rendering).video for i in range(len(shapes))]))
    values = measured(Encoded(latents, codec.decode(latents)))
    assert caught(values, measured.reference) == []


def test_latents_and_video_are_of_one_thing(measured: Measured, codec: BlockDCTCodec) -> None:
    controls = make_controls(RealClips.of_shapes(measured.clips), codec)
    assert list(controls) == FULL
    for spoiled in controls.values():
        assert torch.equal(spoiled.video, codec.decode(spoiled.latents))
        # What was decoded is encoded to the same latents: nothing is in the one that is not in the other.
        assert torch.allclose(codec.encode(spoiled.video), spoiled.latents, atol=1e-4)


def test_noise_has_unit_variance(measured: Measured, codec: BlockDCTCodec) -> None:
    latents = CONTROLS["noise"].spoil(RealClips.of_shapes(measured.clips), 1.0, codec).latents
    # Changes in time do not exist in a latent frame of one frame.
    assert torch.allclose(latents[:, :, 1:].var(dim=(0, 2, 3, 4)), torch.ones(16), atol=0.1)
    assert torch.allclose(latents.mean(dim=(0, 2, 3, 4)), torch.zeros(16), atol=0.05)


def test_a_blur_keeps_what_is_flat_and_spreads_what_is_not(codec: BlockDCTCodec) -> None:
    video = torch.full((1, 3, 5, 32, 32), 0.4)
    assert torch.allclose(CONTROLS["blurred"].spoil(RealClips(video), 0.8, codec).video, video, atol=1e-5)
    video[..., 16:] = 0.6  # an edge between two blocks of the codec, which it keeps
    blurred = CONTROLS["blurred"].spoil(RealClips(video), 0.8, codec).video
    assert torch.allclose(blurred.mean(), torch.tensor(0.5), atol=1e-3)
    assert blurred[..., 15].mean() > 0.42


def test_clips_without_captions_get_all_controls_but_those_of_shapes(measured: Measured, codec: BlockDCTCodec) -> None:
    clips = RealClips(torch.stack([clip.video for clip in measured.clips]))
    controls = make_controls(clips, codec)
    assert set(CONTROLS) - set(controls) == set(OF_SHAPES)
    reference = reference_of_clips(codec.encode(clips.video), codec.decode)
    for name, spoiled in controls.items():
        assert caught(score(spoiled, None, reference), reference) != [], name
    with pytest.raises(ValueError, match=r"without one of their objects are expected, got none. Use RealClips"):
        CONTROLS[ERASED].spoil(clips, 1.0, codec)
    with pytest.raises(ValueError, match=r"leave something open are expected, got others. Use captions='subjects'"):
        CONTROLS[REPEATED].spoil(RealClips.of_shapes(measured.clips), 1.0, codec)
