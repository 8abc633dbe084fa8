from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from avd_trainer.data.preparation.stage import ClipSettings, Span
from avd_trainer.data.preparation.stages.span import SpanSettings, find_spans

CLIP = ClipSettings()


def spans(*scenes: tuple[int, int], clip: ClipSettings = CLIP, **settings: int) -> list[Span]:
    return find_spans([Span(*scene) for scene in scenes], clip, SpanSettings(**settings))


def test_a_scene_is_cut_into_clips_without_overlap() -> None:
    assert spans((0, 16_000)) == [(0, 5062), (5062, 10124), (10125, 15187)]


def test_margins_lie_at_cuts_and_not_at_the_ends_of_the_file() -> None:
    assert spans((0, 5050), (5050, 10_100), (10_100, 15_600), margin=50) == [(10_150, 15_212)]
    assert spans((0, 5100), (5100, 10_200), margin=50) == [(0, 5062), (5150, 10_212)]
    with pytest.raises(ValueError, match="79 frames"):
        spans((0, 5000), (5000, 6000), margin=100)


def test_at_most_so_many() -> None:
    assert len(spans((0, 60_000), most=3)) == 3


def test_a_clip_of_exactly_five_seconds_is_told_which_length_fits() -> None:
    with pytest.raises(ValueError, match=r"80 frames at 16 fps \(5\.00 s\), a clip takes 81; clips of 77 frames"):
        spans((0, 5000))
    assert spans((0, 5000), clip=ClipSettings(frames=77)) == [(0, 4812)]


@pytest.mark.parametrize("end", [0, 40, 250])
def test_too_short_for_any_clip(end: int) -> None:
    with pytest.raises(ValueError, match=r"a clip takes 81$"):
        spans((0, end))


@given(
    lengths=st.lists(st.integers(1, 9000), min_size=1, max_size=8),
    frames=st.sampled_from([5, 17, 49]),
    fps=st.sampled_from([8.0, 16.0, 23.976]),
    margin=st.integers(0, 200),
)
def test_spans_lie_within_scenes_in_order(lengths: list[int], frames: int, fps: float, margin: int) -> None:
    edges = [sum(lengths[:place]) for place in range(len(lengths) + 1)]
    scenes = [Span(*pair) for pair in pairwise(edges)]
    clip = ClipSettings(frames=frames, fps=fps)
    try:
        found = find_spans(scenes, clip, SpanSettings(margin=margin))
    except ValueError:
        assert max(lengths) < 1000 * frames / fps + 2 * margin + 2
        return
    assert all(one.end <= other.start + 1 for one, other in pairwise(found))
    for start, _ in found:
        last_frame = start + 1000 * (frames - 1) / fps
        assert any(scene.start <= start and last_frame <= scene.end for scene in scenes)
        assert all(abs(start - cut) >= margin for cut in edges[1:-1])
