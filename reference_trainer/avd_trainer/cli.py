"""The ``avd`` command."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.console import Console
from rich.table import Table

from avd_trainer.cli_analyze import analyze_app
from avd_trainer.cli_data import data_app
from avd_trainer.cli_sample import sample
from avd_trainer.config import InterpolatorConfig, TeacherConfig, TrainConfig, load_config
from avd_trainer.errors import UserError
from avd_trainer.terminal import readable_errors, say

if TYPE_CHECKING:
    from avd_trainer.export import ExportedPipeline

app = typer.Typer(
    help="Distil video models into few-step students that keep their colours and their motion.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.add_typer(data_app, name="data")
app.add_typer(analyze_app, name="analyze")

Preset = Annotated[str, typer.Argument(help="A preset's name (tiny) or a YAML file.")]
Output = Annotated[Path, typer.Option("--output", "-o", help="Folder for everything that the run writes.")]
Videos = Annotated[Path | None, typer.Option(help="Folder of your own videos, used as the real clips.")]
MaxSteps = Annotated[int | None, typer.Option(help="Number of updates, in place of the preset's.")]
Data = Annotated[Path | None, typer.Option(help="Folder of encoded clips (see avd data), used as the real clips.")]
Prompts = Annotated[
    Path | None, typer.Option(help="Folder of encoded prompts, in place of the captions of the real clips.")
]
Run = Annotated[Path, typer.Argument(help="The --output folder of an avd train run.")]
WeightsOption = Annotated[
    Literal["ema", "student"], typer.Option(help="The averaged weights, or those of the last step.")
]
Step = Annotated[int | None, typer.Option(help="Of which step; the newest checkpoint without it.")]
Dtype = Annotated[Literal["float32", "bfloat16", "float16"], typer.Option(help="Type of the exported weights.")]
Overrides = Annotated[
    list[str] | None,
    typer.Option(
        "--set", metavar="KEY=VALUE", help="Override one value, e.g. objective.regression.weight=0.5. Repeatable."
    ),
]


@app.command()
def train(
    preset: Preset,
    output: Output,
    videos: Videos = None,
    data: Data = None,
    prompts: Prompts = None,
    max_steps: MaxSteps = None,
    set_: Overrides = None,
) -> None:
    """Distil a student, or take up again what the same command began in --output.

    Leaves config.yaml, metrics.jsonl, findings.json, checkpoints and the student's averaged weights. On several GPUs:
    torchrun --nproc-per-node N -m avd_trainer train ...
    """
    with readable_errors():
        config = _train_config(preset, videos, data, prompts, max_steps, set_)
        from avd_trainer.distributed import join_ranks
        from avd_trainer.runs import train as run

        options = config.parallel
        with join_ranks(options.replicate, options.timeout_minutes) as ranks:
            done = run(config, output, ranks)
        if done:
            say(f"The student is in {output / 'student'}.")
        else:
            say(f"Stopped on request, saved in {output / 'checkpoints'}. Run the same command again to go on.")


@app.command()
def export(
    run: Run,
    output: Output,
    weights: WeightsOption = "ema",
    step: Step = None,
    dtype: Dtype = "float32",
    pipeline: Annotated[
        str | None,
        typer.Option(
            metavar="SOURCE",
            help="Wan pipeline in diffusers' layout (folder or hub id) to take VAE and text encoder from. Default: the "
            "run's codec and teacher.",
        ),
    ] = None,
    interpolator: Annotated[
        Path | None, typer.Option(help="The --output folder of avd train-interpolator, for half-rate sampling.")
    ] = None,
    transformer_only: Annotated[
        bool, typer.Option("--transformer-only", help="Only the transformer, or of a LoRA run its adapters.")
    ] = False,
) -> None:
    """Write a run's student as a pipeline for diffusers and avd sample."""
    with readable_errors():
        import torch

        from avd_trainer.export import export_pipeline, export_student

        precision = getattr(torch, dtype)
        if transformer_only:
            if pipeline is not None or interpolator is not None:
                raise UserError("--transformer-only excludes --pipeline and --interpolator: leave it out, or them.")
            export_student(run, output, weights=weights, step=step, dtype=precision)
        else:
            exported = export_pipeline(
                run, output, weights=weights, step=step, dtype=precision, pipeline=pipeline, interpolator=interpolator
            )
            _say_missing(exported)
            if exported.grid_error > 2:
                say(
                    f"In diffusers alone timesteps are off the student's by up to {exported.grid_error:.0f} of 1000. "
                    "Exact: pipeline.scheduler = FewStepScheduler.from_config(pipeline.scheduler.config), of "
                    "avd_integrations.diffusers."
                )
        say(f"The student is in {output}.")


app.command()(sample)


@app.command()
def plan(
    preset: Preset,
    gpus: Annotated[int, typer.Option(min=1, help="Number of GPUs.")] = 1,
    gpu_memory: Annotated[float, typer.Option(min=1, help="Memory of each, in GB.")] = 80.0,
    data: Data = None,
    size: Annotated[
        str | None, typer.Option(metavar="WxHxF", help="Size of a clip, where there is no --data: 832x480x81.")
    ] = None,
    set_: Overrides = None,
) -> None:
    """Say what a run needs on each GPU, part by part, and what to change if it does not fit. Loads no weights."""
    with readable_errors():
        # A preset can be planned before there is data: clips are then of Wan2.1's size.
        replace = {} if data is None else _shards(data)
        config = load_config(TrainConfig, preset, _overrides(set_, None), replace, _shards(Path("none")))
        from avd_trainer.plan import find_architecture, find_latent_shape, find_text_length, render, wan_latent_shape
        from avd_trainer.plan import plan as make_plan

        result = make_plan(
            config,
            find_architecture(config.teacher),
            find_latent_shape(config) if size is None else wan_latent_shape(size),
            gpus=gpus,
            gpu_memory=gpu_memory,
            text_length=find_text_length(config),
        )
        Console().print(render(result))


@app.command()
def calibrate(
    preset: Preset,
    videos: Videos = None,
    data: Data = None,
    prompts: Prompts = None,
    samples: Annotated[int, typer.Option(min=2, help="Teacher samples, and real clips to compare with.")] = 64,
    steps: Annotated[int, typer.Option(min=1, help="Sampling steps of the teacher.")] = 25,
    json_file: Annotated[Path | None, typer.Option("--json", help="Also write the numbers here.")] = None,
    set_: Overrides = None,
) -> None:
    """Measure the temporal loss of teacher samples and real clips, and the motion term's floor that follows."""
    with readable_errors():
        config = _train_config(preset, videos, data, prompts, None, set_)
        from avd_trainer.calibration import calibrate_run, render

        calibration = calibrate_run(config, samples=samples, steps=steps)
        Console().print(render(calibration))
        if json_file is not None:
            json_file.write_text(calibration.model_dump_json(indent=2) + "\n")


@app.command()
def demo(output: Output, videos: Videos = None, max_steps: MaxSteps = None, set_: Overrides = None) -> None:
    """Distil two tiny students, by DMD alone and with AVD, and compare them in pictures and numbers."""
    with readable_errors():
        config = _train_config("tiny", videos, None, None, max_steps, set_)
        from avd_trainer.demo import run_demo
        from avd_trainer.distributed import join_ranks

        with join_ranks() as ranks:
            metrics = run_demo(config, output, ranks)
        table = Table("", "saturation", "temporal loss", "motion", "distance")
        for name, row in metrics.items():
            table.add_row(name, *(f"{value:.4f}" for value in row.model_dump().values()))
        Console().print(table)
        say(f"Pictures: {output / 'report.png'}, {output}/*.gif. Numbers: {output / 'metrics.json'}.")


@app.command()
def train_interpolator(
    preset: Preset,
    output: Output,
    videos: Videos = None,
    data: Data = None,
    max_steps: MaxSteps = None,
    set_: Overrides = None,
) -> None:
    """Train the network that inserts latent frames, or take up again what the same command began in --output.

    Leaves config.yaml, metrics.jsonl, checkpoints, the network in interpolator and evaluation.json: its errors on
    held-out clips beside those of linear interpolation and of repeating frames.
    """
    with readable_errors():
        config = load_config(InterpolatorConfig, preset, _overrides(set_, max_steps), _clips(videos, data))
        from avd_trainer.distributed import join_ranks
        from avd_trainer.interpolator import InterpolatorErrors, render
        from avd_trainer.runs import train_interpolator as run

        with join_ranks(timeout_minutes=config.parallel.timeout_minutes) as ranks:
            done = run(config, output, ranks)
            if done and ranks.first:
                errors = InterpolatorErrors.model_validate_json((output / "evaluation.json").read_text())
                Console().print(render(errors))
        if done:
            say(f"The interpolator is in {output / 'interpolator'}.")
        else:
            say(f"Stopped on request, saved in {output / 'checkpoints'}. Run the same command again to go on.")


@app.command()
def train_teacher(preset: Preset, output: Output, max_steps: MaxSteps = None, set_: Overrides = None) -> None:
    """Train the small teacher that the tiny preset distils, from random weights."""
    with readable_errors():
        config = load_config(TeacherConfig, preset, _overrides(set_, max_steps))
        from avd_trainer.runs import claim_new_folder, train_teacher
        from avd_trainer.teacher import TeacherTrainer

        claim_new_folder(output)
        train_teacher(TeacherTrainer(config), output)
        say(f"The teacher is in {output}.")


def _say_missing(exported: ExportedPipeline) -> None:
    if not exported.missing:
        return
    unused = ", ".join(f"{name}=None" for name in exported.missing)
    sampling = "works without" if exported.latent_space == "block-dct" else "needs them (pass --pipeline SOURCE)"
    missing = ", ".join(exported.missing)
    say(f"The pipeline has no {missing}: avd sample {sampling}; in diffusers pass {unused} and prompt_embeds.")


def _train_config(
    preset: str,
    videos: Path | None,
    data: Path | None,
    prompts: Path | None,
    max_steps: int | None,
    set_: list[str] | None,
) -> TrainConfig:
    overrides = _clips(videos, data)
    if prompts is not None:
        overrides["prompts"] = {"path": str(prompts)}
    return load_config(TrainConfig, preset, _overrides(set_, max_steps), overrides)


def _clips(videos: Path | None, data: Path | None) -> dict[str, Any]:
    if videos is not None and data is not None:
        raise UserError("--videos and --data exclude each other: the real clips are either encoded already or not.")
    if videos is not None:
        return {"data": {"kind": "videos", "path": str(videos)}}
    return {} if data is None else _shards(data)


def _shards(data: Path) -> dict[str, Any]:
    return {"data": {"kind": "shards", "path": str(data)}}


def _overrides(set_: list[str] | None, max_steps: int | None) -> list[str]:
    return [*(set_ or []), *([] if max_steps is None else [f"max_steps={max_steps}"])]
