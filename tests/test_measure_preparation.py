"""The benchmark's mix of files is what it says, so that memory was measured over what is recorded."""

from __future__ import annotations

from pathlib import Path

import av
import pytest

import measure_preparation as benchmark
from small_videos import write_video


def test_a_clip_at_another_size_is_played_so_many_times(tmp_path: Path) -> None:
    clip = write_video(tmp_path / "clip.mp4", 6)
    path = benchmark._enlarge(clip, tmp_path / "large.mp4", 96, 160, 3)
    with av.open(path) as container:
        frames = list(container.decode(video=0))
    assert [(frame.height, frame.width) for frame in frames] == [(96, 160)] * 18
    assert [frame.time for frame in frames] == pytest.approx([number / 16 for number in range(18)])
    means = [frame.to_ndarray(format="gray").mean() for frame in frames]
    assert means[12:] == pytest.approx(means[:6], abs=1)


def test_files_take_turns_and_differ(tmp_path: Path) -> None:
    sources = [write_video(tmp_path / f"{frames}.mp4", frames) for frames in (4, 6)]
    benchmark._fill(tmp_path / "videos", sources, 5)
    files = [tmp_path / "videos" / f"{number}.mp4" for number in range(5)]
    assert len({file.read_bytes() for file in files}) == 5
    lengths = []
    for file in files:
        with av.open(file) as container:
            lengths.append(sum(1 for _ in container.decode(video=0)))
    assert lengths == [4, 6, 4, 6, 4]
