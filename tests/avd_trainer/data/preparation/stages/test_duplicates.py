from pathlib import Path

import cv2
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.fft import dctn

from avd_trainer.data.preparation.stage import ClipSettings, Done, Frames, Row, Span
from avd_trainer.data.preparation.stages.duplicates import (
    BLOCK,
    Duplicates,
    DuplicatesSettings,
    frame_hashes,
    near_duplicates,
)


def scene(seed: int, lines: int = 96) -> Frames:
    """``[1, lines, 16 / 9 lines, 3]`` of soft blobs."""
    small = np.random.default_rng(seed).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    return cv2.resize(small, (lines * 16 // 9, lines), interpolation=cv2.INTER_CUBIC)[None]


def distance(one: int, other: int) -> int:
    return (one ^ other).bit_count()


def test_the_bits_are_those_of_the_lowest_frequencies() -> None:
    small = np.random.default_rng(0).integers(0, 256, (32, 32), dtype=np.uint8)
    low = dctn(small.astype(float), norm="ortho")[:8, :8].ravel()
    wanted = sum(2**place for place in range(64) if low[place] > np.median(low))
    assert frame_hashes(small[None, :, :, None].repeat(3, axis=-1)) == [wanted]


def test_size_compression_and_brightness_hardly_change_it() -> None:
    (wanted,) = frame_hashes(scene(0))
    smaller = cv2.resize(scene(0)[0], (96, 54), interpolation=cv2.INTER_AREA)
    packed = cv2.imdecode(cv2.imencode(".jpg", scene(0)[0], [cv2.IMWRITE_JPEG_QUALITY, 20])[1], cv2.IMREAD_COLOR)
    darker = (0.8 * scene(0)[0]).astype(np.uint8)
    for changed in (smaller, packed, darker):
        assert distance(frame_hashes(np.asarray(changed, np.uint8)[None])[0], wanted) <= 4


def test_hashes_of_unrelated_scenes_differ_in_about_half_their_bits() -> None:
    hashes = [frame_hashes(scene(seed))[0] for seed in range(20)]
    apart = [distance(one, other) for place, one in enumerate(hashes) for other in hashes[:place]]
    assert min(apart) > 12
    assert 28 < np.mean(apart) < 36


CLIPS = {"a": [0b0000, 0b0000], "b": [0b0001, 0b0000], "c": [0b0011, 0b0000], "d": [0xFF00, 0xFF00]}


@pytest.mark.parametrize(
    ("limit", "rank", "wanted"),
    [
        (0.0, {}, {}),
        (0.5, {}, {"b": "a"}),  # c is near b, which is not kept, and not near a
        (1.0, {}, {"b": "a", "c": "a"}),
        (0.5, {"b": 1.0}, {"a": "b", "c": "b"}),
        (0.5, {"c": 1.0}, {"b": "c"}),
    ],
)
def test_the_best_of_clips_that_are_near_is_kept(limit: float, rank: dict[str, float], wanted: dict[str, str]) -> None:
    assert near_duplicates(CLIPS, limit, dict.fromkeys(CLIPS, 0.0) | rank) == wanted


@given(order=st.permutations(range(40)), limit=st.sampled_from([0.0, 1.5, 3.0, 8.0]))
def test_the_order_does_not_matter_and_kept_clips_are_apart(order: list[int], limit: float) -> None:
    rng = np.random.default_rng(3)
    clips = {f"{number}": [int(x) for x in rng.integers(0, 2**5, 2)] for number in range(40)}
    rank = {clip: float(int(clip) % 4) for clip in clips}
    found = near_duplicates({f"{number}": clips[f"{number}"] for number in order}, limit, rank)
    assert found == near_duplicates(clips, limit, rank)
    kept = sorted(clips.keys() - found.keys())
    mean = {
        (one, other): np.mean([distance(*pair) for pair in zip(clips[one], clips[other], strict=True)])
        for one in clips
        for other in clips
    }
    assert all(mean[one, other] > limit for one in kept for other in kept if one != other)
    assert all(mean[clip, other] <= limit and rank[other] >= rank[clip] for clip, other in found.items())


def test_blocks_make_no_difference() -> None:
    """Copies far behind, within a block and across its edge."""
    rng = np.random.default_rng(4)
    count = 2 * BLOCK + 10
    clips = {f"{number:04}": [int(x) for x in rng.integers(0, 2**63, 8)] for number in range(count)}
    copies = {f"{BLOCK:04}": "0003", f"{BLOCK + 7:04}": f"{BLOCK + 1:04}", f"{count - 1:04}": f"{BLOCK - 1:04}"}
    clips |= {copy: clips[original] for copy, original in copies.items()}
    assert near_duplicates(clips, 6.0, dict.fromkeys(clips, 0.0)) == copies


def test_the_stage_keeps_the_larger_picture() -> None:
    stage = Duplicates(DuplicatesSettings(), ClipSettings(frames=17))
    scores = {}
    for clip, lines in (("a", 90), ("b", 180), ("c", 90)):
        row = Row(clip, Path("x.mp4"), clip, Span(0, 1000), {"probe": {"width": 16 * lines // 9, "height": lines}})
        seeds = [9 if clip == "c" else 0] * 8
        outcome = stage.run(row, np.concatenate([scene(seed, lines) for seed in seeds]))
        assert isinstance(outcome, Done)
        scores[clip] = outcome.values["hashes"]
    assert len(stage.frames(row).indices) == 8
    assert DuplicatesSettings().reject(scores) == {"a": "nearly the same as clip b"}
    assert DuplicatesSettings(distance=None).reject(scores) == {}


def test_no_clips_have_no_duplicates() -> None:
    assert near_duplicates({}, 6.0, {}) == {}


def test_clips_with_other_numbers_of_hashes_are_refused() -> None:
    with pytest.raises(ValueError, match=r"equally many hashes.*\[1, 2\]"):
        near_duplicates({"a": [1], "b": [1, 2]}, 6.0, {"a": 0.0, "b": 0.0})
