"""The whole way on a laptop, by the commands that the documentation names: videos, data, student, clips."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from PIL import Image

from avd_trainer.data.moving_shapes import MovingShapes
from avd_trainer.data.shard_reading import ShardDataset
from avd_trainer.data.video_files import save_clip
from avd_trainer.training.checkpoint import latest_checkpoint, read_state
from command_line import run_command as run
from in_process import prepared_in_this_process

QUICK = ("--set", "batch_size=2", "--set", "method.online_updates=1", "--set", "data.workers=0")


@pytest.fixture(autouse=True, scope="module")
def _in_this_process() -> Iterator[None]:
    with prepared_in_this_process():
        yield


def encode(folder: Path, seed: int, *options: object) -> Path:
    """A data set of two clips."""
    videos, data = folder / f"videos-{seed}", folder / f"data-{seed}"
    videos.mkdir()
    # Larger than the clips: at their own size, 4:2:0 would leave two of the codec's channels of colour empty.
    shapes = MovingShapes(2, seed, frames=19, size=64)
    for number in range(2):
        save_clip(shapes[number].video, videos / f"clip-{number}", fps=12, formats=["mp4"])
        (videos / f"clip-{number}.txt").write_text(shapes[number].caption)
    status, said = run("data", "encode", "--videos", videos, "--output", data, "--model", "tiny", "--fps", 12, *options)
    assert status == 0, said
    return data


def test_from_videos_to_clips_of_a_student(tmp_path: Path) -> None:
    data = [encode(tmp_path, seed) for seed in (1, 2)]
    assert ShardDataset(data[0]).latent_shape == (16, 5, 8, 8)
    status, said = run("data", "inspect", data[0])
    assert status == 0
    assert "the tiny preset's block DCT, 12 frames per second" in said

    student, pipeline = tmp_path / "run", tmp_path / "pipeline"
    both = ("--data", data[0], "--data", data[1])
    options = ("--output", student, "--max-steps", 2, *QUICK, "--set", "samples.every=2", "--set", "samples.count=3")
    status, said = run("train", "tiny", *both, *options)
    assert status == 0, said
    clips = student / "samples" / "step-00000002"
    with Image.open(clips / "2.gif") as animation:  # the third prompt is of the second data set
        assert (animation.size, animation.n_frames) == ((32, 32), 17)  # type: ignore[attr-defined]
    checkpoint = latest_checkpoint(student / "checkpoints")
    assert checkpoint is not None
    assert read_state(checkpoint)["encoding"] == {"latent_space": "block-dct-4", "codec": None, "fps": 12.0}

    status, said = run("export", student, "--output", pipeline)
    assert status == 0, said
    about = json.loads((pipeline / "export.json").read_text())
    assert (about["latent_space"], about["clip"], about["fps"]) == ("block-dct-4", [16, 5, 8, 8], 12.0)
    status, said = run("sample", pipeline, "--prompt", "a red circle moving left", "--output", tmp_path / "clip.gif")
    assert status == 0, said
    with Image.open(tmp_path / "clip.gif") as animation:
        assert (animation.size, animation.n_frames) == ((32, 32), 17)  # type: ignore[attr-defined]


def test_a_run_goes_on_with_all_of_its_data_sets_alone(tmp_path: Path) -> None:
    data = [encode(tmp_path, seed) for seed in (1, 2)]
    options = ("--output", tmp_path / "run", *QUICK)
    status, said = run("train", "tiny", "--data", data[0], "--data", data[1], *options, "--max-steps", 1)
    assert status == 0, said
    status, said = run("train", "tiny", "--data", data[1], *options, "--max-steps", 2)
    assert status == 2
    assert "The run to be resumed read 2 data set(s), this one 1" in said
    (data[1] / "data-00000-of-00001.parquet").unlink()
    status, said = run("train", "tiny", "--data", data[0], "--data", data[1], *options, "--max-steps", 2)
    assert status == 2
    assert str(data[1]) in said


@pytest.mark.parametrize("command", ["train", "calibrate"])
def test_data_of_another_latent_space_than_the_teachers_is_refused(tmp_path: Path, command: str) -> None:
    from avd_trainer.data.schema import Encoding
    from avd_trainer.data.shard_writing import ShardWriter

    with ShardWriter(tmp_path / "data", text_length=24, text_dim=32, encoding=Encoding("wan", "a/b", 16.0)) as writer:
        writer.add(torch.zeros(16, 3, 4, 4), torch.zeros(1, 32), "", "")
        writer.set_unconditional(torch.zeros(0, 32), "")
    output = ("--output", tmp_path / "run") if command == "train" else ()
    status, said = run(command, "tiny", "--data", tmp_path / "data", *output)
    assert status == 2
    assert (
        "data is encoded by Wan's VAE of a/b, 16 frames per second, and the teacher bundled:tiny makes latents of the "
        "tiny preset's block DCT" in said
    )
    assert "`avd data encode --model tiny`" in said
