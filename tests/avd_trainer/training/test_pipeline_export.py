"""A student as a whole pipeline, in diffusers alone and beside this project."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler, WanPipeline, WanTransformer3DModel
from safetensors import safe_open
from torch import Tensor
from typer.testing import CliRunner

import tiny_pipeline
from avd_core import LatentFrameInterpolator
from avd_integrations.diffusers import FewStepScheduler
from avd_trainer.commands.app import app
from avd_trainer.data.in_memory import CaptionedLatents
from avd_trainer.data.schema import Encoding
from avd_trainer.inference.students import open_student
from avd_trainer.models.condition import Condition
from avd_trainer.models.samplers import few_step_rollout
from avd_trainer.models.text_encoders.hashed import HashTextEmbedding
from avd_trainer.models.text_encoders.umt5 import WanTextEncoder
from avd_trainer.models.transformer import VelocityModel, load_transformer
from avd_trainer.runtime.errors import UserError
from avd_trainer.runtime.ranks import Ranks
from avd_trainer.training.pipeline_export import ExportedPipeline, export_pipeline
from avd_trainer.training.run import train
from avd_trainer.training.trainer import Trainer
from runs import (
    MakeConfig,
    assert_same_tensors,
    both,
    exported,
    files,
    in_memory,
    model_inputs,
    student_velocity,
)

EMBED_WAN = HashTextEmbedding(4, 16)  # of the width that tiny_pipeline's transformer takes


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

    def make(
        method: dict[str, Any] | None = None, encoding: Encoding | None = None, kind: str = "avd", **changes: Any
    ) -> Path:
        values = {
            "teacher": str(wan),
            "data": {"kind": "shards", "path": str(tmp_path / "gone")},
            "max_steps": 2,
            "logging": {"tensorboard": False},
        }
        shorter = {"online_updates": 1} if kind == "avd" else {}
        config = make_config(kind, method={**shorter, **(method or {})}, **values | changes)
        data = both(in_memory(clips, EMBED_WAN))
        train(config, tmp_path / "run", ranks, data=data._replace(encoding=encoding))
        return tmp_path / "run"

    return make


def read_json(path: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(path.read_text())
    return content


def test_a_pipeline_samples_in_diffusers_what_the_trainer_samples(wan_run: WanRun, wan: Path, tmp_path: Path) -> None:
    grid = [1000, 880, 700, 410]
    run = wan_run({"few_steps": grid})
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
        expected = few_step_rollout(student, Condition(text), noise.shape[1:], grid, draw).x_0
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)
    assert expected.std() > 0.1


def test_a_student_that_goes_straight_on_does_so_in_diffusers(wan_run: WanRun, wan: Path, tmp_path: Path) -> None:
    run = wan_run(kind="pcm")
    grid = [1000.0, 900.0, 750.0, 500.0]
    assert export_pipeline(run, tmp_path / "out").grid_error < 0.1
    assert (student := open_student(tmp_path / "out")).timesteps == tuple(grid)
    assert student.sampler == "ode"
    pipeline = DiffusionPipeline.from_pretrained(tmp_path / "out")
    assert type(pipeline.scheduler) is FlowMatchEulerDiscreteScheduler
    noise = torch.randn(1, 16, 3, 4, 6, generator=torch.Generator().manual_seed(3))

    def sampled() -> Tensor:
        latents: Tensor = pipeline(
            "a red circle", height=32, width=48, num_frames=9, num_inference_steps=4, guidance_scale=1.0,
            latents=noise, output_type="latent",
        ).frames  # fmt: skip
        return latents

    near = sampled()
    pipeline.scheduler = FewStepScheduler.from_config(pipeline.scheduler.config)
    exact = sampled()
    (tokens,) = WanTextEncoder.from_pretrained(str(wan), dtype=torch.float32)(["a red circle"])
    text = torch.nn.functional.pad(tokens, (0, 0, 0, 512 - len(tokens))).unsqueeze(0)
    model = VelocityModel(load_transformer(str(run / "student")))
    with torch.no_grad():
        expected = few_step_rollout(model, Condition(text), noise.shape[1:], grid, lambda _: noise, sampler="ode").x_0
    torch.testing.assert_close(exact, expected, rtol=0, atol=1e-4)
    torch.testing.assert_close(near, expected, rtol=0, atol=1e-2)
    assert expected.std() > 0.1


def test_the_files_of_a_pipeline(wan_run: WanRun, wan: Path, tmp_path: Path) -> None:
    run = wan_run(samples={"fps": 8})
    LatentFrameInterpolator(16, (8, 8, 8)).save_pretrained(tmp_path / "trained" / "interpolator")
    export_pipeline(run, tmp_path / "out", interpolator=tmp_path / "trained", dtype=torch.bfloat16)
    found, source = files(tmp_path / "out"), files(wan)
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
        "sampler": "re-noise", "captions": None,
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


def test_a_grid_that_diffusers_cannot_follow_is_said(run: Path, tmp_path: Path) -> None:
    export = ["export", str(run), "--output", str(tmp_path / "out")]
    assert "off the student's" not in CliRunner().invoke(app, export).output
    checkpoint = max((run / "checkpoints").iterdir())
    state = json.loads((checkpoint / "state.json").read_text())
    state["config"]["method"]["few_steps"] = [900, 600, 300]
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
    assert files(tmp_path / "out" / "vae") == files(codec / "vae")
    shutil.copytree(wan / "vae", tmp_path / "mine" / "vae")
    assert export_pipeline(run, tmp_path / "out", pipeline=str(tmp_path / "mine")).missing == missing
    assert files(tmp_path / "out" / "vae").items() <= files(wan / "vae").items()
    assert export_pipeline(run, tmp_path / "out", pipeline=str(wan)).missing == ()
    assert files(tmp_path / "out" / "vae").items() <= files(wan / "vae").items()


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


def test_parts_and_frame_rate_are_those_of_what_encoded_the_data(wan_run: WanRun, wan: Path, tmp_path: Path) -> None:
    run = wan_run(encoding=Encoding("wan", str(wan), 24.0), teacher=str(wan / "transformer"))
    assert export_pipeline(run, tmp_path / "out").missing == ()
    assert files(tmp_path / "out" / "vae").items() <= files(wan / "vae").items()
    assert read_json(tmp_path / "out" / "export.json")["fps"] == 24.0


def test_the_latent_space_is_the_datas_and_not_guessed_by_the_teacher(wan_run: WanRun, tmp_path: Path) -> None:
    run = wan_run(encoding=Encoding("block-dct-4"))
    assert export_pipeline(run, tmp_path / "out").latent_space == "block-dct-4"


def test_a_tiny_run_needs_no_parts(run: Path, wan: Path, tmp_path: Path) -> None:
    assert export_pipeline(run, tmp_path / "out") == ExportedPipeline(
        "block-dct-4", ("vae", "text_encoder", "tokenizer"), pytest.approx(1.1, abs=0.01)
    )
    assert_same_tensors(exported(tmp_path / "out" / "transformer"), exported(run / "student"))
    about = read_json(tmp_path / "out" / "export.json")
    assert (about["latent_space"], about["clip"]) == ("block-dct-4", [16, 3, 4, 4])
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
    with pytest.raises(UserError, match=r"none holds no interpolator: .*run of method frame_interpolation"):
        export_pipeline(run, tmp_path / "out", interpolator=tmp_path / "none")
    assert sorted(os.listdir(tmp_path)) == ["four", "run"]


def test_a_pipeline_that_cannot_be_copied_leaves_the_earlier_export(
    wan_run: WanRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = wan_run()
    export_pipeline(run, tmp_path / "out")
    before = files(tmp_path / "out")

    def fail(source: Path, target: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("shutil.copyfile", fail)
    with pytest.raises(UserError, match=r"out cannot be written: .*No space left"):
        export_pipeline(run, tmp_path / "out", weights="student")
    assert files(tmp_path / "out") == before
    assert sorted(os.listdir(tmp_path)) == ["out", "run"]


@pytest.mark.parametrize("weights", ["ema", "student"])
def test_adapters_are_merged_into_the_pipeline(
    wan_run: WanRun, make_config: MakeConfig, clips: CaptionedLatents, wan: Path, tmp_path: Path, ranks: Ranks,
    weights: Any,
) -> None:  # fmt: skip
    method = {"student": {"lora": {"rank": 2, "alpha": 6.0}}, "online": {"lora": {"rank": 3}}, "online_updates": 1}
    export_pipeline(wan_run(method), tmp_path / "out", weights=weights)
    config = make_config(method=method, teacher=str(wan), max_steps=2)
    trainer = Trainer(config, both(in_memory(clips, EMBED_WAN)), ranks)
    list(trainer.run())
    inputs = model_inputs(16)
    expected = student_velocity(trainer, weights, inputs)
    merged = WanTransformer3DModel.from_pretrained(tmp_path / "out" / "transformer")
    with torch.no_grad():
        torch.testing.assert_close(VelocityModel(merged)(*inputs), expected, rtol=0, atol=1e-5)
        assert (expected - trainer.models["teacher"](*inputs)).abs().max() > 1e-3
