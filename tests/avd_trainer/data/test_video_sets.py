"""Videos of different size, rate and length, brought to one form."""

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from PIL import Image

from avd_trainer.data import video_sets
from avd_trainer.data.video_files import save_clip
from avd_trainer.data.video_sets import (
    Form,
    VideoFile,
    changes_to,
    common_form,
    look_at,
    look_into,
    read_clip,
    same_names,
)
from avd_trainer.runtime.errors import UserError
from small_videos import numbers_of, write_video


def test_a_video_is_what_its_frames_say(tmp_path: Path) -> None:
    assert look_at(write_video(tmp_path / "a.mp4", 9)).form == Form(64, 48, 9, 16.0)
    save_clip(torch.rand(3, 17, 16, 24), tmp_path / "b", 16, ["gif"])
    form = look_at(tmp_path / "b.gif").form
    assert form[:3] == (24, 16, 17)
    assert form.has_rate(16)  # times are rounded to hundredths of a second


def test_the_common_form_has_the_least_of_each_number() -> None:
    forms = [Form(64, 48, 50, 25.0), Form(48, 64, 33, 16.0)]
    assert common_form(VideoFile(Path("x"), form) for form in forms) == Form(48, 48, 32, 16.0)
    assert forms[0].frames_at(16) == 32  # 49 / 25 = 1.96 s, and 31 / 16 = 1.94


def test_clips_are_brought_to_the_form_and_it_is_said(tmp_path: Path) -> None:
    quick = look_at(write_video(tmp_path / "quick.mp4", 21, rate=32, step=8))
    slow = look_at(write_video(tmp_path / "slow.mp4", 9, width=32, height=32))
    form = common_form([quick, slow])
    assert form == Form(32, 32, 9, 16.0)
    clip = read_clip(quick, form)
    assert clip.shape == (3, 9, 32, 32)
    assert numbers_of((255 * clip).transpose(0, 1), step=8) == [0, 2, 4, 6, 8, 10, 12, 14, 16]
    assert changes_to(form, [slow]) == []
    resized, slowed, cut = changes_to(form, [quick, slow])
    assert resized == "1 of 2 are resized, and their centre cut out (such as quick.mp4, 64x48)"
    assert slowed.endswith("leaving out frames (such as quick.mp4, 32 frames per second)")
    assert cut.endswith("(such as quick.mp4, 21 frames)")


def test_of_a_long_video_it_is_said_where_it_was_cut(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(video_sets, "MOST_FRAMES", 5)
    long, fits = (look_at(write_video(tmp_path / f"{frames}.mp4", frames)) for frames in (6, 5))
    assert (long.form, long.longer, fits.longer) == (fits.form, True, False)
    (said,) = changes_to(fits.form, [long, fits])
    assert said.startswith("1 of 2 are cut after 5 frames, and what is behind them is not looked at (such as 6.mp4")


def test_rounded_times_leave_out_and_repeat_no_frame(tmp_path: Path) -> None:
    video = torch.linspace(0, 1, 17).view(1, 17, 1, 1).expand(3, 17, 16, 16)
    save_clip(video, tmp_path / "clip", 16, ["gif"])
    file = look_at(tmp_path / "clip.gif")
    brightness = read_clip(file, Form(16, 16, 17, 16.0)).mean(dim=(0, 2, 3))
    assert (brightness.diff() > 0.03).all()


def test_a_folder_with_a_broken_video_is_refused(tmp_path: Path) -> None:
    write_video(tmp_path / "a.mp4", 9)
    (tmp_path / "b.mp4").write_bytes(b"no video")
    with pytest.raises(UserError, match=r"b\.mp4 cannot be read: .* Mend it or take it out"):
        look_into(tmp_path)
    with pytest.raises(UserError, match=r"it has 1 frame\(s\), at least 2 are needed"):
        look_at(write_video(tmp_path / "c.mp4", 1))


def write_pictures(folder: Path, numbers: Sequence[int], size: tuple[int, int] = (24, 16)) -> Path:
    """Pictures of one grey each, by which one reads their numbers."""
    folder.mkdir(parents=True, exist_ok=True)
    for number in numbers:
        Image.new("RGB", size, (20 + 4 * number,) * 3).save(folder / f"frame_{number}.png")
    return folder


def test_a_folder_of_numbered_pictures_is_a_clip(tmp_path: Path) -> None:
    for folder in (tmp_path / "a" / "clip.1", tmp_path / "b" / "clip.1"):
        write_pictures(folder, range(2, 13))  # 10 comes behind 9, not behind 1
        (folder / "notes.txt").touch()
    a = tmp_path / "a"
    write_video(a / "video.mp4", 9, width=24, height=16)
    write_pictures(a / "poster", [1])
    assert [file.path.name for file in look_into(a)] == ["video.mp4"]  # pictures count where their rate is said
    pictures, video = look_into(a, fps=12.5)
    assert (pictures.path, pictures.form, video.form) == (a / "clip.1", Form(24, 16, 11, 12.5), Form(24, 16, 9, 16.0))
    assert numbers_of((255 * read_clip(pictures, pictures.form)).transpose(0, 1)) == list(range(2, 13))
    slower = read_clip(pictures, Form(12, 16, 4, 6.25))
    assert slower.shape == (3, 4, 16, 12)
    assert numbers_of((255 * slower).transpose(0, 1)) == [2, 4, 6, 8]
    # One clip's own folder is a set of it.
    assert [file.path for file in look_into(a / "clip.1", fps=8)] == [a / "clip.1"]
    names, left_out = same_names([a, tmp_path / "b"], fps=8)
    assert (names, left_out) == ({"clip.1": [a / "clip.1", tmp_path / "b" / "clip.1"]}, 1)
    with pytest.raises(
        UserError, match=r"numbered pictures in .*clip\.1\. If they are the frames of clips, say by --fps"
    ):
        look_into(tmp_path / "b")


def test_pictures_that_are_no_clip_are_refused(tmp_path: Path) -> None:
    gap = write_pictures(tmp_path / "gap", [0, 1, 3])
    with pytest.raises(UserError, match=r"gap cannot be read: frame_3\.png is where picture 2 should be"):
        look_at(gap, fps=8)
    twice = write_pictures(tmp_path / "twice", [0, 1])
    (twice / "frame_01.png").write_bytes((twice / "frame_1.png").read_bytes())
    with pytest.raises(UserError, match=r"frame_1\.png is where picture 2 should be"):
        look_at(twice, fps=8)
    sizes = write_pictures(write_pictures(tmp_path / "sizes", [0]), [1], size=(16, 16))
    with pytest.raises(UserError, match=r"frame_1\.png has 16x16 pixels, 24x16 were expected"):
        look_at(sizes, fps=8)
    broken = write_pictures(tmp_path / "broken", [0])
    for content in (b"no picture", b""):
        (broken / "frame_1.png").write_bytes(content)
        with pytest.raises(UserError, match=r"broken cannot be read: frame_1\.png"):
            look_at(broken, fps=8)
    # Pictures beside a video are of it.
    write_video(sizes / "video.mp4", 9)
    assert [file.path.name for file in look_into(sizes, fps=8)] == ["video.mp4"]


def test_names_that_folders_have_in_common(tmp_path: Path) -> None:
    for name in ("a/1.mp4", "a/2.gif", "b/2.mp4", "c/9.mp4", "c/9.gif"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    names, left_out = same_names([tmp_path / "a", tmp_path / "b"])
    assert names == {"2": [tmp_path / "a" / "2.gif", tmp_path / "b" / "2.mp4"]}
    assert left_out == 1
    (tmp_path / "b" / "2.mp4").rename(tmp_path / "b" / "3.mp4")
    with pytest.raises(UserError, match=r"have no file names in common, such as '1'"):
        same_names([tmp_path / "a", tmp_path / "b"])
    with pytest.raises(UserError, match="have one name"):
        same_names([tmp_path / "c", tmp_path / "a"])
