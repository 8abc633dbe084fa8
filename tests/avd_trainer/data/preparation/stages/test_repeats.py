import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from avd_trainer.data.preparation.stage import ClipSettings, Done, Frames, Row
from avd_trainer.data.preparation.stages.repeats import Repeats, shown_rate

RNG = np.random.default_rng(0)
TEXTURE = RNG.integers(0, 256, (32, 400), dtype=np.uint8)


def scroll(frames: int, pixels: int = 3) -> Frames:
    """``[frames, 32, 48, 3]`` of a texture that moves by ``pixels`` a frame."""
    shown = [TEXTURE[:, pixels * number : pixels * number + 48] for number in range(frames)]
    return np.stack(shown)[..., None].repeat(3, axis=-1)


@given(times=st.integers(2, 16))
def test_pictures_that_are_shown_several_times_count_once(times: int) -> None:
    frames = scroll(5).repeat(times, axis=0)
    assert shown_rate(frames, 16.0) == pytest.approx(16 * 4 / (5 * times - 1))


def test_noise_of_compression_is_no_motion() -> None:
    frames = scroll(10).repeat(8, axis=0).astype(int)
    noisy = np.clip(frames + (RNG.random(frames.shape) < 0.1), 0, 255).astype(np.uint8)
    assert shown_rate(noisy, 16.0) == pytest.approx(2, rel=0.1)


def test_every_picture_counts_if_all_differ() -> None:
    assert shown_rate(scroll(40), 16.0) == 16.0


def test_a_still_scene_and_a_slow_one_are_not_accused() -> None:
    still = scroll(1).repeat(40, axis=0)
    assert shown_rate(still, 16.0) == 16.0
    slow = np.stack([(0.9 * scroll(1)[0] + 0.01 * step * step) for step in range(40)]).round().astype(np.uint8)
    assert shown_rate(slow, 16.0) == 16.0


def test_it_asks_for_consecutive_frames(row: Row) -> None:
    assert Repeats(Repeats.Settings(), ClipSettings()).frames(row).indices == tuple(range(24, 57))
    stage = Repeats(Repeats.Settings(), ClipSettings(frames=17))
    assert stage.frames(row).indices == tuple(range(17))
    outcome = stage.run(row, scroll(9).repeat(2, axis=0)[:17])
    assert isinstance(outcome, Done)
    assert outcome.values == {"shown": 8.0}
