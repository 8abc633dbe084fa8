import struct
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch
from av.error import FFmpegError

from avd_trainer.data.preparation.file_scan import FileScan, KeptFrames
from avd_trainer.data.preparation.stages import probe as stage
from avd_trainer.data.video_files import save_clip

_SIDEWAYS = [0, 1 << 16, 0, -(1 << 16), 0, 0, 0, 0]


def probe(path: Path) -> dict[str, Any]:
    def no_pass() -> KeptFrames:
        raise AssertionError("the first frame is enough")

    with FileScan(path, no_pass) as scan:
        return stage.probe(scan.open())


@pytest.fixture
def video(tmp_path: Path) -> Path:
    return save_clip(torch.rand(3, 30, 48, 64), tmp_path / "clip", 12.0, ["mp4"])[0]


def test_what_a_file_says_about_itself(video: Path) -> None:
    assert probe(video) == {
        "width": 64,
        "height": 48,
        "fps": 12.0,
        "milliseconds": 2500,
        "codec": "h264",
        "pixel_format": "yuv420p",
    }


def test_a_video_that_is_stored_sideways_is_upright(video: Path) -> None:
    """As phones write it: the matrix of the track's header turns by 90 degrees."""
    one = 1 << 16
    upright, turned = (struct.pack(">9i", *rows, 1 << 30) for rows in ([one, 0, 0, 0, one, 0, 0, 0], _SIDEWAYS))
    whole = video.read_bytes()
    track = whole.index(b"tkhd")
    assert upright in whole[track:]
    video.write_bytes(whole[:track] + whole[track:].replace(upright, turned, 1))
    found = probe(video)
    assert (found["width"], found["height"]) == (48, 64)


def test_what_is_no_video(tmp_path: Path) -> None:
    text, sound = tmp_path / "text.mp4", tmp_path / "sound.mp4"
    text.write_text("no video\n")
    with pytest.raises(FFmpegError):
        probe(text)
    with av.open(sound, "w") as container:
        stream = container.add_stream("aac", rate=8000)
        silence = av.AudioFrame.from_ndarray(np.zeros((1, 8000), np.float32), format="fltp", layout="mono")
        silence.sample_rate = 8000
        container.mux([*stream.encode(silence), *stream.encode(None)])
    with pytest.raises(ValueError, match="it has no video stream"):
        probe(sound)


def test_a_truncated_file(video: Path) -> None:
    whole = video.read_bytes()
    video.write_bytes(whole[: len(whole) // 2])
    with pytest.raises((FFmpegError, ValueError)):
        probe(video)
