"""Videos that are cut and captioned, as `avd data encode` takes them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from avd_trainer.data.encode import ClipFormat
from avd_trainer.data.encoders import load_text_encoder
from avd_trainer.data.inspection import inspect
from avd_trainer.data.preparation.encoding import ADVICE, REMOVED, WORK, encode_recipe, encode_videos
from avd_trainer.data.preparation.journal import Journal
from avd_trainer.data.preparation.prepare import DATA, RECIPE, Prepared, Workers
from avd_trainer.data.preparation.stage import ClipSettings, Failed, Frames, Outcome, Row
from avd_trainer.data.preparation.stages.latents import Latents
from avd_trainer.data.preparation.summary import LEFT_OUT
from avd_trainer.data.shard_reading import ShardDataset
from avd_trainer.models.codecs.block_dct import BlockDCTCodec
from avd_trainer.runtime.errors import UserError
from disks import disk_with_room_for
from in_process import EngineInThisProcess
from small_videos import write_video
from toy_runs import files_of

FORMAT = ClipFormat(frames=9, height=32, width=48, fps=16)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "videos").mkdir()
    return tmp_path / "videos"


WORKERS = Workers(1, engine=EngineInThisProcess)


def encode(folder: Path, clip_format: ClipFormat = FORMAT, **options: Any) -> Prepared:
    """Into ``data`` beside the folder."""
    return encode_videos(folder, folder.parent / "data", encode_recipe("tiny", clip_format, **options), WORKERS)


def data_of(folder: Path) -> ShardDataset:
    return ShardDataset(folder.parent / "data")


def said(done: Prepared) -> str:
    return "\n".join(done.summary.lines(ADVICE))


def test_videos_become_clips_that_follow_each_other(folder: Path) -> None:
    (folder / "a").mkdir()
    write_video(folder / "a" / "dog.mp4", 30)
    (folder / "a" / "dog.txt").write_text("A dog runs.")
    write_video(folder / "cat_jumps.mp4", 9)
    done = encode(folder)
    dataset = data_of(folder)
    assert done.data == {folder.parent / "data": 4}
    assert dataset.latent_shape == (16, 3, 8, 12)
    assert set(dataset.column("dtype")) == {"float16"}
    clips = sorted((dataset[row] for row in range(len(dataset))), key=lambda clip: (clip.source, clip.caption))
    assert [clip.source for clip in clips] == [
        "a/dog.mp4, 0 to 0.562 s",
        "a/dog.mp4, 0.562 to 1.124 s",
        "a/dog.mp4, 1.125 to 1.687 s",
        "cat_jumps.mp4, 0 to 0.562 s",
    ]
    assert [clip.caption for clip in clips] == ["A dog runs."] * 3 + ["cat jumps"]
    torch.testing.assert_close(clips[0].text[:3], load_text_encoder("tiny")(["A dog runs."])[0])
    for number, clip in enumerate(clips):
        assert clip.latent is not None
        video = BlockDCTCodec().decode(clip.latent.unsqueeze(0))[0].transpose(0, 1) * 255
        first = 9 * number if number < 3 else 0
        # The codec keeps the mean of each four frames.
        means = [float(block.mean()) for block in (video[:1], video[1:5], video[5:])]
        assert means == pytest.approx([20 + 4 * (first + middle) for middle in (0, 2.5, 6.5)], abs=4)


def test_clips_have_wans_frame_rate_or_the_one_asked_for(folder: Path) -> None:
    write_video(folder / "clip.mp4", 54, rate=48)
    assert encode(folder).summary.kept == 2
    every = encode_recipe("tiny", FORMAT._replace(fps=48))
    assert encode_videos(folder, folder.parent / "all", every, WORKERS).summary.kept == 6


def test_a_row_says_where_it_is_from(folder: Path) -> None:
    write_video(folder / "clip.mp4", 18)
    (folder / "LICENSE").write_text("CC0-1.0\n")
    encode(folder)
    provenance = inspect(folder.parent / "data").provenance
    assert provenance is not None
    assert (provenance.files, provenance.licences, provenance.alike) == (1, {"CC0-1.0": 2}, True)
    assert provenance.stages["latents"] == 'version 1 model="tiny"'


def test_a_hostile_folder(folder: Path) -> None:
    """What can be encoded is; all else is named once, with the reason."""
    write_video(folder / "good.mp4", 18)
    write_video(folder / "odd.mkv", 9, width=65, height=49, codec="ffv1", pixel_format="bgr0")
    write_video(folder / "ten_bit.mkv", 9, codec="ffv1", pixel_format="yuv420p10le")
    write_video(folder / "grey.mkv", 9, codec="ffv1", pixel_format="gray")
    write_video(folder / "alpha.mkv", 9, codec="ffv1", pixel_format="yuva420p")
    write_video(folder / "short.mp4", 8)
    write_video(folder / "shorter.mp4", 3)
    write_video(folder / "still.mkv", 9, step=0, codec="ffv1", pixel_format="yuv420p")
    write_video(folder / "two_a_second.mp4", 3, rate=2, step=30)
    write_video(folder / "repeated.mkv", 9, step=30, times=8, codec="ffv1", pixel_format="yuv420p")
    write_video(folder / "tiny.mkv", 9, width=8, height=8, codec="ffv1", pixel_format="yuv420p")
    (folder / "broken.mp4").write_bytes(b"no video")
    (folder / "empty.mp4").touch()
    (folder / "cut_off.mp4").write_bytes((folder / "good.mp4").read_bytes()[:1000])
    (folder / "copy.mp4").write_bytes((folder / "good.mp4").read_bytes())
    (folder / "dir.mp4").mkdir()
    (folder / "link.mp4").symlink_to("nowhere.mp4")
    done = encode(folder)
    assert sorted(data_of(folder).column("source")) == [
        "alpha.mkv, 0 to 0.562 s",
        "copy.mp4, 0 to 0.562 s",
        "copy.mp4, 0.562 to 1.124 s",
        "grey.mkv, 0 to 0.562 s",
        "odd.mkv, 0 to 0.562 s",
        "ten_bit.mkv, 0 to 0.562 s",
    ]
    left_out = json.loads((folder.parent / "data" / LEFT_OUT).read_text())
    assert {name: why.partition(":")[0] for name, why in left_out["files"].items()} == {
        "broken.mp4": "probe",
        "cut_off.mp4": "probe",
        "dir.mp4": "reading",
        "empty.mp4": "probe",
        "good.mp4": "reading",  # of two files with the same bytes the first counts
        "link.mp4": "reading",
        "short.mp4": "span",
        "shorter.mp4": "span",
    }
    assert left_out["clips"] == {
        "repeated.mkv at 0 s": "repeats: 2 is below 4",
        "still.mkv at 0 s": "still: 0 is below 0.001",
        "tiny.mkv at 0 s": "enlargement: 6 is above 4",
        "two_a_second.mp4 at 0 s": "repeats: 2 is below 4",
        "two_a_second.mp4 at 0.562 s": "repeats: 2 is below 4",
    }
    told = said(done)
    for name in {**left_out["files"], **left_out["clips"]}.keys() - {"two_a_second.mp4 at 0.562 s"}:
        assert name in told
    assert "17 files gave 11 clips; 8 files gave none." in told
    assert "--frames 5 would fit 1 of the 2 files that are too short." in told


def test_what_is_a_judgement_is_an_option(folder: Path) -> None:
    write_video(folder / "two_a_second.mp4", 3, rate=2, step=30)
    write_video(folder / "tiny.mkv", 9, width=8, height=8, codec="ffv1", pixel_format="yuv420p")
    assert encode(folder, max_repeats=8, max_enlargement=6).summary.kept == 3
    with pytest.raises(UserError, match=r"--max-repeats and --max-enlargement must be above 0, got 0 and 4"):
        encode_recipe("tiny", FORMAT, max_repeats=0)


def test_clips_of_exactly_five_seconds_are_told_which_length_fits(folder: Path) -> None:
    for number in range(3):
        write_video(folder / f"{number}.mp4", 80, step=1.5 + number / 2)
    write_video(folder / "less.mp4", 50)
    with pytest.raises(UserError, match=r"80 frames at 16 fps.*\n(.*\n)*  --frames 77 would fit 3 of the 4 files"):
        encode(folder, FORMAT._replace(frames=81))
    assert encode(folder, FORMAT._replace(frames=77)).summary.kept == 3


def test_captions_are_found_and_counted(folder: Path) -> None:
    texts = {
        "utf_8": "größer".encode(),
        "with_mark": "größer".encode("utf-8-sig"),
        "latin_1": "größer café".encode("latin-1"),
        "curly": "“größer”".encode("windows-1252"),
        "wide": "größer".encode("utf-16"),
        "empty": b" \n",
        "none": None,
    }
    for number, (name, text) in enumerate(texts.items()):
        write_video(folder / f"{name}.mp4", 9, step=2 + number / 2)
        if text is not None:
            (folder / f"{name}.txt").write_bytes(text)
    told = said(encode(folder))
    dataset = data_of(folder)
    found = {
        source.partition(".")[0]: caption
        for source, caption in zip(dataset.column("source"), dataset.column("caption"), strict=True)
    }
    assert found == {
        "utf_8": "größer",
        "with_mark": "größer",
        "latin_1": "größer café",
        "curly": "“größer”",
        "wide": "größer",
        "empty": "",
        "none": "none",
    }
    assert "Captions: 5 of 7 files have a text, 1 only their names." in told
    assert "1 with an empty text file, and so an empty caption: empty.mp4" in told
    assert "2 text files are not in UTF-8, and were read as windows-1252: curly.txt, latin_1.txt" in told
    assert "1 text files are not in UTF-8, and were read as utf-16: wide.txt" in told


def test_a_latent_that_is_not_finite_is_left_out(row: Row, monkeypatch: pytest.MonkeyPatch) -> None:
    class Overflowing(BlockDCTCodec):
        def encode(self, video: Tensor) -> Tensor:
            return super().encode(video) * 1e6  # beyond float16

    stage = Latents(Latents.Settings(model="tiny"), ClipSettings(frames=5))
    monkeypatch.setitem(stage.__dict__, "_encoder", Overflowing())
    frames = torch.full((5, 32, 32, 3), 200, dtype=torch.uint8).numpy()
    assert stage.run(row, frames) == Failed(
        "its latent holds NaN or infinity; the VAE computes in float32, so weights may be damaged"
    )


def test_a_folder_that_gives_no_clip_is_an_error_and_no_data_set(folder: Path) -> None:
    write_video(folder / "short.mp4", 8)
    with pytest.raises(
        UserError, match=r"No clip is left of 1 files and 0 clips:\n  1 x span: its longest scene has 8"
    ):
        encode(folder)
    assert not list((folder.parent / "data").glob("*.parquet"))
    with pytest.raises(UserError, match=r"holds no shards; encoding\.unfinished was left by a command"):
        data_of(folder)


def test_a_full_disk_is_not_taken_for_a_broken_video(folder: Path) -> None:
    write_video(folder / "clip.mp4", 45)
    with disk_with_room_for(40_000), pytest.raises(UserError, match="ree some space"):
        encode(folder)
    assert encode(folder).summary.kept == 5


class Killed(BaseException):
    pass


def test_what_was_killed_while_it_moved_its_shards_is_ended_by_the_same_command_alone(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(path: Path, target: Path) -> Path:
        if path.name == WORK:  # the last that is moved
            raise Killed
        return path.rename(target)

    write_video(folder / "clip.mp4", 18)
    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", killed)
        with pytest.raises(Killed):
            encode(folder)
    with pytest.raises(UserError, match="holds shards already"):
        encode(folder, FORMAT._replace(frames=5))
    assert encode(folder).summary.kept == len(data_of(folder)) == 2
    assert not (folder.parent / "data" / WORK).exists()
    with pytest.raises(UserError, match="holds shards already"):
        encode(folder)


@pytest.mark.parametrize("left_as", [REMOVED, WORK])
def test_what_was_killed_while_it_removed_its_journal_keeps_what_was_left_out(
    folder: Path, monkeypatch: pytest.MonkeyPatch, left_as: str
) -> None:
    """The second name is what a removal of the folder in its place would have left."""

    def killed(path: Path, ignore_errors: bool = False) -> None:
        if (journal := Journal(path).path).is_file():
            journal.unlink()
            raise Killed

    write_video(folder / "clip.mp4", 18)
    write_video(folder / "short.mp4", 8)
    output = folder.parent / "data"
    with monkeypatch.context() as patch:
        patch.setattr("avd_trainer.data.preparation.encoding.shutil.rmtree", killed)
        with pytest.raises(Killed):
            encode(folder)
    assert (output / REMOVED / DATA / RECIPE).is_file()
    (output / REMOVED).rename(output / left_as)
    before = (output / LEFT_OUT).read_text()
    assert "short.mp4" in before
    with pytest.raises(UserError, match="holds shards already"):
        encode(folder)
    assert (output / LEFT_OUT).read_text() == before
    assert not (output / REMOVED).exists()
    assert len(data_of(folder)) == 2


def test_kill_and_the_same_command_again(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed as a person runs it, in processes: nothing finished is encoded again, and the bytes are the same."""
    for number in range(6):
        write_video(folder / f"{number}.mp4", 18, step=1 + number)
    output = folder.parent / "again"
    sizes = ("--frames", "9", "--height", "32", "--width", "48")
    command = [sys.executable, "-m", "avd_trainer", "data", "encode", "--videos", str(folder), "--output", str(output)]
    command += ["--model", "tiny", "--workers", "2", *sizes]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    made: set[Path] = set()
    with subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL) as process:
        while process.poll() is None and len(made) < 4:
            time.sleep(0.005)
            made = set((output / WORK / "arrays" / "latents").rglob("*.safetensors"))
        process.kill()
    recipe = encode_recipe("tiny", FORMAT)
    with Journal(output / WORK) as journal:
        finished = {row for row, *_ in journal.outcomes("latents", recipe.stages["latents"].digest)}
    assert finished
    encoded: list[str] = []
    run = Latents.run

    def noted(stage: Latents, row: Row, frames: Frames) -> Outcome:
        encoded.append(row.id)
        return run(stage, row, frames)

    with monkeypatch.context() as patch:
        patch.setattr(Latents, "run", noted)
        kept = encode_videos(folder, output, recipe, WORKERS).summary.kept
    assert len(encoded) == len(set(encoded)) == kept - len(finished)
    assert not finished & set(encoded)
    encode(folder)
    assert files_of(output) == files_of(folder.parent / "data")
