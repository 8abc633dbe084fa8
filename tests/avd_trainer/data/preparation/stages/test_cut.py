from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from scenedetect import FrameTimecode
from scenedetect.detectors import AdaptiveDetector

from avd_trainer.data.preparation.file_scan import FileScan, KeptFrames
from avd_trainer.data.preparation.stage import ClipSettings, Done, Frames, Row, Span
from avd_trainer.data.preparation.stages.cut import Cut, CutSettings, find_scenes
from avd_trainer.data.video_files import save_clip

CLIP = ClipSettings()


def scene(seed: int, frames: int, pixels: int = 1) -> Frames:
    """``[frames, 72, 128, 3]`` of coloured blobs that move by ``pixels`` a frame."""
    blobs = np.random.default_rng(seed).integers(0, 256, (4, 50, 3), dtype=np.uint8)
    wide = cv2.resize(blobs, (900, 72), interpolation=cv2.INTER_CUBIC)
    return np.stack([wide[:, pixels * number : pixels * number + 128] for number in range(frames)])


def scenes(frames: Frames, step: int = 40, **settings: float) -> list[Span]:
    return find_scenes(((step * number, frame) for number, frame in enumerate(frames)), CutSettings(**settings))


@pytest.mark.parametrize("pixels", [0, 1, 2])
def test_cuts_at_known_frames_are_found(pixels: int) -> None:
    video = np.concatenate([scene(0, 30, pixels), scene(1, 45, pixels), scene(2, 40, pixels)])
    assert scenes(video) == [Span(0, 1200), Span(1200, 3000), Span(3000, 4600)]


def test_fast_motion_is_no_cut() -> None:
    assert scenes(scene(0, 40, 18)) == [Span(0, 1600)]


def test_cuts_that_follow_each_other_faster_than_the_shortest_scene_count_once() -> None:
    video = np.concatenate([scene(seed, 30 if seed != 1 else 4) for seed in range(3)])
    assert len(scenes(video, shortest=15)) == 2
    assert len(scenes(video, shortest=1)) == 3


def test_a_change_too_small_or_beside_others_is_no_cut() -> None:
    grey = np.full((2, 30, 72, 128, 3), 100, np.uint8)
    grey[1] += 42  # of brightness, which is a third of what is looked at
    video = np.concatenate(grey)
    assert len(scenes(video, least_change=13.9)) == 2
    assert len(scenes(video, least_change=14.1)) == 1
    video[28] += 63  # two changes of 21 before the 14: each is 2.4 times the mean of the four around it
    assert len(scenes(video, threshold=2.45)) == 1
    assert [span.start for span in scenes(video, threshold=2.35)] == [0, 28 * 40]


@pytest.mark.parametrize("seed", range(8))
def test_cuts_are_those_of_pyscenedetect(seed: int) -> None:
    draws = np.random.default_rng(seed)
    parts = [scene(int(draws.integers(99)), int(draws.integers(3, 40)), int(draws.integers(12))) for _ in range(8)]
    video = np.concatenate(parts)
    video = np.clip(video * draws.uniform(0.9, 1, (len(video), 1, 1, 1)), 0, 255).astype(np.uint8)  # flicker
    settings = CutSettings(threshold=draws.uniform(1.5, 3), least_change=draws.uniform(5, 15), shortest=5)
    assert settings.threshold is not None
    detector = AdaptiveDetector(
        adaptive_threshold=settings.threshold, min_content_val=settings.least_change, min_scene_len=settings.shortest
    )
    theirs = [
        cut.frame_num
        for number, frame in enumerate(video)
        for cut in detector.process_frame(FrameTimecode(number, fps=1.0), cv2.cvtColor(frame, cv2.COLOR_RGB2BGR))
    ]
    ours = find_scenes(enumerate(video), settings)
    assert [span.start for span in ours] == [0, *theirs]
    assert len(ours) > 1


def test_times_of_a_variable_rate_are_the_frames_own() -> None:
    video = np.concatenate([scene(0, 30), scene(1, 30)])
    times = np.cumsum(np.random.default_rng(0).integers(10, 90, 60)) + 500
    found = find_scenes(zip((int(time) for time in times), video, strict=True), CutSettings())
    assert found[0] == (0, times[30] - times[0])
    assert found[1].end == times[59] - times[0] + times[59] - times[58]


def run(path: Path, settings: CutSettings) -> list[list[int]]:
    row = Row("0", path, "0", None, {"probe": {"milliseconds": 2500}})
    with FileScan(path, lambda: KeptFrames(16.0, [], lambda start, first: iter(()), 0)) as scan:
        outcome = Cut(settings, CLIP).run(row, scan)
    assert isinstance(outcome, Done)
    scenes: list[list[int]] = outcome.values["scenes"]
    return scenes


def test_a_file_with_a_cut(tmp_path: Path) -> None:
    video = np.concatenate([scene(0, 30), scene(1, 35)])
    (path,) = save_clip(torch.from_numpy(video).permute(3, 0, 1, 2) / 255, tmp_path / "clip", 25.0, ["mp4"])
    assert run(path, CutSettings()) == [[0, 1200], [1200, 2600]]
    assert run(path, CutSettings(threshold=None)) == [[0, 2500]]  # what probe said, nothing is decoded
