"""Folders of videos and sampled students, measured by their pixels beside real ones, and shown side by side."""

import io
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from rich.console import Console
from torch import Tensor
from typer.testing import CliRunner

from avd_trainer.commands.app import app
from avd_trainer.data import video_files
from avd_trainer.data.moving_shapes import MovingShapes
from avd_trainer.data.video_files import save_clip
from avd_trainer.data.video_sets import Form, look_at, read_clip
from avd_trainer.evaluation import video_measures
from avd_trainer.evaluation.measure_table import Row
from avd_trainer.evaluation.video_measures import VIDEO_MEASURES
from avd_trainer.evaluation.video_reference import VIDEO_CONTROLS, RealVideos
from avd_trainer.inference import generation
from avd_trainer.runtime.errors import UserError
from avd_trainer.runtime.files import read_json, write_json
from avd_trainer.studies.videos import JudgedSet, JudgedVideos, show

HEADLINES = {name for name, each in VIDEO_MEASURES.items() if each.headline}


def command(*arguments: object) -> tuple[int, str]:
    """Exit status and everything that was printed."""
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, " ".join(result.output.replace("│ ", "").split())


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``real`` clips of 20 captions; of 10 of them ``again`` other renderings, and ``pale`` ones."""
    folder = tmp_path_factory.mktemp("videos")
    shapes = MovingShapes(20, seed=1, held_out=True)
    for name, rendering, factor, count in (("real", 0, 1.0, 20), ("again", 1, 1.0, 10), ("pale", 2, 0.5, 10)):
        (folder / name).mkdir()
        for index in range(count):
            video = shapes.render(index, rendering).video[:, :9]
            grey = video.mean(dim=0, keepdim=True)
            save_clip(grey + factor * (video - grey), folder / name / f"{index}", 16, ["mp4"])
    return folder


def test_sets_of_videos_beside_real_and_spoiled_ones(folders: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    status, printed = command(
        "evaluate", folders / "again", folders / "pale", "--reference", folders / "real", "--output", output
    )
    assert status == 0, printed
    assert "All clips are measured as 32x32x9 at 16 frames per second." in printed
    assert sorted(os.listdir(output)) == ["measures.json", "measures.md", "measures.png"]
    found = read_json(output / "measures.json")
    again, pale = found["variants"]["again"], found["variants"]["pale"]
    assert again["worse"] == []
    assert "saturation" in pale["worse"]
    assert again["measures"]["saturation"]["distance"] < pale["measures"]["saturation"]["distance"]
    # Each control is caught, by a headline measure, and by the one that is for it.
    assert list(found["controls"]["worse"]) == list(VIDEO_CONTROLS)
    for name, for_it in (
        ("noise", "spatial_rolloff"), ("frozen", "temporal_rolloff"), ("shuffled", "temporal_rolloff"),
        ("saturated", "saturation"), ("blurred", "spatial_rolloff"),
    ):  # fmt: skip
        assert for_it in HEADLINES & set(found["controls"]["worse"][name]), name
    clips = list(pale["seeds"].values())
    mean = sum(clip["values"]["flow"] for clip in clips) / len(clips)
    assert pale["measures"]["flow"]["mean"] == pytest.approx(mean)
    table = (output / "measures.md").read_text()
    assert "real: mean ± standard deviation of sets of 10 of 20 real clips." in table
    assert "| *real clips, blurred* |" in table
    assert "## Distance to real clips" in table
    with Image.open(output / "measures.png") as figure:
        assert figure.width > 1000


def test_a_folders_name_is_shown_as_it_is() -> None:
    row = Row("[red]a", dict.fromkeys(VIDEO_MEASURES, 0.0), {})
    judged = JudgedVideos(Form(32, 32, 9, 16.0), [JudgedSet(row, {}, [], {}, [])], {}, None)
    console = Console(record=True, width=200, file=io.StringIO())
    console.print(show(judged))
    lines = console.export_text()
    assert "[red]a: videos of 32x32x9" in lines
    assert lines.count("[red]a") == 2  # title and column
    assert "Clips of one prompt are alike" in lines


def test_halves_that_are_compared_have_as_many_clips_as_the_smallest_set() -> None:
    real = {name: [float(place) for place in range(10)] for name in VIDEO_MEASURES}
    same = RealVideos.of(real, [real], {})
    assert same.size == 5
    few = {name: [4.5, 4.5] for name in VIDEO_MEASURES}
    assert RealVideos.of(real, [real, few], {}).size == 2
    assert same.worse(same.distance(real)) == []
    off = {name: [value + 20 for value in each] for name, each in real.items()}
    distances = same.distance(off)
    assert distances["flow"] == pytest.approx(20, abs=0.5)
    assert same.worse(distances) == list(VIDEO_MEASURES)
    assert "flow" not in RealVideos.of(real, [real], {"flow": 30}).worse(distances)
    # To both sides: the mean is right, the clips are not.
    both = {name: [-40.0] * 5 + [49.0] * 5 for name in real}
    assert same.worse(same.distance(both)) == list(VIDEO_MEASURES)


def test_a_student_of_wan_is_sampled_and_its_files_are_measured(
    wan_student: Path, folders: Path, tmp_path: Path
) -> None:
    output = tmp_path / "out"
    arguments = ["--prompt", "a red circle", "--noises", 2, "--size", "32x32x5", "--output", output]
    status, printed = command("evaluate", wan_student, folders / "again", *arguments)
    assert status == 0, printed
    assert "sample: 4/4" in printed
    assert "All clips are measured as 32x32x5 at 16 frames per second. again: 10 of 10 are cut" in printed
    clips = output / "clips" / "student"
    assert sorted(os.listdir(clips)) == [
        "000-a-red-circle.mp4", "001-a-red-circle.mp4", "prompts.json", "sampling.json",
    ]  # fmt: skip
    assert [row["seed"] for row in read_json(clips / "prompts.json")] == [0, 1]
    found = read_json(output / "measures.json")
    assert found["reference"] is None
    assert [len(each["seeds"]) for each in found["variants"].values()] == [2, 10]
    # What was sampled is not lost, and can be measured again.
    status, printed = command("evaluate", wan_student, *arguments)
    assert status == 2
    assert "has clips of an earlier evaluation" in printed
    status, printed = command("evaluate", clips, "--output", output)
    assert (status, "sets ../../" in printed) == (2, True), printed  # one set is missing
    status, printed = command("evaluate", folders / "again", clips, "--output", output)
    assert status == 0, printed
    again = read_json(output / "measures.json")["variants"]["student"]
    assert again["measures"]["saturation"] == found["variants"]["student"]["measures"]["saturation"]


def test_folders_of_pictures_are_measured_as_the_videos_that_they_are_of(folders: Path, tmp_path: Path) -> None:
    for name in ("0", "1"):
        (tmp_path / "pictures" / name).mkdir(parents=True)
        file = look_at(folders / "again" / f"{name}.mp4")
        for number, frame in enumerate((255 * read_clip(file, file.form)).byte().unbind(1)):
            picture = Image.fromarray(frame.permute(1, 2, 0).numpy())
            picture.save(tmp_path / "pictures" / name / f"{number:04d}.png")
        (tmp_path / "videos").mkdir(exist_ok=True)
        (tmp_path / "videos" / f"{name}.mp4").symlink_to(file.path)
    sets, output = (tmp_path / "pictures", tmp_path / "videos"), tmp_path / "out"
    status, printed = command("evaluate", sets[0], "--output", output)
    assert (status, "say by --fps how many of them there are a second" in printed) == (2, True), printed
    status, printed = command("evaluate", sets[1], "--fps", 16, "--output", output)
    assert (status, "--fps is of folders of numbered pictures, and there are none" in printed) == (2, True), printed
    status, printed = command("evaluate", *sets, "--fps", 16, "--output", output)
    assert status == 0, printed
    assert "All clips are measured as 32x32x9 at 16 frames per second." in printed
    variants = read_json(output / "measures.json")["variants"]
    for name, measure in variants["videos"]["measures"].items():
        assert variants["pictures"]["measures"][name]["mean"] == pytest.approx(measure["mean"], rel=0.02, abs=1e-3), (
            name
        )
    status, printed = command("compare", *sets, "--fps", 16, "--output", tmp_path / "shown")
    assert status == 0, printed
    assert sorted(os.listdir(tmp_path / "shown")) == ["0.mp4", "1.mp4"]


def test_students_of_wan_side_by_side(wan_student: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.symlink_to(wan_student)
    clip = tmp_path / "clip.mp4"
    status, printed = command(
        "compare", wan_student, other, "--prompt", "a red circle", "--size", "32x32x5", "--output", clip
    )
    assert status == 0, printed
    one, two = (part[:, :, -256:] for part in read_clip(look_at(clip), look_at(clip).form).chunk(2, dim=3))
    assert (one - two).abs().mean() < 0.02  # one noise, one student


def test_videos_of_equal_names_side_by_side(folders: Path, tmp_path: Path) -> None:
    few = tmp_path / "few"
    few.mkdir()
    for name in ("1", "3"):
        (few / f"{name}.mp4").symlink_to(folders / "real" / f"{name}.mp4")
    save_clip(torch.rand(3, 9, 32, 32), few / "x", 16, ["gif"])
    status, printed = command("compare", few, folders / "pale", "--output", tmp_path / "shown")
    assert status == 0, printed
    assert sorted(os.listdir(tmp_path / "shown")) == ["1.mp4", "3.mp4"]
    assert "9 other files have no counterpart in every folder, and are left out. 2 clips are in" in printed
    file = look_at(tmp_path / "shown" / "1.mp4")
    real, pale = (part[:, :, -256:] for part in read_clip(file, file.form).chunk(2, dim=3))
    assert (real.amax(0) - real.amin(0)).mean() > 1.5 * (pale.amax(0) - pale.amin(0)).mean()


def test_an_evaluation_that_was_stopped_goes_on(
    wan_student: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "out"
    clips = output / "clips" / "student"
    arguments = ["evaluate", wan_student, "--prompt", "a", "--noises", 3, "--output", output, "--size"]

    def stop(video: Tensor, path: Path, *options: Any) -> None:
        if path.name.startswith("002"):
            raise UserError("The disk is full.")
        save_clip(video, path, *options)

    monkeypatch.setattr(video_files, "save_clip", stop)
    assert "The disk is full." in command(*arguments, "32x32x5")[1]
    monkeypatch.undo()
    first = clips / "000-a.mp4"
    before = first.stat().st_mtime_ns
    # What misses a clip is another set.
    for others in ([clips], [clips.parent], [tmp_path, "--reference", clips]):
        status, printed = command("evaluate", *others, "--output", tmp_path / "table")
        assert (status, "misses clips, since the avd evaluate that made them was stopped" in printed) == (2, True)
    assert "misses clips" in command("compare", clips, clips.parent, "--output", tmp_path / "shown")[1]
    status, printed = command(*arguments, "32x32x9")
    assert (status, "with other values of form. Repeat the command as it was" in printed) == (2, True), printed
    status, printed = command(*arguments, "32x32x5")
    assert status == 0, printed
    assert "sample: 2/2" in printed  # steps of one clip
    assert first.stat().st_mtime_ns == before
    assert len(read_json(clips / "prompts.json")) == 3
    assert len(read_json(output / "measures.json")["variants"]["student"]["seeds"]) == 3


def test_what_cannot_be_measured_is_not_sampled(
    wan_student: Path, folders: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    few, short, output = tmp_path / "few", tmp_path / "short", tmp_path / "out"
    for folder in (few, short):
        folder.mkdir()
    (few / "1.mp4").symlink_to(folders / "real" / "1.mp4")
    save_clip(torch.rand(3, 2, 32, 32), short / "1", 16, ["mp4"])
    monkeypatch.setattr(generation, "load_transformer", None)  # nothing gets this far
    prompted = ["evaluate", wan_student, "--prompt", "a", "--output", output]
    for arguments, message in (
        (["--reference", few], "--reference has 1 clips, and at least 8 are needed"),
        (["--size", "32x32x1"], "All clips can be brought to 32x32x1 at 16 frames per second, and at least"),
        (["--size", "32x32x5", short], "All clips can be brought to 32x32x2"),
        (["--image", folders], "makes videos of a prompt alone. Leave --image out"),
    ):
        status, printed = command(*prompted, *arguments)
        assert (status, message in printed) == (2, True), printed
    monkeypatch.setattr(video_measures, "find_spec", lambda _: None)
    assert "Videos are measured by OpenCV's optical flow" in command(*prompted, "--size", "32x32x5")[1]
    assert not output.exists()


def test_measures_of_something_else_are_not_replaced(folders: Path, tmp_path: Path) -> None:
    for name, numbers in (("a/vids", range(8)), ("b/vids", range(8, 16))):  # of one name
        (tmp_path / name).mkdir(parents=True)
        for number in numbers:
            (tmp_path / name / f"{number}.mp4").symlink_to(folders / "real" / f"{number}.mp4")
    output = tmp_path / "out"
    first = ["evaluate", tmp_path / "a" / "vids", "--output", output]
    assert command(*first)[0] == 0
    before = (output / "measures.json").read_bytes()
    for arguments, differs in (
        ([tmp_path / "b" / "vids"], "sets ../a/vids, not ../b/vids"),
        ([tmp_path / "b" / "vids", tmp_path / "a" / "vids"], "sets ../a/vids, not ../a/vids, ../b/vids"),
        ([tmp_path / "a" / "vids", "--reference", tmp_path / "b"], "reference none, not ../b"),
    ):
        status, printed = command("evaluate", *arguments, "--output", output)
        assert (status, f"is of other sets or settings: {differs}. Repeat the command" in printed) == (2, True), printed
    assert (output / "measures.json").read_bytes() == before
    assert command(*first)[0] == 0
    found = read_json(output / "measures.json")
    assert found["request"] == {"sets": ["../a/vids"], "reference": [], "fps": None}
    # Of an earlier version.
    write_json(output / "measures.json", {name: value for name, value in found.items() if name != "request"})
    status, printed = command(*first)
    assert (status, "it does not say of which. Repeat" in printed) == (2, True), printed


def test_nobodys_videos_are_replaced(folders: Path, tmp_path: Path) -> None:
    one, two, shown = (tmp_path / name for name in ("one", "two", "shown"))
    for folder in (one, two):
        for name in ("a/b", "a_b"):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(folders / "real" / "0.mp4", folder / f"{name}.mp4")
    before = (one / "a_b.mp4").read_bytes()
    for output in (one, one / "shown", tmp_path / "x" / ".." / "two"):
        status, printed = command("compare", one, two, "--output", output)
        assert (status, "whose videos are shown. Choose a place outside of it" in printed) == (2, True), printed
    assert (one / "a_b.mp4").read_bytes() == before
    assert len(list(one.rglob("*.mp4"))) == 2
    status, printed = command("compare", one, two, "--output", shown)
    assert status == 0, printed
    assert sorted(path.relative_to(shown).as_posix() for path in shown.rglob("*.mp4")) == ["a/b.mp4", "a_b.mp4"]
    status, printed = command("compare", one, two, "--output", shown)
    assert (status, "is there already, and is not replaced" in printed) == (2, True), printed
    (one / "a_b.mp4").unlink()  # of one name the output is a file
    status, printed = command("compare", one, two, "--output", one / "c.mp4")
    assert (status, "whose videos are shown" in printed) == (2, True), printed


def test_what_does_not_go_together_is_refused(wan_student: Path, folders: Path, tmp_path: Path) -> None:
    few = tmp_path / "few"
    few.mkdir()
    (few / "1.mp4").symlink_to(folders / "real" / "1.mp4")
    pale, output = folders / "pale", tmp_path / "out"
    for arguments, message in (
        (["evaluate", wan_student], "There is nothing to show. Pass --prompt TEXT"),
        (["evaluate", pale, "--prompt", "a"], "Prompts are for students, and there are only videos here"),
        (["evaluate", pale, "--captions", 8], "--captions are of moving shapes: leave it out"),
        (["evaluate", wan_student, "--size", "32x32x9"], "--image and --size are for clips of prompts"),
        (["evaluate", wan_student, "--dtype", "float32"], "--dtype, --image and --size are for clips of prompts"),
        (["evaluate", pale, "--noises", 3], "Only students take --noises, and these are videos: leave it out."),
        (["evaluate", pale, "--seed", 1, "--device", "cpu"], "--seed and --device, and these are videos: leave them"),
        (["evaluate", pale, "--reference", few], "--reference has 1 clips, and at least 8 are needed"),
        (["compare", wan_student, pale], "is a folder of videos, and others are not. Sample the students first"),
        (["compare", folders / "real", pale, "--prompt", "a"], "Only students take --prompt, and these are videos"),
        (
            ["compare", pale, few, "--size", "32x32x5", "--dtype", "float32"],
            "Only students take --size and --dtype, and",
        ),
    ):
        extra = ["--reference", few] if arguments == ["evaluate", wan_student] else []
        status, printed = command(*arguments, *extra, "--output", output)
        assert status == 2
        assert message in printed
    assert not output.exists() or os.listdir(output) == []
