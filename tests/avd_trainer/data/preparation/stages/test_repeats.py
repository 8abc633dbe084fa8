from pathlib import Path
from typing import cast

import av
import cv2
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


@pytest.fixture
def soft() -> Frames:
    """``[48, 64, 96, 3]``: a camera that turns over soft shapes."""
    wide = cv2.resize(TEXTURE[:8, :60], (384, 64), interpolation=cv2.INTER_CUBIC).astype(np.uint8)
    return np.stack([wide[:, 3 * number : 3 * number + 96] for number in range(48)])[..., None].repeat(3, axis=-1)


def _through(codec: str, options: dict[str, str], path: Path, frames: Frames) -> Frames:
    with av.open(path, "w") as container:
        stream = cast(av.VideoStream, container.add_stream(codec, rate=16, options=options))
        stream.height, stream.width = frames.shape[1:3]
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode(None))
    with av.open(path) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


@given(times=st.integers(2, 16))
def test_pictures_that_are_shown_several_times_count_once(times: int) -> None:
    frames = scroll(5).repeat(times, axis=0)
    assert shown_rate(frames, 16.0) == pytest.approx(16 * 4 / (5 * times - 1))


def test_noise_of_compression_is_no_motion() -> None:
    frames = scroll(10).repeat(8, axis=0).astype(int)
    noisy = np.clip(frames + (RNG.random(frames.shape) < 0.1), 0, 255).astype(np.uint8)
    assert shown_rate(noisy, 16.0) == pytest.approx(2, rel=0.1)


@pytest.mark.parametrize(("codec", "options"), [("libx264", {"crf": "35"}), ("mpeg4", {})])
def test_repeated_pictures_are_found_where_bits_are_few(
    tmp_path: Path, codec: str, options: dict[str, str], soft: Frames
) -> None:
    """Later frames refine the picture that they repeat, so that hardly any two of them are alike."""
    slow, fast = (_through(codec, options, tmp_path / "video.mkv", video) for video in (soft[::8].repeat(8, 0), soft))
    assert shown_rate(slow, 16.0) < 4
    assert shown_rate(fast, 16.0) == 16.0


def test_a_fast_move_amid_slow_ones_and_a_cut_are_not_accused() -> None:
    slow = np.stack([TEXTURE[:, :48] // 2 + step for step in range(40)])[..., None].repeat(3, axis=-1)
    fast = slow.copy()
    fast[20:25] = scroll(5)
    assert shown_rate(fast, 16.0) == 16.0
    cut = slow.copy()
    cut[20:] = 255 - cut[20:]
    assert shown_rate(cut, 16.0) == 16.0


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
