"""What is kept while a file is scanned is what a reader would decode."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import av
import numpy as np
import pytest

from avd_trainer.data.preparation.clip_reader import VideoReader
from avd_trainer.data.preparation.file_scan import FileScan, KeptFrames
from avd_trainer.data.preparation.journal import FileState
from avd_trainer.data.preparation.recipe import load_recipe
from avd_trainer.data.preparation.schedule import clip_id
from avd_trainer.data.preparation.stage import ClipSettings, Done, FrameRequest, Row, Span
from avd_trainer.data.preparation.stages.span import ClipSpans, SpanSettings
from avd_trainer.data.preparation.worker import DECODING, Finished, Found, Hashed, Message, RowTask, Task, Worker

CLIP = ClipSettings(frames=5, fps=8)
REQUESTS = (FrameRequest((0, 1, 2, 3, 4), short_side=16), FrameRequest((4,), cover=(16, 16)), FrameRequest((1, 2)))
PLENTY = 10**9
OFF = ("caption=off", "latents=off", "text=off")


def write_video(path: Path, scenes: tuple[int, ...], rate: int = 16) -> Path:
    """Scenes of so many frames; blobs of other colours in each, which move."""
    with av.open(path, "w") as container:
        stream = container.add_stream("libx264", rate=rate, options={"crf": "10", "g": "12", "bf": "2"})
        stream.height, stream.width, stream.pix_fmt = 48, 64, "yuv420p"
        for seed, frames in enumerate(scenes):
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
    pass_ = FileScan(path, kept)
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


def test_a_file_is_decoded_once_for_its_cuts_and_its_clips(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = load_recipe(
        "tiny",
        ["caption=off", "latents=off", "text=off", "clip.frames=9", "hue.at=[1]", "sharpness.at=[9]", "detail.at=[5]"],
    )
    files = tuple(chosen.stage.name for chosen in recipe.of_files())
    ahead = tuple(chosen.stage.name for chosen in recipe.of_clips(survivors=False))
    path = write_video(tmp_path / "video.mp4", (30, 40))
    told: list[Message] = []

    def found(worker: Worker, task: Task) -> dict[tuple[str, str], object]:
        told.clear()
        worker.work(task)
        assert isinstance(told[-1], Finished)
        return {(each.key, each.stage): each.outcome for each in told if isinstance(each, Found)}

    def clips(worker: Worker, task_of_file: Task) -> Task:
        outcomes = found(worker, task_of_file)
        results = {name: outcome.values for (_, name), outcome in outcomes.items() if isinstance(outcome, Done)}
        spans = [Span(*span) for span in results["span"]["clips"]]
        assert len(results["cut"]["scenes"]) == 2
        assert len(spans) == 7
        rows = (row._replace(id=clip_id(sha256, span), span=span, results=results) for span in spans)
        return Task(path, state, tuple(RowTask(each, ahead) for each in rows))

    worker = Worker(recipe, tmp_path / "prepared", told.append)
    worker.work(Task(path))
    hashed = next(each for each in told if isinstance(each, Hashed))
    state, sha256 = hashed.state, str(hashed.sha256)
    assert state == FileState.at(path)
    row = Row(sha256, path, sha256, None, {}, "")
    opened: list[object] = []
    real = av.open
    monkeypatch.setattr(av, "open", lambda *arguments: opened.append(arguments) or real(*arguments))
    of_clips = clips(worker, Task(path, state, (RowTask(row, files),), ahead))
    once = found(worker, of_clips)
    assert len(opened) == 2  # by probe, which reads the first frame, and by cut
    assert len(once) == 7 * len(ahead)
    again = found(Worker(recipe, tmp_path / "prepared", told.append), of_clips)  # which kept nothing
    assert len(opened) == 3
    assert once == {key: outcome for key, outcome in again.items() if key[1] != DECODING}
