"""What is kept while a file is scanned is what a reader would decode."""

from __future__ import annotations

from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import NamedTuple

import av
import numpy as np
import pytest
from av.error import FFmpegError
from av.video.reformatter import VideoReformatter

from avd_trainer.data.preparation import clip_reader
from avd_trainer.data.preparation.clip_reader import VideoReader
from avd_trainer.data.preparation.file_scan import FileScan, KeptFrames
from avd_trainer.data.preparation.journal import FileState
from avd_trainer.data.preparation.recipe import Recipe, load_recipe
from avd_trainer.data.preparation.schedule import clip_id
from avd_trainer.data.preparation.stage import (
    ClipSettings,
    Done,
    Failed,
    FrameRequest,
    Outcome,
    Row,
    Span,
    Values,
)
from avd_trainer.data.preparation.stages.span import ClipSpans, SpanSettings
from avd_trainer.data.preparation.worker import (
    DECODING,
    Begun,
    Finished,
    Found,
    Hashed,
    Message,
    RowTask,
    Task,
    Worker,
)

CLIP = ClipSettings(frames=5, fps=8)
REQUESTS = (FrameRequest((0, 1, 2, 3, 4), short_side=16), FrameRequest((4,), cover=(16, 16)), FrameRequest((1, 2)))
PLENTY = 10**9
OFF = ("caption=off", "latents=off", "text=off")
OF_ONE_FRAME = ("hue=off", "sharpness=off", "detail=off")


def write_video(path: Path, scenes: tuple[int, ...], rate: int = 16, first_seed: int = 0) -> Path:
    """Scenes of so many frames; blobs of other colours in each, which move."""
    with av.open(path, "w") as container:
        stream = container.add_stream("libx264", rate=rate, options={"crf": "10", "g": "12", "bf": "2"})
        stream.height, stream.width, stream.pix_fmt = 48, 64, "yuv420p"
        for seed, frames in enumerate(scenes, first_seed):
            blobs = np.random.default_rng(seed).integers(0, 256, (6, 80, 3), dtype=np.uint8)
            wide = blobs.repeat(8, axis=0).repeat(8, axis=1)
            for number in range(frames):
                pixels = np.ascontiguousarray(wide[:, number : number + 64])
                container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode(None))
    return path


def clips_ahead(start: int, first: bool) -> Iterator[Span]:
    return ClipSpans(SpanSettings(), CLIP).clips_ahead(start, first)


def scan(path: Path, kept: KeptFrames, scenes: tuple[int, ...] = ()) -> list[int]:
    """Go through a file; scenes are told two frames after they begin, by numbers of frames. The times."""
    pass_ = FileScan(path, lambda: kept)
    times = []
    for number, (time, _) in enumerate(pass_.frames(32)):
        times.append(time)
        if number - 2 in scenes:
            pass_.begin_scene(times[number - 2])
    return times


@pytest.mark.parametrize("rate", [3, 7, 16, 25])
def test_kept_frames_are_those_that_a_reader_decodes(tmp_path: Path, rate: int) -> None:
    path = write_video(tmp_path / "video.mp4", (2 * rate, 3 * rate), rate)
    kept = KeptFrames(CLIP.fps, REQUESTS, clips_ahead, PLENTY)
    cut = scan(path, kept, scenes=(2 * rate,))[2 * rate]
    spans = [Span(start, start + 625) for start in (0, 625, 1250, *(cut + 100 + 625 * n for n in range(4)))]
    with VideoReader(path, CLIP) as reader:
        for span in spans:
            found = kept.take(span, REQUESTS)
            assert found is not None
            for one, other in zip(found, reader.read(span, REQUESTS), strict=True):
                np.testing.assert_array_equal(one, other)
            assert kept.take(span, REQUESTS[1:2])[0].shape == (1, 16, 16, 3)  # type: ignore[index]
    assert kept.take(Span(cut + 100 + 2500, cut + 100 + 3125), REQUESTS) is None  # which the file is too short for


def test_what_was_not_asked_for_or_is_dropped_is_not_there(tmp_path: Path) -> None:
    kept = KeptFrames(CLIP.fps, REQUESTS, clips_ahead, PLENTY)
    scan(write_video(tmp_path / "video.mp4", (40,)), kept)
    assert kept.take(Span(0, 625), [FrameRequest((0, 1))]) is None
    assert kept.take(Span(100, 725), REQUESTS) is None
    kept.drop(Span(0, 625))
    kept.drop(Span(0, 625))
    assert kept.take(Span(0, 625), REQUESTS) is None
    assert kept.take(Span(625, 1250), REQUESTS) is not None


def test_no_more_is_kept_than_is_allowed(tmp_path: Path) -> None:
    path = write_video(tmp_path / "video.mp4", (100,))
    a_clip = 5 * 16 * 21 * 3 + 16 * 16 * 3 + 2 * 48 * 64 * 3
    kept = KeptFrames(CLIP.fps, REQUESTS, clips_ahead, 3 * a_clip)
    scan(path, kept)
    there = [kept.take(Span(start, start + 625), REQUESTS) is not None for start in range(0, 5625, 625)]
    # Those that have begun when it is reached are gathered to their end.
    assert there[:3] == [True] * 3
    assert not any(there[5:])


def test_a_clip_whose_frames_cannot_be_resized_is_left_to_the_reader(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bad = {
        0.875: ValueError("odd"),
        1.3125: FFmpegError(22, "odd"),
    }  # amid a clip, and where a scene's first one begins
    resize = clip_reader._resize

    def fail(frame: av.VideoFrame, request: FrameRequest, by: VideoReformatter) -> object:
        if frame.time in bad:
            raise bad[frame.time]
        return resize(frame, request, by)

    monkeypatch.setattr(clip_reader, "_resize", fail)
    kept = KeptFrames(CLIP.fps, REQUESTS, clips_ahead, PLENTY)
    assert len(scan(write_video(tmp_path / "video.mp4", (60,)), kept, scenes=(20,))) == 60
    there = [kept.take(Span(start, start + 625), REQUESTS) is not None for start in (0, 625, 1350, 1975, 2600)]
    assert there == [True, False, False, True, True]


def write_change(path: Path, size: tuple[int, int]) -> Path:
    """20 frames of 64 x 48 pixels, and 20 of ``size``, as width and height: two streams, one behind the other."""
    stripes = np.random.default_rng(0).integers(0, 256, (1, 8, 3), dtype=np.uint8).repeat(8, axis=1)
    parts = []
    for width, height, first in ((64, 48, 0), (*size, 20)):
        part = path.with_stem(f"part-{first}")
        with av.open(part, "w") as container:
            stream = container.add_stream("mpeg2video", rate=25, options={"bf": "0"})
            stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
            for number in range(first, first + 20):
                picture = np.roll(stripes, number, axis=1).repeat(48, axis=0)
                frame = av.VideoFrame.from_ndarray(picture, format="rgb24").reformat(width=width, height=height)
                frame.pts, frame.time_base = number, Fraction(1, 25)
                container.mux(stream.encode(frame))
            container.mux(stream.encode(None))
        parts.append(part.read_bytes())
        part.unlink()
    path.write_bytes(b"".join(parts))
    return path


class Prepared(NamedTuple):
    """A video after its own stages: what they found, and the work on its clips."""

    results: dict[str, Values]
    clips: Task


def recipe_of(*overrides: str) -> Recipe:
    short = ["clip.frames=9", "hue.at=[1]", "sharpness.at=[9]", "detail.at=[5]"]
    return load_recipe("tiny", [*OFF, *short, *overrides])


class Told:
    """A worker, and what it told of its last task."""

    def __init__(self, recipe: Recipe, folder: Path) -> None:
        self.recipe, self.messages = recipe, list[Message]()
        self._worker = Worker(recipe, folder, self.messages.append)

    def found(self, task: Task) -> dict[tuple[str, str], Outcome]:
        self.messages.clear()
        self._worker.work(task)
        assert isinstance(self.messages[-1], Finished)
        return {(each.key, each.stage): each.outcome for each in self.messages if isinstance(each, Found)}

    def scan(self, path: Path) -> Prepared:
        """Do all stages of a file."""
        self.found(Task(path))
        (hashed,) = (each for each in self.messages if isinstance(each, Hashed))
        assert hashed.state == FileState.at(path)
        row = Row(str(hashed.sha256), path, str(hashed.sha256), None, {}, "")
        files = tuple(chosen.stage.name for chosen in self.recipe.of_files())
        ahead = tuple(chosen.stage.name for chosen in self.recipe.of_clips(survivors=False))
        outcomes = self.found(Task(path, hashed.state, (RowTask(row, files),), ahead))
        results = {name: outcome.values for (_, name), outcome in outcomes.items() if isinstance(outcome, Done)}
        spans = [Span(*span) for span in results["span"]["clips"]]
        rows = (row._replace(id=clip_id(row.sha256, span), span=span, results=results) for span in spans)
        return Prepared(results, Task(path, hashed.state, tuple(RowTask(each, ahead) for each in rows)))


def test_a_file_is_decoded_once_for_its_cuts_and_its_clips(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = recipe_of()
    path = write_video(tmp_path / "video.mp4", (30, 40))
    opened: list[object] = []
    real = av.open
    monkeypatch.setattr(av, "open", lambda *arguments: opened.append(arguments) or real(*arguments))
    worker = Told(recipe, tmp_path / "prepared")
    results, clips = worker.scan(path)
    assert len(results["cut"]["scenes"]) == 2
    assert len(clips.rows) == 7
    once = worker.found(clips)
    assert len(opened) == 1  # by probe, which reads the first frame; cut goes on from there
    assert len(once) == 7 * len(clips.rows[0].stages)
    again = Told(recipe, tmp_path / "prepared").found(clips)  # which kept nothing
    assert len(opened) == 2
    assert once == {key: outcome for key, outcome in again.items() if key[1] != DECODING}


@pytest.mark.parametrize("clips_of_room", [1, 2.5, 100])
def test_a_worker_keeps_frames_in_a_sixteenth_of_its_memory(tmp_path: Path, clips_of_room: float) -> None:
    path = write_video(tmp_path / "video.mp4", (60,))
    plenty = Told(recipe_of(), tmp_path / "prepared")
    clips = plenty.scan(path).clips
    assert len(clips.rows) == 6
    kept = plenty._worker._kept
    assert kept is not None
    a_clip = kept[2]._bytes / 6
    worker = Told(recipe_of(f"memory_gb={16 * clips_of_room * a_clip / 1e9}"), tmp_path / "prepared")
    worker.scan(path)
    worker.found(clips)
    again = sum(isinstance(each, Found) and each.stage == DECODING for each in worker.messages)
    # The clip with which it is full is gathered to its end, and the one that had begun by then.
    assert again == max(0, 6 - {1: 2, 2.5: 4, 100: 6}[clips_of_room])


def test_what_was_kept_of_one_file_is_not_taken_for_another(tmp_path: Path) -> None:
    recipe = recipe_of()
    worker, fresh = (Told(recipe, tmp_path / "prepared") for _ in range(2))
    one, other = (write_video(tmp_path / f"{seed}.mp4", (40,), first_seed=seed) for seed in (0, 1))
    clips = fresh.scan(other).clips
    expected = Told(recipe, tmp_path / "prepared").found(clips)
    assert [each.row.span for each in worker.scan(one).clips.rows] == [each.row.span for each in clips.rows]
    assert worker.found(clips) == expected


def test_a_clip_whose_kept_frames_change_their_size_fails_alone(tmp_path: Path) -> None:
    # At 16 lines both are 21 wide, so that it is no matter for the search for cuts.
    path = write_change(tmp_path / "video.ts", (128, 98))
    worker = Told(recipe_of("clip.frames=5", "cut.short_side=16", *OF_ONE_FRAME), tmp_path / "prepared")
    clips = worker.scan(path).clips
    found = worker.found(clips)
    assert len(clips.rows) >= 4
    (changing,) = (row.row.id for row in clips.rows if row.row.span and row.row.span.start < 800 <= row.row.span.end)
    failed = {key: outcome.reason for (key, _), outcome in found.items() if isinstance(outcome, Failed)}
    assert failed.keys() == {changing}
    assert failed[changing].startswith("its frames cannot be decoded")
    begun = [(each.row, each.doing) for each in worker.messages if isinstance(each, Begun)]
    assert (changing, DECODING) in begun  # before it is tried: what ends the process there is blamed on this clip


def test_a_picture_that_changes_its_shape_is_told_with_sizes_and_time(tmp_path: Path) -> None:
    path = write_change(tmp_path / "video.ts", (64, 64))
    # FFmpeg may give the first frame behind a change the time of the one before it.
    with pytest.raises(ValueError, match=r"^its picture changes from 64x48 to 64x64 at 0\.(76|8) s; split it there$"):
        scan(path, KeptFrames(CLIP.fps, (), clips_ahead, PLENTY))
