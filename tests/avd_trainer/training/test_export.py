import json
import os
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline, WanPipeline, WanTransformer3DModel
from safetensors import safe_open
from torch import Tensor
from typer.testing import CliRunner

import tiny_pipeline
from avd_core import LatentFrameInterpolator
from avd_integrations.diffusers import FewStepScheduler
from avd_trainer.commands.app import app
from avd_trainer.data.in_memory import CaptionedLatents, InMemoryData
from avd_trainer.data.sources import TrainingData
from avd_trainer.models.roles import load_models
from avd_trainer.models.samplers import few_step_rollout
from avd_trainer.models.schedulers import closest_scheduler, grid_error
from avd_trainer.models.text_encoders.hashed import HashTextEmbedding
from avd_trainer.models.text_encoders.umt5 import WanTextEncoder
from avd_trainer.models.transformer import VelocityModel, load_transformer
from avd_trainer.runtime.errors import UserError
from avd_trainer.runtime.ranks import Ranks
from avd_trainer.training.config import TrainConfig
from avd_trainer.training.export import export_student
from avd_trainer.training.pipeline_export import ExportedPipeline, export_pipeline
from avd_trainer.training.run import train
from avd_trainer.training.trainer import Trainer
from launches import Launch

MakeConfig = Callable[..., TrainConfig]
NAMES = ["config.json", "diffusion_pytorch_model.safetensors", "export.json"]


def model_inputs() -> tuple[Tensor, Tensor, Tensor]:
    """Noised clips, timesteps and text for a forward."""
    draws = torch.Generator().manual_seed(2)
    clips, text = torch.randn(2, 16, 3, 4, 4, generator=draws), torch.randn(2, 4, 16, generator=draws)
    return clips, torch.tensor([757.0, 300.0]), text


@pytest.fixture
def config(make_config: MakeConfig) -> TrainConfig:
    return make_config(
        online_updates=1, checkpoint={"every": 1, "keep_latest": 3}, logging={"tensorboard": False}, max_steps=2
    )


@pytest.fixture
def data(clips: CaptionedLatents) -> TrainingData:
    memory = InMemoryData(clips, HashTextEmbedding(4, 6))
    return TrainingData(memory, memory)


@pytest.fixture
def run(config: TrainConfig, data: TrainingData, tmp_path: Path, ranks: Ranks) -> Path:
    train(config, tmp_path / "run", ranks, data=data)
    return tmp_path / "run"


def exported(folder: Path) -> dict[str, Tensor]:
    """As a person loads it."""
    return dict(WanTransformer3DModel.from_pretrained(folder).named_parameters())


def assert_equal(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert actual.keys() == expected.keys()
    assert all(torch.equal(actual[name], expected[name]) for name in expected)


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def test_averaged_and_last_weights_of_any_step(
    config: TrainConfig, data: TrainingData, run: Path, tmp_path: Path, ranks: Ranks
) -> None:
    trainer = Trainer(config, load_models(config, ranks), data, ranks)
    expected = {}
    for step, _ in enumerate(trainer.run(), start=1):
        for weights in ("ema", "student"):
            tensors = trainer.state_tensors()[weights]
            expected[weights, step] = {name: value.full_tensor().clone() for name, value in tensors.items()}  # type: ignore[attr-defined]
    for (weights, step), tensors in expected.items():
        export_student(run, tmp_path / "out", weights=weights, step=step)  # each over the one before
        assert sorted(os.listdir(tmp_path / "out")) == NAMES
        assert_equal(exported(tmp_path / "out"), tensors)
    distinct = {
        torch.cat([t.flatten() for t in tensors.values()]).double().sum().item() for tensors in expected.values()
    }
    assert len(distinct) == 4
    # What nobody asked for: the average, of the newest; as the run itself leaves it.
    export_student(run, tmp_path / "out")
    assert_equal(exported(tmp_path / "out"), expected["ema", 2])
    assert files(tmp_path / "out") == files(run / "student")


def test_another_type(run: Path, tmp_path: Path) -> None:
    export_student(run, tmp_path / "out", dtype=torch.bfloat16)
    found = WanTransformer3DModel.from_pretrained(tmp_path / "out", torch_dtype="auto").state_dict()
    expected = exported(run / "student")
    assert all(torch.equal(found[name].bfloat16(), value.bfloat16()) for name, value in expected.items())
    half = (tmp_path / "out" / NAMES[1]).stat().st_size / (run / "student" / NAMES[1]).stat().st_size
    assert 0.4 < half < 0.7


def test_what_is_no_export_is_left_alone(run: Path, tmp_path: Path) -> None:
    for number, names in enumerate(
        (["mine.txt"], ["config.json", "diffusion_pytorch_model.safetensors"], ["a/folder"], ["model.safetensors"])
    ):
        output = tmp_path / str(number)
        for name in names:
            (output / name).parent.mkdir(parents=True, exist_ok=True)
            (output / name).write_text("mine")
        with pytest.raises(UserError, match=f"{output} holds something that is no earlier export. Move it away"):
            export_student(run, output)
        assert all((output / name).read_text() == "mine" for name in names)
    file = tmp_path / "0" / "mine.txt"
    with pytest.raises(UserError, match="holds something that is no earlier export"):
        export_student(run, file)
    with pytest.raises(UserError, match=r"mine\.txt/student cannot be written: .*choose another --output"):
        export_student(run, file / "student")
    assert file.read_text() == "mine"
    assert sorted(os.listdir(tmp_path)) == ["0", "1", "2", "3", "run"]


def test_what_is_not_there_is_said(run: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"run has no checkpoint of step 7; there are \[1, 2\]"):
        export_student(run, tmp_path / "out", step=7)
    with pytest.raises(UserError, match=r"holds no checkpoint yet\. Pass the --output folder of an `avd train` run"):
        export_student(tmp_path, tmp_path / "out")
    (next((run / "checkpoints" / "step-00000002").glob("*.safetensors"))).unlink()
    with pytest.raises(UserError, match="step-00000002 cannot be read"):
        export_student(run, tmp_path / "out")
    assert os.listdir(tmp_path) == ["run"]


def export_and_die(run: Path, output: Path, operation: int) -> None:
    """Export; killed before the ``operation``-th access to what has the output's name, or one made from it."""
    seen = 0

    def watch(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal seen
        if event in ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir"):
            within = event in ("os.remove", "os.rmdir") and arguments[1] != -1
            if within or str(arguments[0]).startswith(str(output)):
                seen += 1
                if seen == operation:
                    os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(watch)
    export_student(run, output, weights="student")


def test_an_export_that_is_killed_leaves_nothing_that_looks_whole(run: Path, tmp_path: Path) -> None:
    output = tmp_path / "exported" / "out"
    export_student(run, output)
    old = files(output)
    export_student(run, tmp_path / "new", weights="student")
    new = files(tmp_path / "new")
    seen = set()
    for operation in range(1, 40):
        with Launch(1, export_and_die, run, output, operation) as launch:
            (status,) = launch.wait()
        assert status in (0, -signal.SIGKILL), launch.printed()
        found = files(output) if output.exists() else None
        assert found in (old, new, None)
        seen.add("none" if found is None else "old" if found == old else "new")
        if status == 0:
            break
    assert status == 0
    assert operation > 8
    assert {"old", "new"} <= seen
    assert os.listdir(output.parent) == ["out"]


def export_to_a_full_disk(run: Path, output: Path) -> str:
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
    try:
        export_student(run, output)
    except UserError as error:
        return str(error)
    return ""


def test_a_full_disk_is_named_and_the_earlier_export_stays(run: Path, tmp_path: Path) -> None:
    output = tmp_path / "exported" / "out"
    export_student(run, output, weights="student")
    before = files(output)
    with Launch(1, export_to_a_full_disk, run, output) as launch:
        (message,) = launch.results()
    assert f"{output} cannot be written: " in message
    assert "File too large" in message
    assert files(output) == before
    assert os.listdir(output.parent) == ["out"]


@pytest.mark.parametrize("weights", ["ema", "student"])
def test_adapters_load_into_the_pipeline_that_they_were_trained_on(
    make_config: MakeConfig, clips: CaptionedLatents, tmp_path: Path, ranks: Ranks, weights: Any
) -> None:
    teacher = tiny_pipeline.build(tmp_path / "teacher")
    config = make_config(
        teacher=str(teacher), student_lora={"rank": 2, "alpha": 6.0}, online_lora={"rank": 3}, online_updates=1,
        checkpoint={"every": 1}, logging={"tensorboard": False},
    )  # fmt: skip
    memory = InMemoryData(clips, HashTextEmbedding(4, 16))
    data = TrainingData(memory, memory)
    train(config, tmp_path / "run", ranks, data=data)
    export_student(tmp_path / "run", tmp_path / "out", weights=weights)
    assert sorted(os.listdir(tmp_path / "out")) == ["export.json", "pytorch_lora_weights.safetensors"]

    trainer = Trainer(config, load_models(config, ranks), data, ranks)
    list(trainer.run())
    inputs = model_inputs()
    pipeline = WanPipeline.from_pretrained(teacher, vae=None, text_encoder=None, tokenizer=None)
    with torch.no_grad():
        if weights == "ema":
            with trainer.ema.average_parameters():
                expected = trainer.student(*inputs)
        else:
            expected = trainer.student(*inputs)
        before = pipeline.transformer(*inputs).sample
        pipeline.load_lora_weights(tmp_path / "out")
        torch.testing.assert_close(pipeline.transformer(*inputs).sample, expected, rtol=0, atol=1e-5)
    assert (expected - before).abs().max() > 1e-3


@pytest.fixture(scope="module")
def wan(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Wan pipeline; with files that nobody may copy."""
    folder = tiny_pipeline.build(tmp_path_factory.mktemp("wan") / "pipeline")
    (folder / "vae" / "diffusion_pytorch_model.bin").write_text("a pickle")
    return folder


WanRun = Callable[..., Path]


@pytest.fixture
def wan_run(make_config: MakeConfig, clips: CaptionedLatents, tmp_path: Path, ranks: Ranks, wan: Path) -> WanRun:
    """Two steps on clips in Wan's latents, whose shards are gone by the time of the export."""

    def make(**changes: Any) -> Path:
        config = make_config(
            **{"teacher": str(wan), "data": {"kind": "shards", "path": str(tmp_path / "gone")}, "online_updates": 1,
               "max_steps": 2, "logging": {"tensorboard": False}} | changes
        )  # fmt: skip
        memory = InMemoryData(clips, HashTextEmbedding(4, 16))
        train(config, tmp_path / "run", ranks, data=TrainingData(memory, memory))
        return tmp_path / "run"

    return make


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def read_json(path: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(path.read_text())
    return content


def test_a_pipeline_samples_in_diffusers_what_the_trainer_samples(wan_run: WanRun, wan: Path, tmp_path: Path) -> None:
    grid = [1000, 880, 700, 410]
    run = wan_run(objective={"timesteps": grid})
    assert export_pipeline(run, tmp_path / "out") == ExportedPipeline("wan", (), pytest.approx(0.7, abs=0.1))
    pipeline = DiffusionPipeline.from_pretrained(tmp_path / "out")
    assert type(pipeline) is WanPipeline
    pipeline.scheduler.set_timesteps(4)
    torch.testing.assert_close(pipeline.scheduler.timesteps, torch.tensor(grid), rtol=0, atol=1, check_dtype=False)
    pipeline.scheduler = FewStepScheduler.from_config(pipeline.scheduler.config)
    assert pipeline.scheduler.timesteps.tolist() == grid
    noise = torch.randn(1, 16, 3, 4, 6, generator=torch.Generator().manual_seed(3))
    torch.manual_seed(4)
    found = pipeline(
        "a red circle", height=32, width=48, num_frames=9, num_inference_steps=4, guidance_scale=1.0, latents=noise,
        output_type="latent",
    ).frames  # fmt: skip

    (tokens,) = WanTextEncoder.from_pretrained(str(wan), dtype=torch.float32)(["a red circle"])
    text = torch.nn.functional.pad(tokens, (0, 0, 0, 512 - len(tokens))).unsqueeze(0)
    student = VelocityModel(load_transformer(str(run / "student")))
    torch.manual_seed(4)
    draws = [noise]

    def draw(shape: Any) -> Tensor:
        return draws.pop() if draws else torch.randn(1, *shape)

    with torch.no_grad():
        expected = few_step_rollout(student, text, noise.shape[1:], grid, draw).x_0
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)
    assert expected.std() > 0.1


def test_the_files_of_a_pipeline(wan_run: WanRun, wan: Path, tmp_path: Path) -> None:
    run = wan_run(samples={"fps": 8})
    LatentFrameInterpolator(16, (8, 8, 8)).save_pretrained(tmp_path / "trained" / "interpolator")
    export_pipeline(run, tmp_path / "out", interpolator=tmp_path / "trained", dtype=torch.bfloat16)
    found, source = contents(tmp_path / "out"), contents(wan)
    for part in ("vae", "text_encoder", "tokenizer"):
        expected = {name: data for name, data in source.items() if name.startswith(part) and "bin" not in name}
        assert {name: data for name, data in found.items() if name.startswith(part)} == expected
        assert expected
    index = read_json(tmp_path / "out" / "model_index.json")
    wanted = read_json(wan / "model_index.json")
    assert index["_class_name"] == "WanPipeline"
    assert all(index[part] == wanted[part] for part in ("vae", "text_encoder", "tokenizer", "transformer"))
    assert index["scheduler"] == ["diffusers", "FlowMatchLCMScheduler"]
    assert index["interpolator"] == ["avd_integrations.diffusers", "LatentFrameInterpolatorModel"]
    assert found["interpolator/config.json"] == (tmp_path / "trained" / "interpolator" / "config.json").read_bytes()
    about = read_json(tmp_path / "out" / "export.json")
    assert about == {
        "run": str(run), "step": 2, "weights": "ema", "version": about["version"], "latent_space": "wan",
        "clip": [16, 3, 4, 4], "fps": 8.0, "timesteps": [1000.0, 900.0, 757.0, 522.0],
    }  # fmt: skip
    with safe_open(tmp_path / "out" / "transformer" / "diffusion_pytorch_model.safetensors", framework="pt") as file:
        assert {file.get_tensor(name).dtype for name in file.keys()} == {torch.bfloat16}  # noqa: SIM118
    # The next one replaces all of it.
    export_pipeline(run, tmp_path / "out")
    assert "interpolator" not in os.listdir(tmp_path / "out")
    assert "interpolator" not in read_json(tmp_path / "out" / "model_index.json")


def test_diffusers_alone_loads_and_runs_a_pipeline(wan_run: WanRun, tmp_path: Path) -> None:
    """In a process of its own, where nothing of this project is imported; also beside an interpolator."""
    LatentFrameInterpolator(16, (8, 8, 8)).save_pretrained(tmp_path / "interpolator")
    export_pipeline(wan_run(), tmp_path / "out", interpolator=tmp_path / "interpolator")
    program = """
import sys
from diffusers import DiffusionPipeline
pipeline = DiffusionPipeline.from_pretrained(sys.argv[1])
frames = pipeline("a", height=32, width=32, num_frames=9, num_inference_steps=4, guidance_scale=1.0).frames
assert frames.shape == (1, 9, 32, 32, 3), frames.shape
assert not any(name.startswith("avd") for name in sys.modules)
print(*pipeline.scheduler.timesteps.tolist())
"""
    result = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path / "out")], capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    assert [float(timestep) for timestep in result.stdout.split()] == pytest.approx([1000, 900, 757, 522], abs=1.2)
    assert "timesteps" not in result.stderr  # no warning about a grid that is not used


@pytest.mark.parametrize(
    ("grid", "off"),
    [
        ((1000, 900, 757, 522), 1.1),
        ((1000, 750, 500, 250), 0.01),
        ((1000, 937.5, 833.333, 625), 0.01),
        ((1000, 500), 0.01),
        ((1000,), 0.01),
        (tuple(range(1000, 0, -100)), 0.01),
        ((900, 600, 300), 100),  # its grids begin at 1000
    ],
)
def test_diffusers_scheduler_comes_close_to_a_grid(grid: tuple[float, ...], off: float) -> None:
    scheduler = closest_scheduler(grid)
    scheduler.set_timesteps(len(grid))
    assert scheduler.timesteps.tolist() == pytest.approx(grid, abs=off)
    error = grid_error(scheduler, grid)
    assert error <= off
    assert error == max(abs(scheduler.timesteps.numpy() - grid))


def test_a_grid_that_diffusers_cannot_follow_is_said(run: Path, tmp_path: Path, make_config: MakeConfig) -> None:
    export = ["export", str(run), "--output", str(tmp_path / "out")]
    assert "off the student's" not in CliRunner().invoke(app, export).output
    checkpoint = max((run / "checkpoints").iterdir())
    state = json.loads((checkpoint / "state.json").read_text())
    state["config"]["objective"]["timesteps"] = [900, 600, 300]
    (checkpoint / "state.json").write_text(json.dumps(state))
    printed = " ".join(CliRunner().invoke(app, export).output.split())
    assert "off the student's by up to 100 of 1000" in printed
    assert "FewStepScheduler.from_config" in printed


def test_parts_come_from_the_first_source_that_has_them(wan_run: WanRun, wan: Path, tmp_path: Path) -> None:
    other = tiny_pipeline.build(tmp_path / "other", seed=1)
    codec = tmp_path / "codec"
    shutil.copytree(other / "vae", codec / "vae")
    run = wan_run(teacher=str(wan / "transformer"), codec=str(codec))
    missing = export_pipeline(run, tmp_path / "out").missing
    assert missing == ("text_encoder", "tokenizer")
    index = read_json(tmp_path / "out" / "model_index.json")
    assert (index["vae"], index["tokenizer"]) == (["diffusers", "AutoencoderKLWan"], [None, None])
    assert contents(tmp_path / "out" / "vae") == contents(codec / "vae")
    shutil.copytree(wan / "vae", tmp_path / "mine" / "vae")
    assert export_pipeline(run, tmp_path / "out", pipeline=str(tmp_path / "mine")).missing == missing
    assert contents(tmp_path / "out" / "vae").items() <= contents(wan / "vae").items()
    assert export_pipeline(run, tmp_path / "out", pipeline=str(wan)).missing == ()
    assert contents(tmp_path / "out" / "vae").items() <= contents(wan / "vae").items()


def test_parts_of_a_pipeline_on_the_hub(
    wan_run: WanRun, wan: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = wan_run(teacher=str(wan / "transformer"))
    asked = []

    def snapshot_download(repository: str, *, allow_patterns: list[str]) -> str:
        asked.append((repository, allow_patterns))
        if repository == "a/b":
            return str(wan)
        raise ConnectionError("no network.\nPlease see our manual")

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    assert export_pipeline(run, tmp_path / "out", pipeline="a/b").missing == ()
    ((repository, patterns),) = asked
    assert repository == "a/b"
    assert {"model_index.json", "vae/*.safetensors", "text_encoder/*.json", "tokenizer/*.model"} <= set(patterns)
    assert not any(pattern.startswith("transformer") or "bin" in pattern for pattern in patterns)
    with pytest.raises(UserError, match=r"downloaded \(ConnectionError: no network\)\. Pass --pipeline FOLDER"):
        export_pipeline(run, tmp_path / "new", pipeline="a/c")
    assert "new" not in os.listdir(tmp_path)


def test_a_tiny_run_needs_no_parts(run: Path, wan: Path, tmp_path: Path) -> None:
    assert export_pipeline(run, tmp_path / "out") == ExportedPipeline(
        "block-dct", ("vae", "text_encoder", "tokenizer"), pytest.approx(1.1, abs=0.01)
    )
    assert_equal(exported(tmp_path / "out" / "transformer"), exported(run / "student"))
    about = read_json(tmp_path / "out" / "export.json")
    assert (about["latent_space"], about["clip"]) == ("block-dct", [16, 3, 4, 4])
    pipeline = DiffusionPipeline.from_pretrained(tmp_path / "out", vae=None, text_encoder=None, tokenizer=None)
    text = torch.randn(1, 4, 6)
    latents = pipeline(
        prompt_embeds=text, height=32, width=32, num_frames=9, num_inference_steps=4, guidance_scale=1.0,
        output_type="latent",
    ).frames  # fmt: skip
    assert latents.shape == (1, 16, 3, 4, 4)
    with pytest.raises(UserError, match="was trained on those of the tiny preset, which need none"):
        export_pipeline(run, tmp_path / "out", pipeline=str(wan))


def test_a_pipeline_that_is_not_whole_is_named(wan_run: WanRun, wan: Path, tmp_path: Path) -> None:
    run = wan_run()
    for number, broken in enumerate(("vae/config.json", "text_encoder/model.safetensors")):
        pipeline = tmp_path / f"broken-{number}"
        shutil.copytree(wan, pipeline)
        (pipeline / broken).unlink()
        with pytest.raises(UserError, match=f"{pipeline / broken.split('/')[0]} is not complete"):
            export_pipeline(run, tmp_path / "out", pipeline=str(pipeline))
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model.safetensors"}}
    (pipeline / broken).write_bytes((wan / broken).read_bytes())
    (pipeline / "text_encoder" / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match="text_encoder is not complete"):
        export_pipeline(run, tmp_path / "out", pipeline=str(pipeline))
    assert "out" not in os.listdir(tmp_path)


def test_an_interpolator_that_does_not_fit_is_refused(run: Path, tmp_path: Path) -> None:
    LatentFrameInterpolator(4, (8, 8, 8)).save_pretrained(tmp_path / "four")
    with pytest.raises(UserError, match="for latents of 4 channels, and the student's have 16"):
        export_pipeline(run, tmp_path / "out", interpolator=tmp_path / "four")
    with pytest.raises(UserError, match=r"none holds no interpolator: .*avd train-interpolator"):
        export_pipeline(run, tmp_path / "out", interpolator=tmp_path / "none")
    assert sorted(os.listdir(tmp_path)) == ["four", "run"]


def test_a_pipeline_that_cannot_be_copied_leaves_the_earlier_export(
    wan_run: WanRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = wan_run()
    export_pipeline(run, tmp_path / "out")
    before = contents(tmp_path / "out")

    def fail(source: Path, target: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("shutil.copyfile", fail)
    with pytest.raises(UserError, match=r"out cannot be written: .*No space left"):
        export_pipeline(run, tmp_path / "out", weights="student")
    assert contents(tmp_path / "out") == before
    assert sorted(os.listdir(tmp_path)) == ["out", "run"]


@pytest.mark.parametrize("weights", ["ema", "student"])
def test_adapters_are_merged_into_the_pipeline(
    wan_run: WanRun, make_config: MakeConfig, clips: CaptionedLatents, wan: Path, tmp_path: Path, ranks: Ranks,
    weights: Any,
) -> None:  # fmt: skip
    lora = {"rank": 2, "alpha": 6.0}
    run = wan_run(student_lora=lora, online_lora={"rank": 3})
    export_pipeline(run, tmp_path / "out", weights=weights)
    config = make_config(
        teacher=str(wan), student_lora=lora, online_lora={"rank": 3}, online_updates=1, max_steps=2,
    )  # fmt: skip
    memory = InMemoryData(clips, HashTextEmbedding(4, 16))
    trainer = Trainer(config, load_models(config, ranks), TrainingData(memory, memory), ranks)
    list(trainer.run())
    inputs = model_inputs()
    merged = WanTransformer3DModel.from_pretrained(tmp_path / "out" / "transformer")
    with torch.no_grad():
        if weights == "ema":
            with trainer.ema.average_parameters():
                expected = trainer.student(*inputs)
        else:
            expected = trainer.student(*inputs)
        torch.testing.assert_close(merged(*inputs).sample, expected, rtol=0, atol=1e-5)
        assert (expected - trainer.teacher(*inputs)).abs().max() > 1e-3
