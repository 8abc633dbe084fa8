"""Clips show the same frames however one comes to them."""

from __future__ import annotations

from pathlib import Path

import av
import numpy as np
import pytest
from av.error import FFmpegError

from avd_trainer.data.preparation import clip_reader
from avd_trainer.data.preparation.clip_reader import VideoReader
from avd_trainer.data.preparation.stage import ClipSettings, FrameRequest, Span

CLIP = ClipSettings(frames=4, fps=8)


def write_video(path: Path, frames: int, *, rate: int = 16, size: tuple[int, int] = (32, 48), step: int = 2) -> Path:
    """Frame n is as bright as ``40 + step * n``; a key frame every 12."""
    with av.open(path, "w") as container:
        stream = container.add_stream("libx264", rate=rate, options={"crf": "4", "g": "12", "bf": "2"})
        stream.height, stream.width, stream.pix_fmt = *size, "yuv420p"
        for number in range(frames):
            pixels = np.full((*size, 3), 40 + step * number, dtype=np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode(None))
    return path


def numbers(frames: np.ndarray, step: int = 2) -> list[int]:
    return [round((float(frame.mean()) - 40) / step) for frame in frames]


def read(path: Path, span: Span, *requests: FrameRequest) -> list[np.ndarray]:
    with VideoReader(path, CLIP) as reader:
        return reader.read(span, requests)


ALL = FrameRequest((0, 1, 2, 3))


@pytest.mark.parametrize("suffix", ["mp4", "mkv", "avi"])
@pytest.mark.parametrize("jump", [True, False])
def test_frames_are_those_on_screen(tmp_path: Path, suffix: str, jump: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clip_reader, "_SEEK_BEYOND", 0.3 if jump else 1000.0)
    path = write_video(tmp_path / f"video.{suffix}", 80)
    for start in (0, 500, 1000, 3000, 4500):
        first = start * 16 // 1000
        (found,) = read(path, Span(start, start + 500), ALL)
        assert numbers(found) == [first, first + 2, first + 4, first + 6]


def test_clips_in_any_order_are_those_of_a_fresh_reader(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clip_reader, "_SEEK_BEYOND", 1.0)
    path = write_video(tmp_path / "video.mp4", 100, rate=24)
    spans = [Span(start, start + 500) for start in (0, 500, 700, 3000, 3500, 1000, 41, 3501)]
    fresh = [read(path, span, ALL)[0] for span in spans]
    with VideoReader(path, CLIP) as reader:
        for span, expected in zip(spans, fresh, strict=True):
            np.testing.assert_array_equal(reader.read(span, [ALL])[0], expected)


def test_each_request_gets_its_frames_at_its_size(tmp_path: Path) -> None:
    path = write_video(tmp_path / "video.mp4", 20, step=8)
    own, small, cut, cover = read(
        path,
        Span(0, 500),
        FrameRequest((1,)),
        FrameRequest((0, 3), short_side=16),
        FrameRequest((3,), cover=(16, 16)),
        FrameRequest((0, 1, 2), cover=(64, 128)),
    )
    assert (own.shape, small.shape, cut.shape, cover.shape) == (
        (1, 32, 48, 3), (2, 16, 24, 3), (1, 16, 16, 3), (3, 64, 128, 3),
    )  # fmt: skip
    assert [numbers(each, 8) for each in (own, small, cut, cover)] == [[2], [0, 6], [6], [0, 2, 4]]


def test_the_last_frame_stays_on_screen_for_its_time(tmp_path: Path) -> None:
    path = write_video(tmp_path / "slow.mp4", 4, rate=8, step=8)
    assert numbers(read(path, Span(0, 500), ALL)[0], 8) == [0, 1, 2, 3]
    with VideoReader(path, ClipSettings(frames=8, fps=16)) as reader:
        (found,) = reader.read(Span(0, 500), [FrameRequest(tuple(range(8)))])
        assert numbers(found, 8) == [0, 0, 1, 1, 2, 2, 3, 3]


def test_a_video_that_ends_before_the_clip_does_is_told_and_the_next_clip_is_read(tmp_path: Path) -> None:
    path = write_video(tmp_path / "video.mp4", 20)
    with VideoReader(path, CLIP) as reader:
        with pytest.raises(ValueError, match="it ends 2 frames behind 1 s; a clip has 4 at 8 per second"):
            reader.read(Span(1000, 1500), [ALL])
        assert numbers(reader.read(Span(500, 1000), [ALL])[0]) == [8, 10, 12, 14]


def test_clips_that_follow_each_other_are_decoded_in_one_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_video(tmp_path / "video.mp4", 20, rate=3)  # a frame on screen spans two clips
    opened: list[object] = []
    real = av.open
    monkeypatch.setattr(av, "open", lambda *arguments: opened.append(arguments) or real(*arguments))
    with VideoReader(path, CLIP) as reader:
        for start in range(0, 4500, 500):
            reader.read(Span(start, start + 500), [ALL])
    assert len(opened) == 1


@pytest.mark.parametrize("content", [b"", b"no video at all" * 99])
def test_what_is_no_video_is_an_error(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "bad.mp4").write_bytes(content)
    with pytest.raises((FFmpegError, ValueError)):
        read(tmp_path / "bad.mp4", Span(0, 500), ALL)


def test_frames_on_the_way_are_signs_of_life(tmp_path: Path) -> None:
    path = write_video(tmp_path / "video.mp4", 80)
    signs: list[None] = []
    with VideoReader(path, CLIP, lambda: signs.append(None)) as reader:
        reader.read(Span(4000, 4500), [ALL])
    assert 40 < len(signs) < 60
