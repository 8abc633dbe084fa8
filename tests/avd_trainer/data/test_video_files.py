import logging
import math
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from PIL import Image, ImageSequence
from torch import Tensor

from avd_trainer.data import video_files as samples
from avd_trainer.data.video_files import enlarge, save_clip, save_gif, save_grid, tile
from avd_trainer.runtime.errors import UserError
from disks import disk_with_room_for


def moving_colours(frames: int = 9, height: int = 32, width: int = 48) -> Tensor:
    """A smooth, saturated clip ``[3, F, H, W]``."""
    f = torch.linspace(0, 1, frames).view(-1, 1, 1)
    y, x = torch.linspace(0, 1, height).view(1, -1, 1), torch.linspace(0, 1, width).view(1, 1, -1)
    red, green, blue = (0.5 + 0.5 * torch.sin(math.tau * (f + phase) + x + y) for phase in (0.0, 0.3, 0.6))
    return torch.stack([red, green, blue]).clamp(0, 1)


def read_mp4(path: Path) -> Tensor:
    with av.open(path) as container:
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    return torch.from_numpy(np.stack(frames)).permute(3, 0, 1, 2) / 255


def read_gif(path: Path) -> Tensor:
    with Image.open(path) as animation:
        frames = [np.array(frame.convert("RGB")) for frame in ImageSequence.Iterator(animation)]
    return torch.from_numpy(np.stack(frames)).permute(3, 0, 1, 2) / 255


def durations(path: Path) -> list[int]:
    with Image.open(path) as animation:
        return [frame.info["duration"] for frame in ImageSequence.Iterator(animation)]


def test_a_clip_is_what_players_show(tmp_path: Path) -> None:
    video = moving_colours()
    mp4, gif = save_clip(video, tmp_path / "step-0.5", fps=16)
    assert [mp4.name, gif.name] == ["step-0.5.mp4", "step-0.5.gif"]
    assert sorted(os.listdir(tmp_path)) == ["step-0.5.gif", "step-0.5.mp4"]
    for shown in (read_mp4(mp4), read_gif(gif)):
        assert shown.shape == video.shape
        assert (shown - video).abs().mean() < 0.03
    with av.open(mp4) as container:
        stream = container.streams.video[0]
        assert (stream.codec_context.name, stream.codec_context.pix_fmt) == ("h264", "yuv420p")
        assert stream.average_rate == 16
        assert stream.codec_context.colorspace == 1  # BT.709, said in the file
    assert sum(durations(gif)) == 560  # nine frames of 62.5 ms, to the hundredth of a second


@pytest.mark.parametrize("colour", [(1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (0.0, 0.0, 1.0), (0.203, 0.498, 0.301)])
def test_colours_stay(tmp_path: Path, colour: tuple[float, float, float]) -> None:
    video = torch.tensor(colour).view(3, 1, 1, 1).expand(3, 3, 32, 32)
    mp4, gif = save_clip(video, tmp_path / "clip", fps=16)
    assert (read_mp4(mp4) - video).abs().max() < 0.02
    assert (read_gif(gif) - video[:, :1]).abs().max() < 0.002  # the nearest of 256


@pytest.mark.parametrize("size", [(31, 48), (32, 47), (31, 47)])
def test_odd_sizes_lose_nothing(tmp_path: Path, size: tuple[int, int]) -> None:
    height, width = size
    video = moving_colours(5, height, width)
    mp4, gif = save_clip(video, tmp_path / "clip", fps=24)
    shown = read_mp4(mp4)
    assert shown.shape == (3, 5, 32, 48)
    assert (shown[..., :height, :width] - video).abs().mean() < 0.03
    assert (shown[..., -1, -1] - video[..., -1, -1]).abs().mean() < 0.05  # the edge goes on
    assert read_gif(gif).shape == video.shape


def test_values_off_the_screen_are_clamped(tmp_path: Path) -> None:
    video = torch.tensor([1.5, -0.5, math.nan]).view(3, 1, 1, 1).expand(3, 3, 32, 32)
    mp4, _ = save_clip(video.bfloat16(), tmp_path / "clip", fps=16)
    red = torch.tensor([1.0, 0.0, 0.0]).view(3, 1, 1, 1)
    assert (read_mp4(mp4) - red).abs().max() < 0.02


def test_a_clip_is_always_the_same_file(tmp_path: Path) -> None:
    # With macroblock trees the file depends on what was in memory before, which glibc sets for us.
    writing = """if True:
        import sys, torch
        from pathlib import Path
        from avd_trainer.data.video_files import enlarge, save_clip
        blocks = torch.rand(3, 17, 16, 16, generator=torch.Generator().manual_seed(0))
        save_clip(enlarge(blocks, 4), Path(sys.argv[1]), fps=12, formats=["mp4"])
        """
    files = []
    for rest in ("1", "129"):
        target = tmp_path / rest
        subprocess.run(
            [sys.executable, "-c", writing, str(target)], check=True, env={**os.environ, "MALLOC_PERTURB_": rest}
        )
        files.append(target.with_name(f"{rest}.mp4").read_bytes())
    assert files[0] == files[1]


def test_a_standing_clip_takes_its_whole_time(tmp_path: Path) -> None:
    """Equal frames of an animation become one of their common duration."""
    save_gif(torch.full((3, 16, 8, 8), 0.5), tmp_path / "clip.gif", fps=16)
    assert sum(durations(tmp_path / "clip.gif")) == 1000


def test_an_animation_does_not_flicker(tmp_path: Path) -> None:
    """A standing background keeps its colours to the bit, whatever moves before it."""
    video = torch.rand(3, 1, 16, 64).expand(3, 6, 16, 64).clone()
    for frame in range(6):
        video[:, frame, :8] = torch.rand(3, 8, 64)
    save_gif(video, tmp_path / "clip.gif", fps=16)
    background = read_gif(tmp_path / "clip.gif")[:, :, 8:]
    assert (background == background[:, :1]).all()


@pytest.mark.parametrize(("clips", "rows", "columns"), [(1, 1, 1), (2, 1, 2), (4, 2, 2), (5, 1, 5), (8, 2, 4)])
def test_tiles_fill_their_picture_in_reading_order(clips: int, rows: int, columns: int) -> None:
    videos = torch.arange(clips).view(-1, 1, 1, 1, 1).expand(clips, 3, 2, 4, 6)
    tiled = tile(videos)
    assert tiled.shape == (3, 2, rows * 4, columns * 6)
    assert tiled[0, 0, ::4, ::6].flatten().tolist() == list(range(clips))


def test_enlarging_repeats_pixels() -> None:
    assert enlarge(torch.tensor([[1, 2]]), 2).tolist() == [[1, 1, 2, 2], [1, 1, 2, 2]]


def test_a_grid_has_the_clips_below_their_captions(tmp_path: Path) -> None:
    videos = torch.stack([moving_colours(3, 20, 64), moving_colours(3, 20, 64).flip(1)])
    captions = ["a cat", "a very long caption " * 30]
    mp4, gif = save_grid(videos, captions, tmp_path / "grid", fps=16)
    shown = read_mp4(mp4)
    strip = shown.shape[2] - 4 * 20
    assert shown.shape[-1] == 2 * 256  # 64 pixels four times enlarged
    assert read_gif(gif).shape == shown.shape
    for number, clip in enumerate(videos):
        own = shown[:, :, strip:, number * 256 : (number + 1) * 256]
        assert (own - enlarge(clip, 4)).abs().mean() < 0.04
    inked = [(shown[:, 0, :strip, number * 256 : (number + 1) * 256] > 0.5).float().mean() for number in (0, 1)]
    assert 0.001 < inked[0] < 0.05 < inked[1] < 0.3
    # The longer caption is cut, not drawn beyond its strip's edges.
    assert (shown[:, 0, :strip, -2:] < 0.2).all()
    assert (shown[:, 0, strip - 3 : strip - 1] < 0.2).all()


@pytest.mark.parametrize("captions", [["", ""], ["ein Löwe, 一只狮子", "supercalifragilistic" * 40]])
def test_any_caption_can_be_drawn(tmp_path: Path, captions: Sequence[str]) -> None:
    files = save_grid(torch.rand(2, 3, 2, 16, 300), captions, tmp_path / "grid", fps=16)
    assert read_mp4(files[0]).shape[-1] == 600


def test_without_libx264_another_encoder_is_taken_and_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(samples, "ENCODERS", {"no-such-encoder": {"crf": "18"}, "mpeg4": {}})
    samples._encoder.cache_clear()
    try:
        with caplog.at_level(logging.WARNING):
            for name in ("a", "b"):
                mp4, _ = save_clip(moving_colours(), tmp_path / name, fps=16)
        assert (read_mp4(mp4) - moving_colours()).abs().mean() < 0.03
        detail = torch.rand(1, 9, 64, 64).expand(3, -1, -1, -1)
        assert (read_mp4(save_clip(detail, tmp_path / "c", fps=16)[0]) - detail).abs().mean() < 0.03
        assert caplog.text.count("clips are encoded by mpeg4") == 1
        monkeypatch.setattr(samples, "ENCODERS", {"no-such-encoder": {}})
        samples._encoder.cache_clear()
        with pytest.raises(UserError, match="can encode by none of no-such-encoder"):
            save_clip(moving_colours(), tmp_path / "c", fps=16)
    finally:
        samples._encoder.cache_clear()


@pytest.mark.parametrize("suffix", ["mp4", "gif"])
def test_a_full_disk_is_named_and_leaves_the_clip_of_before(tmp_path: Path, suffix: str) -> None:
    video = torch.rand(3, 9, 64, 64)
    before = {path: path.read_bytes() for path in save_clip(video, tmp_path / "clip", fps=16)}
    kept = tmp_path / f"clip.{suffix}"
    write = samples._write_mp4 if suffix == "mp4" else samples._write_gif
    with disk_with_room_for(2000), pytest.raises(UserError, match=f"clip.{suffix} cannot be written: "):
        write(kept, torch.randint(256, (9, 64, 64, 3), dtype=torch.uint8), 16)
    assert kept.read_bytes() == before[kept]
    assert not list(tmp_path.glob("*.part"))


def test_a_folder_that_is_missing_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"clip.mp4 cannot be written: No such file"):
        save_clip(moving_colours(), tmp_path / "missing" / "clip", fps=16)
