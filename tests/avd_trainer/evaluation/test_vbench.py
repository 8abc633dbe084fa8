"""From a suite's own file to videos under its names, and from its results to a table."""

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import av
import pytest
import torch
from diffusers import WanTransformer3DModel
from safetensors.torch import save_file
from torch import Tensor

import tiny_pipeline
from avd_trainer.config.loading import load_config, save_config
from avd_trainer.data.video_files import save_clip
from avd_trainer.data.video_sets import look_at, read_clip
from avd_trainer.evaluation.vbench import folder as folders
from avd_trainer.evaluation.vbench import generating
from avd_trainer.evaluation.vbench.checking import Kind, check_videos
from avd_trainer.evaluation.vbench.collecting import PAPER, Count, notes, read_results, table
from avd_trainer.evaluation.vbench.folder import Record, check_names, claim, read_record, record_videos, seed_of
from avd_trainer.evaluation.vbench.generating import Sampling, describe
from avd_trainer.evaluation.vbench.suites import VBENCH, VBENCH_2, read_augmented, read_suite
from avd_trainer.inference.generation import decode_clips, sample_clips
from avd_trainer.inference.students import open_student
from avd_trainer.models.weight_files import ADAPTERS
from avd_trainer.runtime.errors import UserError
from avd_trainer.runtime.files import write_json
from avd_trainer.training.config import TrainConfig
from command_line import run_command as run
from vbench_suites import LONG, write_suite, write_vbench, write_vbench_2

CPU = torch.device("cpu")
# 5 frames of 1 a second: 5 s, one more than VBench takes.
SMALL = ("--size", "32x16x5", "--fps", 1)
MOVING = ("a red circle moves left", "the blue square")
SLOW = """
import fcntl, os, sys, time
folder, other = sys.argv[1:]
with open(folder + "/.lock", "w") as file:
    fcntl.lockf(file, fcntl.LOCK_EX)
    print("in", flush=True)
    time.sleep(0.5)
    os.replace(other + "/vbench.json", folder + "/vbench.json")
"""
"""Write another folder's record into one, as long as nobody else is in it."""
DYNAMIC = [f"videos/{prompt}-{index}.mp4" for prompt in MOVING for index in range(5)]


def generate(student: Path, suite: Path, output: Path, *options: object) -> tuple[int, str]:
    return run("evaluate", "vbench", "generate", student, "--suite", suite, "--output", output, *SMALL, *options)


def contents(folder: Path) -> dict[str, bytes]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


# What a suite wants.


def test_prompts_are_counted_by_dimension(tmp_path: Path) -> None:
    suite = write_vbench(tmp_path / "VBench_full_info.json")
    status, printed = run("evaluate", "vbench", "prompts", "--suite", suite, "-o", tmp_path / "list.json")
    assert status == 0, printed
    assert "│ dynamic_degree │ 2 │ 5 │ 10 │" in printed
    assert "│ temporal_flickering │ 1 │ 25 │ 25 │" in printed
    assert "35 videos in all" in printed
    assert "79 frames at 16 fps, 4.94 s. All 81 would be 5.06 s, and VBench's FAQ sends" in printed
    listed = json.loads((tmp_path / "list.json").read_text())
    assert listed[0] == {
        "file": "videos/a red circle moves left-0.mp4", "prompt": MOVING[0], "number": 0,
        "dimensions": ["subject_consistency", "dynamic_degree"],
    }  # fmt: skip


def test_the_second_suite_has_folders_short_names_and_its_own_numbers(tmp_path: Path) -> None:
    suite = read_suite(write_vbench_2(tmp_path / "VBench2_full_info.json"))
    files = [video.file for video in suite.videos(["Complex_Plot", "Diversity"])]
    assert files[:3] == [f"Complex_Plot/{LONG[:180]}-{index}.mp4" for index in range(3)]
    assert files[3:] == [f"Diversity/a red circle-{index}.mp4" for index in range(20)]
    assert suite.rules.frames_to_write(81, 16) == 81
    # Of one prompt there may be a video for each of two dimensions.
    assert len(suite.videos(["Instance_Preservation", "Diversity"], samples=1)) == 2


@pytest.mark.parametrize(
    ("frames", "fps", "written"), [(81, 16, 79), (80, 16, 79), (79, 16, 79), (49, 8, 39), (5, 0.1, 1)]
)
def test_clips_are_cut_below_five_seconds(frames: int, fps: float, written: int) -> None:
    assert VBENCH.frames_to_write(frames, fps) == written


def test_a_suite_is_found_in_a_package_an_environment_and_a_checkout(tmp_path: Path) -> None:
    for place in ("package", "env/lib/python3.11/site-packages/vbench", "checkout/vbench"):
        write_vbench(tmp_path / place / "VBench_full_info.json")
    for place in ("package", "env", "checkout"):
        assert read_suite(tmp_path / place).rules == VBENCH
    write_vbench_2(tmp_path / "checkout" / "VBench-2.0" / "vbench2" / "VBench2_full_info.json")
    assert read_suite(tmp_path / "checkout" / "VBench-2.0").rules == VBENCH_2
    with pytest.raises(UserError, match=r"it has several: .*Pass the file itself"):
        read_suite(tmp_path / "checkout")
    with pytest.raises(UserError, match="it has none"):
        read_suite(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[", "cannot be read"),
        ('{"prompt": "a"}', "expected a list of objects with prompt_en and dimension"),
        ('[{"prompt_en": "a", "dimension": "color"}]', "expected a list of objects"),
        ("[]", "has the dimensions none, which are neither"),
        ('[{"prompt_en": "a", "dimension": ["color", "Diversity"]}]', "color, Diversity, which are neither"),
    ],
)
def test_other_files_are_no_suite(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "info.json").write_text(content)
    with pytest.raises(UserError, match=message):
        read_suite(tmp_path / "info.json")


def test_names_that_cannot_be_are_refused(tmp_path: Path) -> None:
    suite = read_suite(write_vbench(tmp_path / "info.json"))
    with pytest.raises(UserError, match="--dimension color: VBench has subject_consistency, temporal_flick"):
        suite.videos(["color"])
    twins = write_suite(tmp_path / "2.json", (LONG + "one", ["Material"]), (LONG + "two", ["Material"]))
    with pytest.raises(UserError, match="would be the video of two prompts"):
        read_suite(twins).videos(["Material"])
    slash = write_suite(tmp_path / "3.json", ("24/7", ["color"]))
    with pytest.raises(UserError, match=r"'24/7', which cannot be a file's name. Leave color out"):
        read_suite(slash).videos(["color"])


def test_names_that_the_file_system_refuses_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    check_names(tmp_path, ["videos/Red: a?.mp4", "videos/red: a?.mp4", "videos/ordinary.mp4"])
    with pytest.raises(UserError, match=r"does not take the name '1{300}' \(File name too long\)"):
        check_names(tmp_path, ["videos/" + "1" * 300, "videos/2"])
    assert os.listdir(tmp_path) == []
    # As on a disk that does not tell capitals from small letters.
    exists = Path.exists
    monkeypatch.setattr(Path, "exists", lambda self: exists(self.with_name(self.name.lower())))
    check_names(tmp_path, ["videos/red.mp4", "videos/blue.mp4"])
    with pytest.raises(UserError, match=r"'videos/Red.mp4' and 'videos/red.mp4' would be one file"):
        check_names(tmp_path, ["videos/Red.mp4", "videos/red.mp4"])


def test_augmented_prompts_belong_to_the_suites_line_by_line(tmp_path: Path) -> None:
    suite = read_suite(write_vbench(tmp_path / "info.json"))
    original, augmented = tmp_path / "original.txt", tmp_path / "augmented.txt"
    original.write_text("\n".join([*MOVING, "another"]))
    augmented.write_text("a circle, slowly\na square, quickly\nanother one\n")
    shown = read_augmented(original, augmented)
    recorded = record_videos(suite.videos(["dynamic_degree"]), shown, seed=0)
    assert [each.shown for each in recorded] == 5 * ["a circle, slowly"] + 5 * ["a square, quickly"]
    assert [each.video.file for each in recorded] == DYNAMIC
    with pytest.raises(UserError, match="--augmented has no line for 'a still'"):
        record_videos(suite.videos(["temporal_flickering"]), shown, seed=0)
    original.write_text("one line")
    with pytest.raises(UserError, match=r"has 1 lines and .* 3, expected a line for each prompt"):
        read_augmented(original, augmented)


def test_each_video_has_a_seed_of_its_own() -> None:
    seeds = {seed_of(seed, prompt, index) for seed in range(3) for prompt in MOVING for index in range(5)}
    assert len(seeds) == 30
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert seed_of(1, "a", 2) == 7018179794929948697  # for good: another value is another study


# A student's videos.


def test_videos_are_made_once_and_the_same_in_any_order(
    wan_student: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    suite = write_vbench(tmp_path / "VBench_full_info.json")
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    status, printed = generate(wan_student, suite, whole, "--dimension", "dynamic_degree")
    assert status == 0, printed
    assert "4 of 5 frames at 1 fps. All 5 would be 5.00 s" in printed
    assert "10 videos were made; 10 of 10 are in" in printed
    made = contents(whole)
    assert sorted(made) == sorted([*DYNAMIC, ".lock", "vbench.json"])
    assert len(set(made.values())) == len(made)
    with av.open(whole / DYNAMIC[0]) as container:
        stream = container.streams.video[0]
        assert (stream.average_rate, stream.width, stream.height) == (1, 32, 16)
        assert sum(1 for _ in container.decode(stream)) == 4
    record = json.loads(made["vbench.json"])
    assert record["videos"][3]["seed"] == seed_of(0, MOVING[0], 3)
    assert str(tmp_path) not in made["vbench.json"].decode()

    # Another machine's part, of more dimensions and stopped on the way.
    both = ("--dimension", "subject_consistency", "--dimension", "dynamic_degree")
    assert "5 videos were made; 5 of 10 are in" in generate(wan_student, suite, parts, *both, "--shard", "1/2")[1]
    saved: list[Path] = []

    def stop(video: Tensor, path: Path, fps: float, formats: Sequence[str]) -> list[Path]:
        saved.extend(save_clip(video, path, fps, formats))
        if len(saved) == 3:
            raise KeyboardInterrupt
        return saved[-1:]

    monkeypatch.setattr(generating, "save_clip", stop)
    assert generate(wan_student, suite, parts, *both)[0] != 0
    monkeypatch.undo()
    assert sorted(os.listdir(parts / "videos")) == sorted(Path(file).name for file in [*DYNAMIC[:2], *DYNAMIC[5:]])
    assert list(parts.glob("unfinished*")) == []
    before = {file: (parts / file).stat().st_mtime_ns for file in [*DYNAMIC[:2], *DYNAMIC[5:]]}
    assert "3 videos were made; 10 of 10 are in" in generate(wan_student, suite, parts, *both)[1]
    assert before == {file: (parts / file).stat().st_mtime_ns for file in before}
    again = contents(parts)
    assert {file: again[file] for file in DYNAMIC} == {file: made[file] for file in DYNAMIC}
    assert sorted(again) == sorted(made)
    assert "0 videos were made; 10 of 10 are in" in generate(wan_student, suite, parts, *both)[1]

    # A folder is of one student and one way to sample it.
    _, printed = generate(wan_student, suite, parts, *both, "--seed", 1, "--frames", 5)
    assert "frames 4, not 5; seed 0, not 1. Repeat the command as it was, or choose another --output" in printed
    other = open_student(wan_student)._replace(timesteps=(1000.0, 400.0))
    monkeypatch.setattr("avd_trainer.inference.students.open_student_or_run", lambda *_: other)
    assert "timesteps [1000.0, 500.0], not [1000.0, 400.0]" in generate(wan_student, suite, parts, *both)[1]
    assert contents(parts) == again


def test_dimensions_are_added_to_a_folder(tmp_path: Path) -> None:
    suite = read_suite(write_vbench(tmp_path / "info.json"))

    def wanted(dimension: str, **settings: Any) -> Record:
        videos = record_videos(suite.videos([dimension]), None, 0)
        return Record(VBENCH, "tiny", {"frames": 4, **settings}, videos)

    claim(tmp_path, wanted("dynamic_degree"))
    joined = claim(tmp_path, wanted("subject_consistency"))
    assert joined == read_record(tmp_path)
    assert joined.dimensions == ["subject_consistency", "dynamic_degree"]
    assert len(joined.videos) == 10
    claim(tmp_path, wanted("temporal_flickering"))
    assert len(read_record(tmp_path).videos) == 35
    with pytest.raises(UserError, match="frames 4, not 5"):
        claim(tmp_path, wanted("dynamic_degree", frames=5))
    again = wanted("dynamic_degree")
    with pytest.raises(UserError, match="other settings: other augmented prompts"):
        claim(tmp_path, replace(again, videos=tuple(each._replace(shown="x") for each in again.videos)))
    (tmp_path / folders.RECORD).write_text('{"suite": "VBench"}')
    with pytest.raises(UserError, match="is damaged"):
        read_record(tmp_path)
    with pytest.raises(UserError, match=r"has no vbench.json: expected an --output folder"):
        read_record(tmp_path / "elsewhere")


def test_dimensions_that_two_processes_add_at_once_are_both_there(tmp_path: Path) -> None:
    suite = read_suite(write_vbench(tmp_path / "info.json"))
    folder, other = tmp_path / "avd", tmp_path / "other"

    def wanted(dimension: str) -> Record:
        return Record(VBENCH, "tiny", {"frames": 4}, record_videos(suite.videos([dimension]), None, 0))

    for each in (folder, other):
        each.mkdir()
    claim(other, wanted("dynamic_degree"))
    # The first is in the folder, and is slow to write.
    first = subprocess.Popen([sys.executable, "-c", SLOW, str(folder), str(other)], stdout=subprocess.PIPE, text=True)
    with first:
        assert first.stdout is not None
        assert first.stdout.readline() == "in\n"
        claim(folder, wanted("temporal_flickering"))
    assert read_record(folder).dimensions == ["temporal_flickering", "dynamic_degree"]


def test_processes_that_make_videos_side_by_side_leave_each_other_alone(
    wan_student: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    suite = write_suite(tmp_path / "VBench_full_info.json", ("a", ["dynamic_degree"]), ("b", ["dynamic_degree"]))
    output, one = tmp_path / "out", ("--samples", 1)

    def meanwhile(video: Tensor, path: Path, fps: float, formats: Sequence[str]) -> list[Path]:
        written = save_clip(video, path, fps, formats)
        monkeypatch.setattr(generating, "save_clip", save_clip)
        status, printed = generate(wan_student, suite, output, *one)
        assert "2 videos were made; 2 of 2" in printed, (status, printed)
        return written

    monkeypatch.setattr(generating, "save_clip", meanwhile)
    status, printed = generate(wan_student, suite, output, *one)
    assert status == 0, printed
    assert sorted(os.listdir(output)) == [".lock", "results", "vbench.json", "videos"]


def test_weights_tell_students_apart(wan_student: Path, tmp_path: Path) -> None:
    opened = open_student(wan_student)
    other = open_student(wan_student)._replace(transformer=str(tiny_pipeline.build(tmp_path / "other", seed=1)))
    sampling = Sampling((1,), (16, 2, 2, 4), 5, 16.0, CPU, torch.float32)
    told = [describe(each, sampling, seed=0, samples=None, augmented=False) for each in (opened, other)]
    assert told[0].pop("student") != told[1].pop("student")
    assert told[0] == told[1]
    assert (told[0]["width"], told[0]["height"], told[0]["of_frames"]) == (32, 16, 5)
    of_images = opened._replace(architecture={**opened.architecture, "in_channels": 36})
    with pytest.raises(UserError, match="makes videos of an image and a prompt, and these suites have prompts alone"):
        describe(of_images, sampling, seed=0, samples=None, augmented=False)


def test_a_student_with_an_interpolator_makes_its_videos_at_half_rate(wan_student: Path, tmp_path: Path) -> None:
    suite = write_suite(tmp_path / "VBench_full_info.json", (MOVING[0], ["dynamic_degree"]))
    half, output = tmp_path / "half", tmp_path / "out"
    shutil.copytree(wan_student, half)
    tiny_pipeline.save_interpolator(half / "interpolator")
    small = ("--samples", 1, "--size", "48x32x9", "--fps", 16)
    status, printed = generate(half, suite, output, *small)
    assert status == 0, printed
    record = read_record(output)
    assert record.settings["rates"] == [2, 1]
    student = open_student(half)
    ((sample,),) = sample_clips(
        student, [MOVING[0]], [(2, 1)], (16, 3, 4, 6), seeds=[seed_of(0, MOVING[0], 0)], device=CPU,
        dtype=torch.float32,
    )  # fmt: skip
    (video,) = decode_clips(student, [sample.latents], device=CPU, dtype=torch.float32)
    (expected,) = save_clip(video, tmp_path / "expected", 16, ["mp4"])
    assert (output / DYNAMIC[0]).read_bytes() == expected.read_bytes()
    # Another rate and another interpolator are another student; at full rate it is the one without.
    assert "rates [2, 1], not [1, 1]" in generate(half, suite, output, *small, "--full-rate")[1]
    full = tmp_path / "full"
    for each in (half, wan_student):
        status, printed = generate(each, suite, full, *small, "--full-rate")
        assert status == 0, printed
    assert (full / DYNAMIC[0]).read_bytes() != expected.read_bytes()
    tiny_pipeline.save_interpolator(half / "interpolator", seed=6)
    assert f"student {record.settings['student']}, not " in generate(half, suite, output, *small)[1]


@pytest.mark.parametrize("kind", ["run", "export"])
def test_a_student_with_adapters_makes_videos_of_both(wan_student: Path, tmp_path: Path, kind: str) -> None:
    """The adapters are a run's own, in diffusers' names, or an export's, in those of other programs."""
    suite = write_suite(tmp_path / "VBench_full_info.json", (MOVING[0], ["dynamic_degree"]))
    draws = torch.Generator().manual_seed(3)
    matrices = [3 * torch.randn(shape, generator=draws) for shape in ((2, 24), (24, 2))]
    merged = tmp_path / "merged"
    shutil.copytree(wan_student, merged)
    transformer = WanTransformer3DModel.from_pretrained(merged / "transformer")
    with torch.no_grad():
        transformer.blocks[0].attn1.to_v.weight += 1.5 * matrices[1] @ matrices[0]
    transformer.save_pretrained(merged / "transformer")

    adapted, about = tmp_path / "adapted", {"latent_space": "wan", "timesteps": [1000, 500], "sampler": "re-noise"}
    (adapted / "student").mkdir(parents=True)
    if kind == "run":
        save_config(load_config(TrainConfig, "tiny", [f"teacher={wan_student}"]), adapted / "config.yaml", "avd train")
        file, name = adapted / "student" / ADAPTERS, "transformer.blocks.0.attn1.to_v"
        scale = {"lora_adapter_metadata": json.dumps({"transformer.lora_alpha": 3, "transformer.r": 2})}
    else:
        file, name, scale = adapted / "adapted-lora.safetensors", "diffusion_model.blocks.0.self_attn.v", {}
        matrices[1] *= 1.5
        about |= {"base": str(wan_student), "pipelines": [str(wan_student)]}
    write_json(file.parent / "export.json", about)

    def save() -> None:
        names = (f"{name}.lora_{letter}.weight" for letter in "AB")
        save_file(dict(zip(names, matrices, strict=True)), file, {"format": "pt", **scale})

    save()
    videos = {}
    small = ("--samples", 1, "--size", "32x32x5", "--fps", 16)
    for student in (wan_student, merged, adapted):
        status, printed = generate(student, suite, tmp_path / "out" / student.name, *small)
        assert status == 0, printed
        found = look_at(tmp_path / "out" / student.name / DYNAMIC[0])
        videos[student.name] = read_clip(found, found.form)
    assert (videos["adapted"] - videos["merged"]).abs().mean() < 0.005
    assert (videos["adapted"] - videos["student"]).abs().mean() > 0.02
    # Of one base with other adapters it is another student.
    matrices[0] *= 2
    save()
    status, printed = generate(adapted, suite, tmp_path / "out" / "adapted", *small)
    assert (status, "another student or other settings: student " in printed) == (2, True), printed


def test_mistakes_are_told_before_any_work(wan_student: Path, tmp_path: Path) -> None:
    suite = write_vbench(tmp_path / "VBench_full_info.json")
    for options, message in (
        (["--frames", 6], "--frames 6: clips of this --size have 5"),
        (["--shard", "2/2"], "--shard 2/2: expected I/N with I from 0"),
        (["--dimension", "beauty"], "--dimension beauty: VBench has subject_consistency"),
        (["--half-rate"], "has no interpolator"),
    ):
        status, printed = generate(wan_student, suite, tmp_path / "new", *options)
        assert (status, message in printed) == (2, True), printed
    assert not (tmp_path / "new").exists()


# What is wrong with videos.


def moving(frames: int = 4) -> Tensor:
    """A clip whose pictures differ."""
    ramp = torch.linspace(0, 1, 32).expand(3, frames, 16, 32)
    return (ramp + torch.linspace(0, 0.5, frames).view(1, -1, 1, 1)) % 1


def recorded(folder: Path, suite: Path, dimension: str, **settings: Any) -> Record:
    """A student's folder without videos."""
    read = read_suite(suite)
    known = {"frames": 4, "fps": 16.0, "width": 32, "height": 16, "samples": None, **settings}
    folder.mkdir(parents=True)
    return claim(folder, Record(read.rules, "tiny", known, record_videos(read.videos([dimension]), None, 0)))


def test_every_fault_of_a_folder_is_found(tmp_path: Path) -> None:
    suite = write_suite(tmp_path / "info.json", *((name, ["dynamic_degree"]) for name in ("a", "b")))
    record = recorded(tmp_path / "avd", suite, "dynamic_degree")
    videos = tmp_path / "avd" / "videos"
    videos.mkdir()
    wide = torch.cat([moving(), moving()], dim=-1)
    still = moving()[:, :1].expand(-1, 4, -1, -1)
    for name, video, fps in (
        ("a-0", moving(), 16), ("a-1", moving(), 16), ("a-2", moving(3), 16), ("a-3", moving(), 8), ("a-4", wide, 16),
        ("b-0", torch.full_like(moving(), 0.3), 16), ("b-1", still, 16), ("b-2", moving(), 16),
    ):  # fmt: skip
        save_clip(video, videos / name, fps, ["mp4"])
    (videos / "b-2.mp4").write_bytes((videos / "a-0.mp4").read_bytes()[:200])
    (videos / "b-3.mp4").touch()
    (videos / ".DS_Store").touch()
    faults = check_videos(tmp_path / "avd", record)
    assert {fault.file.removeprefix("videos/"): fault.kind for fault in faults} == {
        "a-2.mp4": "frames", "a-3.mp4": "fps", "a-4.mp4": "size", "b-0.mp4": "blank", "b-1.mp4": "frozen",
        "b-2.mp4": "unreadable", "b-3.mp4": "empty", "b-4.mp4": "missing", ".DS_Store": "extra",
    }  # fmt: skip
    assert {fault.kind for fault in faults} == set(get_args(Kind))
    status, printed = run("evaluate", "vbench", "check", tmp_path / "avd")
    assert status == 1
    assert "│ dynamic_degree │ 10 │ unreadable │ 1 │" in printed
    assert "│ none │ │ extra │ 1 │" in printed
    assert "frames: videos/a-2.mp4 (3, not 4)" in printed
    assert len(json.loads((tmp_path / "avd" / "check.json").read_text())) == 9


def test_a_folder_as_it_should_be_passes(tmp_path: Path) -> None:
    suite = write_suite(tmp_path / "info.json", ("a still", ["temporal_flickering"]))
    record = recorded(tmp_path / "avd", suite, "temporal_flickering")
    (tmp_path / "avd" / "videos").mkdir()
    for each in record.videos:  # standing still is what this prompt asks for
        file = (tmp_path / "avd" / each.video.file).with_suffix("")
        save_clip(moving()[:, :1].expand(-1, 4, -1, -1), file, 16, ["mp4"])
    status, printed = run("evaluate", "vbench", "check", tmp_path / "avd")
    assert status == 0, printed
    assert "All 25 videos are as VBench wants them." in printed


def test_what_an_encoder_changes_is_no_motion_and_a_small_ball_is(tmp_path: Path) -> None:
    suite = write_suite(tmp_path / "1.json", ("a", ["dynamic_degree"]))
    record = recorded(tmp_path / "avd", suite, "dynamic_degree", width=208, height=120, samples=2)
    (tmp_path / "avd" / "videos").mkdir()
    texture = torch.rand(1, 3, 30, 52, generator=torch.Generator().manual_seed(0))
    still = torch.nn.functional.interpolate(texture, size=(120, 208), mode="bilinear")[0][:, None].repeat(1, 4, 1, 1)
    ball = still.clone()
    for frame in range(4):
        ball[:, frame, 50:56, 50 + 6 * frame : 56 + 6 * frame] = 1
    for number, video in enumerate((still, ball)):
        save_clip(video, tmp_path / "avd" / "videos" / f"a-{number}", 16, ["mp4"])
    found = {fault.file: fault.kind for fault in check_videos(tmp_path / "avd", record)}
    assert (found["videos/a-0.mp4"], found.get("videos/a-1.mp4")) == ("frozen", None)


def test_what_a_student_freezes_is_a_warning(tmp_path: Path) -> None:
    record = recorded(tmp_path / "avd", write_suite(tmp_path / "1.json", ("a", ["dynamic_degree"])), "dynamic_degree")
    (tmp_path / "avd" / "videos").mkdir()
    for each in record.videos:
        still = moving()[:, :1].expand(-1, 4, -1, -1)
        save_clip(still, (tmp_path / "avd" / each.video.file).with_suffix(""), 16, ["mp4"])
    status, printed = run("evaluate", "vbench", "check", tmp_path / "avd")
    assert status == 0, printed
    assert "│ dynamic_degree │ 5 │ frozen │ 5 │" in printed
    assert "Look at what is blank or frozen" in printed
    assert "Delete" not in printed


# What the suites say.


def judge(folder: Path, dimension: str, results: Sequence[float], *, below: str | None = None, **changes: Any) -> Path:
    """What a suite would have written of a folder's first videos, at ``below`` on its machine."""
    found = [each.video.file for each in read_record(folder).videos][: len(results)]
    kept = [result for result in results if result != -1]
    start = str(folder) if below is None else below
    value = [
        sum(kept) / len(kept),
        [{"video_path": f"{start}/{file}", "video_results": each} for file, each in zip(found, results, strict=True)],
    ]
    path = folder / "results" / f"{changes.get('name', 'results')}_eval_results.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps({dimension: changes.get("value", value)}))
    return path


def preserved(folder: Path, misses: int = 0) -> Record:
    """A folder for 57 prompts of VBench-2.0, of which so many videos were not preserved."""
    suite = write_suite(folder.with_suffix(".json"), *((f"prompt {i}", ["Instance_Preservation"]) for i in range(57)))
    record = recorded(folder, suite, "Instance_Preservation", frames=81)
    judge(folder, "Instance_Preservation", [1.0] * (171 - misses) + [0.0] * misses)
    return record


def test_wilsons_interval() -> None:
    assert Count(308, 360).interval == pytest.approx((0.8155, 0.8881), abs=1e-4)
    assert Count(360, 360).interval == pytest.approx((0.9894, 1), abs=1e-4)


def test_the_papers_percentages_are_these_counts() -> None:
    # Cut or rounded to two digits: both are in its table.
    for dimension, printed in (
        ("Instance_Preservation", (92.39, 88.88, 85.38, 83.04, 92.39, 91.81)),
        ("dynamic_degree", (85.56, 72.22, 100.00, 78.61, 99.72, 97.77)),
    ):
        shares = [100 * count.share for count in PAPER[dimension].values()]
        assert shares == pytest.approx(printed, abs=0.01)


def test_students_stand_side_by_side_beside_the_paper(tmp_path: Path) -> None:
    for name, misses in (("avd", 14), ("dmd", 13)):
        preserved(tmp_path / name, misses)
    printed_log = "x\nError processing video: ./model_clip/avd/prompt 0-1_clip_0002.mp4\nError processing video: no\n"
    (tmp_path / "avd" / "results" / "night.log").write_text(printed_log)
    status, printed = run("evaluate", "vbench", "collect", tmp_path / "avd", tmp_path / "dmd", "-o", tmp_path / "table")
    assert status == 0, printed
    written = (tmp_path / "table" / "vbench.md").read_text()
    header, _, row, *_ = written.splitlines()
    assert header.startswith("| dimension | avd | dmd | paper: teacher | paper: DMD |")
    assert row.startswith(
        "| Instance_Preservation | 91.81 [86.7, 95.1] 157/171 ! | 92.40 [87.4, 95.5] 158/171 ! | 92.40"
    )
    assert "- Instance_Preservation: one of 171 videos is 0.58 points." in written
    assert (
        "avd, Instance_Preservation: 1 videos count as preserved although the model failed on them, such as " in written
    )
    assert "'prompt 0-1.mp4'" in written
    assert "dmd, Instance_Preservation: no log in results/" in written
    values = json.loads((tmp_path / "table" / "vbench.json").read_text())
    assert values["students"]["dmd"]["scores"]["Instance_Preservation"]["hits"] == 158
    assert values["paper"]["Instance_Preservation"]["half rate"]["hits"] == 157
    status, printed = run("evaluate", "vbench", "collect", tmp_path / "avd", tmp_path / "avd")
    assert (status, "A folder is given twice" in printed) == (2, True)


VBENCH_2_STAND_IN = """
import argparse, json, os
parser = argparse.ArgumentParser()
for name in ("videos_path", "dimension", "output_path"):
    parser.add_argument("--" + name, required=True)
asked = parser.parse_args()
os.makedirs(asked.output_path, exist_ok=True)
videos = [os.path.join(asked.videos_path, name) for name in os.listdir(asked.videos_path)]
with open(asked.output_path + "/results_now_eval_results.json", "w") as file:
    json.dump({asked.dimension: [1.0, [{"video_path": path, "video_results": 1.0} for path in videos]]}, file)
print("Error processing video: ./model_clip/avd/a red circle-1_clip_0000.mp4")
"""
"""Its ``evaluate.py``, of which these options are required or needed: it finds no fault, and fails on one video."""


def test_vbench_2_is_run_as_the_page_has_it(tmp_path: Path) -> None:
    page = (Path(__file__).parents[3] / "docs" / "vbench.md").read_text(encoding="utf-8")
    (commands,) = re.findall(r"^```bash\n(.*?)^```", page, re.DOTALL | re.MULTILINE)
    folder = tmp_path / "night2" / "avd"
    record = recorded(folder, write_vbench_2(tmp_path / "1.json"), "Instance_Preservation", frames=81)
    for each in record.videos:
        (folder / each.video.file).parent.mkdir(exist_ok=True)
        (folder / each.video.file).touch()
    (tmp_path / "VBENCH2").mkdir()
    (tmp_path / "VBENCH2" / "evaluate.py").write_text(VBENCH_2_STAND_IN)
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    subprocess.run(["bash", "-e", "-c", commands], cwd=tmp_path, env={**os.environ, "PATH": path}, check=True)
    score = read_results(folder).scores["Instance_Preservation"]
    assert (score.count, score.failed) == (Count(3, 3), ("a red circle-1.mp4",))


def test_what_is_not_in_a_mean_is_said(tmp_path: Path) -> None:
    suite = write_suite(tmp_path / "1.json", *((f"p{i}", ["Material"]) for i in range(4)))
    recorded(tmp_path / "avd", suite, "Material")
    judge(tmp_path / "avd", "Material", [1, 1, 0, -1, -1, 1, 1], below="somewhere/avd")
    found = read_results(tmp_path / "avd")
    score = found.scores["Material"]
    assert (score.count, score.left_out, score.wanted) == (Count(4, 5), 2, 12)
    assert table({"avd": found})[1][1].endswith("4/5 !")
    said = " ".join(notes({"avd": found}))
    assert "avd, Material: 2 videos do not show what is to be judged" in said
    assert "avd, Material: 5 of 12 are not in the mean" in said


def test_students_that_are_not_sampled_alike_are_told_of(tmp_path: Path) -> None:
    suite = write_suite(tmp_path / "1.json", ("a", ["dynamic_degree"]))
    for name, settings in (("avd", {"seed": 0, "samples": 2}), ("dmd", {"seed": 1, "frames": 9, "augmented": True})):
        recorded(tmp_path / name, suite, "dynamic_degree", student=name, **{"augmented": False, **settings})
        judge(tmp_path / name, "dynamic_degree", [1.0] * settings.get("samples", 5))
    found = {name: read_results(tmp_path / name) for name in ("avd", "dmd")}
    said = notes(found)
    assert said[:4] == [
        "VBench: students differ in frames: avd 4, dmd 9.",
        "VBench: students differ in samples: avd 2, dmd the suite's.",
        "VBench: students differ in augmented: avd False, dmd True.",
        "VBench: students differ in seed: avd 0, dmd 1.",
    ]
    assert "avd, dynamic_degree: 2 videos of a prompt, and VBench wants 5." in said
    avd, dmd = table(found)[1][1:3]
    assert (avd[-1], dmd[-1]) == ("!", "5")


def test_diversity_has_one_number_for_all_videos_of_a_prompt(tmp_path: Path) -> None:
    recorded(tmp_path / "avd", write_vbench_2(tmp_path / "1.json"), "Diversity")
    judge(tmp_path / "avd", "Diversity", [0.25])
    found = read_results(tmp_path / "avd")
    assert (found.scores["Diversity"].judged, found.scores["Diversity"].wanted) == (1, 1)
    assert table({"avd": found}) == [["dimension", "avd"], ["Diversity", "25.00"]]


def test_flicker_is_judged_on_what_the_static_filter_kept(tmp_path: Path) -> None:
    recorded(tmp_path / "avd", write_vbench(tmp_path / "1.json"), "temporal_flickering")
    judge(tmp_path / "avd", "temporal_flickering", [0.5] * 5)
    (said,) = notes({"avd": read_results(tmp_path / "avd")})
    assert said == (
        "avd, temporal_flickering: videos did not go through the suite's static filter, so motion counts as flicker."
    )
    file = judge(tmp_path / "avd", "temporal_flickering", [0.5] * 5)
    file.write_text(file.read_text().replace("/videos/", "/filtered_videos/"))
    assert notes({"avd": read_results(tmp_path / "avd")}) == []


def test_short_clips_are_not_looked_at_for_preservation(tmp_path: Path) -> None:
    suite = write_vbench_2(tmp_path / "1.json")
    recorded(tmp_path / "avd", suite, "Instance_Preservation", frames=31)
    judge(tmp_path / "avd", "Instance_Preservation", [1, 1, 1])
    assert any("clips of under 2 seconds" in note for note in notes({"avd": read_results(tmp_path / "avd")}))


def test_results_of_something_else_are_refused(tmp_path: Path) -> None:
    folder = tmp_path / "avd"
    recorded(folder, write_vbench(tmp_path / "1.json"), "dynamic_degree")

    def message() -> str:
        with pytest.raises(UserError) as error:
            read_results(folder)
        return str(error.value)

    assert "has no *_eval_results.json. Run VBench with --output_path in it first." in message()
    judge(folder, "dynamic_degree", [True, False], below="/elsewhere/dmd")
    assert "expected a video at .../avd/videos/a red circle moves left-0.mp4: it is the result of another" in message()
    # As short as a path may be, and as a suite run in the folder itself has it.
    file = judge(folder, "dynamic_degree", [True, False], below="..")
    assert read_results(folder).scores["dynamic_degree"].count == Count(1, 2)
    judge(folder, "dynamic_degree", [True, False], below="../../nights/../avd")
    assert read_results(folder).scores["dynamic_degree"].count == Count(1, 2)
    judge(folder, "dynamic_degree", [True, False], below="../dmd")
    assert "it is the result of another folder" in message()
    judge(folder, "dynamic_degree", [True, False], below="..")
    file.write_text(file.read_text().replace("../", ""))
    assert read_results(folder).scores["dynamic_degree"].count == Count(1, 2)
    file.write_text(file.read_text().replace("red circle", "green dog"))
    assert "judges 'a green dog moves left-0.mp4' for dynamic_degree, and" in message()
    judge(folder, "color", [1.0])
    assert "has results of color, and" in message()
    judge(folder, "dynamic_degree", [0.5, 0.25])
    assert "expected 0 or 1 for each video in dynamic_degree" in message()
    judge(folder, "dynamic_degree", [1], value=[0.5, [{"video_path": DYNAMIC[0], "video_results": 1}]])
    assert "expected 0 or 1 for each video" in message()
    judge(folder, "dynamic_degree", [1], value=[1.0, [{"video": "a"}]])
    assert "should be [mean, [{video_path, video_results}, ...]]" in message()
    judge(folder, "dynamic_degree", [1], value=[float("nan"), []])
    assert "has no judged video" in message()
    judge(folder, "dynamic_degree", [1], value=[1.0, 2 * [{"video_path": DYNAMIC[0], "video_results": 1}]])
    assert "has a video more than once" in message()
    judge(folder, "dynamic_degree", [True, False])
    judge(folder, "dynamic_degree", [True, False], name="again")
    assert read_results(folder).scores["dynamic_degree"].count == Count(1, 2)
    judge(folder, "dynamic_degree", [True, True], name="again")
    assert "say different things of dynamic_degree. Delete the one that is old." in message()


def test_two_students_of_one_name_are_told_of(tmp_path: Path) -> None:
    for place in ("a", "b"):
        preserved(tmp_path / place / "avd")
    found = {str(tmp_path / place / "avd"): read_results(tmp_path / place / "avd") for place in ("a", "b")}
    assert any("the second was given the first's" in note for note in notes(found))


def test_a_student_called_vbench_can_be_measured(tmp_path: Path) -> None:
    # The two words are the other command; with a path before it, it is a folder.
    status, printed = run("evaluate", "./vbench", "--output", tmp_path / "table")
    assert (status, "vbench: there is no such folder" in printed) == (2, True)
