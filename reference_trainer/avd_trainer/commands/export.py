"""``avd export``: a run's student, for diffusers, ``avd sample`` and other programs."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from avd_trainer.commands.options import Run
from avd_trainer.runtime.errors import UserError
from avd_trainer.runtime.terminal import readable_errors, say

if TYPE_CHECKING:
    from avd_trainer.training.pipeline_export import ExportedPipeline


WeightsOption = Annotated[
    Literal["ema", "student"], typer.Option(help="The averaged weights, or those of the last step.")
]


Step = Annotated[int | None, typer.Option(help="Of which step; the newest checkpoint without it.")]


Dtype = Annotated[Literal["float32", "bfloat16", "float16"], typer.Option(help="Type of the exported weights.")]


def export(
    run: Run,
    output: Annotated[
        Path, typer.Option("--output", "-o", help="Folder of the pipeline; an earlier export in it is replaced.")
    ],
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
        Path | None,
        typer.Option(help="The --output folder of a run of method frame_interpolation, for half-rate sampling."),
    ] = None,
    transformer_only: Annotated[
        bool, typer.Option("--transformer-only", help="Only the transformer, or of a LoRA run its adapters.")
    ] = False,
    format_: Annotated[
        Literal["diffusers", "comfyui", "lightx2v", "wan"],
        typer.Option(
            "--format",
            help="For which program: a pipeline of diffusers, or the transformer, of a LoRA run its adapters, for "
            "ComfyUI, LightX2V or Wan2.1's own code (which reads no adapters: they are merged). avd sample reads all.",
        ),
    ] = "diffusers",
    merge: Annotated[
        bool, typer.Option("--merge", help="Of a LoRA run a whole model for --format; a pipeline always is one.")
    ] = False,
    measures: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="What was measured of the student, for its model card: measures.md of avd evaluate, vbench.md of avd "
            "evaluate vbench collect, or any Markdown.",
        ),
    ] = None,
) -> None:
    """Write a run's student, as a pipeline for diffusers or in the files of another program."""
    with readable_errors():
        import torch

        from avd_trainer.training.export import export_student
        from avd_trainer.training.model_card import CARD
        from avd_trainer.training.pipeline_export import export_pipeline
        from avd_trainer.training.program_export import export_for_program

        precision = getattr(torch, dtype)
        measured = None if measures is None else _read_text(measures)
        if format_ != "diffusers":
            if pipeline is not None or interpolator is not None or transformer_only:
                raise UserError(
                    f"--format {format_} is the transformer alone: leave --pipeline, --interpolator and "
                    "--transformer-only out."
                )
            export_for_program(
                run, output, format_, weights=weights, step=step, dtype=precision, merge=merge, measures=measured
            )
            say(f"{output / CARD} says how to use it.")
        elif merge:
            raise UserError("--merge is for --format comfyui or lightx2v: a pipeline is merged without it.")
        elif transformer_only:
            if pipeline is not None or interpolator is not None:
                raise UserError("--transformer-only excludes --pipeline and --interpolator: leave it out, or them.")
            if measures is not None:
                raise UserError("--transformer-only writes no model card for --measures: leave one of them out.")
            export_student(run, output, weights=weights, step=step, dtype=precision)
        else:
            exported = export_pipeline(
                run, output, weights=weights, step=step, dtype=precision, pipeline=pipeline, interpolator=interpolator,
                measures=measured,
            )  # fmt: skip
            _say_missing(exported)
            if exported.grid_error > 2:
                say(
                    f"In diffusers alone timesteps are off the student's by up to {exported.grid_error:.0f} of 1000. "
                    "Exact: pipeline.scheduler = FewStepScheduler.from_config(pipeline.scheduler.config), of "
                    "avd_integrations.diffusers."
                )
        say(f"The student is in {output}.")


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise UserError(f"--measures {path} cannot be read: {error}. Pass a Markdown file in UTF-8.") from error


def _say_missing(exported: ExportedPipeline) -> None:
    if not exported.missing:
        return
    unused = ", ".join(f"{name}=None" for name in exported.missing)
    sampling = "works without" if exported.latent_space == "block-dct-4" else "needs them (pass --pipeline SOURCE)"
    missing = ", ".join(exported.missing)
    say(f"The pipeline has no {missing}: avd sample {sampling}; in diffusers pass {unused} and prompt_embeds.")
