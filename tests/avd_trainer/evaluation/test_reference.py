from dataclasses import replace

import pytest
import torch

from avd_trainer.data.moving_shapes import MovingShapes
from avd_trainer.evaluation.controls import CONTROLS, Encoded, RealClips
from avd_trainer.evaluation.measures import MEASURES, measure
from avd_trainer.evaluation.reference import (
    Reference,
    Spread,
    caught,
    is_worse,
    reference_of_clips,
    reference_of_shapes,
    score,
)
from avd_trainer.models.codecs.block_dct import BlockDCTCodec

from .conftest import Measured


def test_the_spread_is_that_of_renderings_against_the_next(codec: BlockDCTCodec) -> None:
    shapes = MovingShapes(4, 3, held_out=True)
    counted: list[None] = []
    reference = reference_of_shapes(shapes, codec, sets=3, on_set=lambda: counted.append(None))
    latents = [codec.encode(torch.stack([shapes.render(i, r).video for i in range(4)])) for r in range(3)]
    sets = [Encoded(each, codec.decode(each)) for each in latents]
    captions = [shapes[i].caption for i in range(4)]
    scores = [measure(*sets[r], captions, sets[(r + 1) % 3]) for r in range(3)]
    assert list(reference.spreads) == list(MEASURES)
    for name, spread in reference.spreads.items():
        values = torch.tensor([score[name] for score in scores], dtype=torch.float64)
        assert spread.mean == pytest.approx(float(values.mean()))
        assert spread.std == pytest.approx(float(values.std()), abs=1e-9)
        assert values.min() <= spread.low <= spread.high <= values.max()
    assert (reference.sets, reference.clips, len(counted)) == (3, 4, 3)
    assert torch.equal(reference.real.latents, latents[0])


def test_halves_of_real_clips_are_a_reference_where_nobody_can_render_more(
    measured: Measured, codec: BlockDCTCodec
) -> None:
    latents = measured.reference.real.latents
    reference = reference_of_clips(latents, codec.decode, sets=5)
    assert (reference.sets, reference.clips) == (5, len(latents) // 2)
    assert set(reference.spreads) == {name for name, each in MEASURES.items() if not each.needs_captions}
    assert all(spread.std > 0 for spread in reference.spreads.values())
    again = reference_of_clips(latents, codec.decode, sets=5)
    assert again.spreads == reference.spreads


@pytest.mark.parametrize("count", [8, 12])
def test_frozen_clips_are_caught_by_their_motion_without_captions(
    count: int, measured: Measured, codec: BlockDCTCodec
) -> None:
    """Of more clips than the reference has, as samples of a model are."""
    reference = reference_of_clips(measured.reference.real.latents[:count], codec.decode)
    clips = RealClips.of_shapes(measured.clips)
    found = caught(score(CONTROLS["frozen"].spoil(clips, 1.0, codec), None, reference), reference)
    assert "motion_distance" in found
    real = CONTROLS["frozen"].spoil(clips, 0.0, codec)
    assert "motion_distance" not in caught(score(real, None, reference), reference)


@pytest.mark.parametrize(
    ("name", "value", "worse"),
    [
        ("visible", 0.45, True),
        ("visible", 0.47, False),
        ("visible", 0.9, False),
        ("motion_distance", 0.55, True),
        ("motion_distance", 0.53, False),
        ("motion_distance", 0.1, False),
        ("jerk", 0.1, True),
        ("saturation", 0.45, True),
        ("saturation", 0.47, False),
        ("saturation", 0.55, True),
    ],
)
def test_worse_is_beyond_four_standard_deviations_on_the_bad_side(name: str, value: float, worse: bool) -> None:
    assert is_worse(name, value, Spread(0.5, 0.01, 0.48, 0.52)) is worse


def test_what_never_varies_has_a_margin_of_one_percent() -> None:
    always = Spread(1.0, 0.0, 1.0, 1.0)
    assert always.margin == 0.01
    assert not is_worse("visible", 0.995, always)
    assert is_worse("visible", 0.985, always)


@pytest.mark.parametrize(("std", "decimals"), [(0.0, 3), (0.0009, 4), (0.001, 3), (0.1, 3)])
def test_what_hardly_varies_has_a_decimal_more(std: float, decimals: int) -> None:
    assert Spread(1.0, std, 1.0, 1.0).decimals == decimals


def test_only_headline_measures_catch(measured: Measured) -> None:
    means = {name: spread.mean for name, spread in measured.reference.spreads.items()}
    assert caught(means, measured.reference) == []
    assert caught({**means, "temporal_loss": 99.0, "visible": 0.1}, measured.reference) == ["visible"]


def test_wrong_input_is_refused(measured: Measured, codec: BlockDCTCodec) -> None:
    with pytest.raises(ValueError, match="at least 3 sets are expected, so that their spread is known, got 2"):
        reference_of_shapes(MovingShapes(4, 3), codec, sets=2)
    with pytest.raises(ValueError, match="at least 4 real clips are expected, so that halves can be compared, got 3"):
        reference_of_clips(measured.reference.real.latents[:3], codec.decode)
    assert isinstance(replace(measured.reference, sets=1), Reference)
