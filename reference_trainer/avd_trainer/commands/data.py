"""``avd data``: make training data, and look at it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from avd_trainer.commands.options import read_part
from avd_trainer.data.preparation.needs import HUB_ID
from avd_trainer.models.pipeline_parts import TINY
from avd_trainer.runtime.errors import UserError
from avd_trainer.runtime.progress import ProgressBar
from avd_trainer.runtime.terminal import readable_errors, say

if TYPE_CHECKING:
    from avd_trainer.data.inspection import DataReport, Provenance
    from avd_trainer.data.preparation.prepare import Prepared, Workers
    from avd_trainer.data.preparation.recipe import Recipe
    from avd_trainer.data.schema import ImageTokens

data_app = typer.Typer(help="Make training data, and look at it.", no_args_is_help=True)

MOST_ROWS = 10
"""So many rows that are there twice are named."""

Output = Annotated[Path, typer.Option("--output", "-o", help="Folder of the new data set.")]
Model = Annotated[
    str,
    typer.Option(
        help="The model that the data is for: a Wan pipeline in diffusers' layout (folder or hub id), or tiny for the "
        "codec and text embedding of the tiny preset."
    ),
]
RecipeValues = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="STAGE.KEY=VALUE",
        help="Override one value of the recipe, e.g. aesthetics.keep=0.4; STAGE=off leaves a stage out. Repeatable.",
    ),
]
NegativePrompt = Annotated[
    str | None,
    typer.Option(
        help="Prompt of classifier-free guidance's unconditional prediction. Default: the one that Wan2.1 comes with; "
        "for tiny, nothing."
    ),
]

Processes = Annotated[
    int | None,
    typer.Option(
        "--workers",
        min=1,
        help="Processes. Default: one for each core of this machine or of the Ray cluster; a single one if models run "
        "without a GPU, since each process loads them. On GPUs, models run in one for each.",
    ),
]
EngineName = Annotated[
    Literal["local", "ray"],
    typer.Option("--engine", help="Where processes run: on this machine, or on those of a Ray cluster (\\[ray])."),
]


@data_app.command()
def inspect(
    path: Annotated[Path, typer.Argument(help="Folder of a data set.")],
    latents: Annotated[int, typer.Option(min=1, help="How many latents to read for the statistics.")] = 256,
    clip: Annotated[
        str | None,
        typer.Option(help="A video's path, or a clip's id from the report: say where its rows come from, alone."),
    ] = None,
) -> None:
    """Print schema, codec, counts, latent statistics and the temporal loss of a data set, and what looks wrong."""
    with readable_errors():
        from avd_trainer.data.inspection import find_rows, inspect

        if clip is not None:
            from avd_trainer.data.preparation.left_out import why_left_out

            for row in find_rows(path, clip):
                _print_table(_row_lines(row))
            for other in why_left_out(path, clip):
                say(other)
            return
        _print_report(inspect(path, latents))


@data_app.command()
def report(
    prepared: Annotated[Path, typer.Argument(help="The --output folder of avd data prepare.")],
    set_: RecipeValues = None,
) -> None:
    """Show what was kept of prepared videos and why: report.html with pictures, report.json with all numbers."""
    with readable_errors():
        from avd_trainer.data.preparation.report import write_report

        found, page = write_report(prepared, set_ or [])
        say(f"{found.kept} of {found.clips} clips in {found.files} files are kept. Look at why in {page}")


@data_app.command()
def import_lmdb(
    path: Annotated[Path, typer.Argument(help="An LMDB of CausVid, Self-Forcing or the released AVD code.")],
    output: Output,
    model: Model,
    negative_prompt: NegativePrompt = None,
    width: Annotated[
        int | None, typer.Option(min=1, help="Latent columns to keep, from the left; the released AVD code keeps 104.")
    ] = None,
) -> None:
    """Turn the LMDB of captioned latents of another code base into a data set."""
    with readable_errors():
        from avd_trainer.data.encoders import load_text_encoder, negative_prompt_for
        from avd_trainer.data.lmdb_import import count_rows, import_lmdb

        rows = count_rows(path)
        _check(model, output)
        text = load_text_encoder(model)
        with ProgressBar("rows", rows) as bar:
            written = import_lmdb(
                path,
                output,
                text=text,
                negative_prompt=negative_prompt_for(model, negative_prompt),
                width=width,
                on_row=bar.advance,
            )
        _say_written(written, "clips", output)


@data_app.command()
def encode(
    videos: Annotated[Path, typer.Option(help="Folder of videos, searched recursively.")],
    output: Output,
    model: Model,
    frames: Annotated[
        int | None,
        typer.Option(help="Frames per clip, 1 + 4 n. Default: Wan2.1's 81; for tiny 17."),
    ] = None,
    height: Annotated[
        int | None,
        typer.Option(help="Height in pixels, a multiple of 16. Default: 480; for tiny 32, a multiple of 8."),
    ] = None,
    width: Annotated[
        int | None,
        typer.Option(help="Width in pixels, a multiple of 16. Default: 832; for tiny 32, a multiple of 8."),
    ] = None,
    fps: Annotated[float | None, typer.Option(help="Frames per second of the clips. Default: Wan2.1's 16.")] = None,
    negative_prompt: NegativePrompt = None,
    image_condition: Annotated[
        bool,
        typer.Option(
            "--image-condition",
            help="Also encode each clip's first frame, for image to video: with the VAE, and with the image encoder "
            "where --model has one.",
        ),
    ] = False,
    max_repeats: Annotated[
        float,
        typer.Option(help="Leave out clips that show each picture more often, in a row: a video of few per second."),
    ] = 4.0,
    max_enlargement: Annotated[
        float,
        typer.Option(help="Leave out clips whose pictures are enlarged more, here or before: they are blurred."),
    ] = 4.0,
    workers: Processes = None,
    engine: EngineName = "local",
) -> None:
    """Cut your own videos into clips and encode them with their captions. The same command again goes on."""
    with readable_errors():
        from avd_trainer.data.encode import FORMATS, ClipFormat
        from avd_trainer.data.preparation.encoding import ADVICE, encode_recipe, encode_videos
        from avd_trainer.data.preparation.summary import LEFT_OUT

        default = FORMATS["block-dct-4" if model == TINY else "wan"]
        recipe = encode_recipe(
            model,
            ClipFormat(
                frames=default.frames if frames is None else frames,
                height=default.height if height is None else height,
                width=default.width if width is None else width,
                fps=default.fps if fps is None else fps,
            ),
            negative_prompt=negative_prompt,
            image=image_condition,
            max_repeats=max_repeats,
            max_enlargement=max_enlargement,
        )
        _check_model(model)
        done = encode_videos(videos, output, recipe, _workers(engine, workers, recipe))
        for line in done.summary.lines(ADVICE):
            say(line)
        if done.summary.without_clips or done.summary.dropped:
            say(f"All that was left out, and why, is in {output / LEFT_OUT}.")
        _say_written(done.summary.kept, "clips", output)


@data_app.command()
def merge(
    folders: Annotated[list[Path], typer.Argument(help="Folders of data sets, two or more.")],
    output: Output,
) -> None:
    """Join data sets into one. A clip that is in several of them is kept once; shards are linked rather than copied."""
    with readable_errors():
        from avd_trainer.data.merging import merge

        with ProgressBar("data sets", len(folders)) as bar:
            done = merge(folders, output, bar.advance)
        if done.twice:
            say(f"{len(done.twice)} rows are there more than once, and were kept once:")
            for row in done.twice[:MOST_ROWS]:
                say(f"  {row}")
            if len(done.twice) > MOST_ROWS:
                say(f"  and {len(done.twice) - MOST_ROWS} more")
        say(f"{done.linked} shards were linked, {done.copied} copied.")
        _say_written(done.rows, "rows", output)


@data_app.command()
def encode_prompts(
    file: Annotated[Path, typer.Argument(help="A text file in UTF-8, one prompt a line.")],
    output: Output,
    model: Model,
    negative_prompt: NegativePrompt = None,
) -> None:
    """Embed prompts for the matching term, which needs no clips."""
    with readable_errors():
        from avd_trainer.data.encode import encode_prompts, read_prompts
        from avd_trainer.data.encoders import load_text_encoder, negative_prompt_for

        prompts = len(read_prompts(file))
        _check(model, output)
        text = load_text_encoder(model)
        negative = negative_prompt_for(model, negative_prompt)
        with ProgressBar("prompts", prompts) as bar:
            written = encode_prompts(file, output, text, negative, bar.advance)
        _say_written(written, "prompts", output)


@data_app.command()
def prepare(
    videos: Annotated[Path, typer.Option(help="Folder of raw videos, searched recursively.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for everything that is made.")],
    recipe: Annotated[str, typer.Option(help="paper, tiny, or a YAML file: which stages, and what is kept.")] = "paper",
    sample: Annotated[
        str | None, typer.Option(help="Work on a share of the files, such as 1%, and say what all would take.")
    ] = None,
    workers: Processes = None,
    engine: EngineName = "local",
    shard: Annotated[
        str | None,
        typer.Option(help="I/N: score the I-th of N parts, counted from 0, for an array of jobs. Without it: all."),
    ] = None,
    retry: Annotated[
        bool, typer.Option("--retry", help="Try again what failed for good, such as files that crashed the decoder.")
    ] = False,
    set_: RecipeValues = None,
) -> None:
    """From raw videos to a training set: cut, score, choose, caption, encode. The same command again goes on."""
    with readable_errors():
        from avd_trainer.data.preparation.prepare import prepare
        from avd_trainer.data.preparation.recipe import load_recipe

        if sample is not None and shard is not None:
            raise UserError("--sample and --shard exclude each other: take a sample of all files, or score a part.")
        chosen = load_recipe(recipe, set_ or [])
        done = prepare(
            videos,
            output,
            chosen,
            _workers(engine, workers, chosen),
            sample=None if sample is None else _share(sample),
            part=None if shard is None else read_part(shard),
            retry=retry,
        )
        _say_prepared(done)
        if shard is not None:
            say(f"Part {shard} is scored. When all parts are, the same command without --shard joins them and goes on.")


@data_app.command()
def select(
    prepared: Annotated[Path, typer.Argument(help="The --output folder of avd data prepare.")],
    output: Output,
    workers: Processes = None,
    engine: EngineName = "local",
    set_: RecipeValues = None,
) -> None:
    """Decide again, such as with --set aesthetics.keep=0.4, without decoding again what was scored."""
    with readable_errors():
        from avd_trainer.data.preparation.prepare import RECIPE, Workers, select_again
        from avd_trainer.data.preparation.recipe import load_recipe

        known = (prepared / RECIPE).is_file()  # if it is not, what follows says so
        who = _workers(engine, workers, load_recipe(prepared / RECIPE)) if known else Workers(1)
        _say_prepared(select_again(prepared, output, set_ or [], who))


def _workers(engine: Literal["local", "ray"], processes: int | None, recipe: Recipe) -> Workers:
    """As many as there are cores and GPUs, where the engine runs them."""
    from avd_trainer.data.preparation.local_engine import cores
    from avd_trainer.data.preparation.prepare import Workers, count_gpus, default_processes

    if engine == "local":
        gpus = count_gpus(recipe)
        return Workers(processes or default_processes(recipe, gpus, cores()), gpus)
    from avd_trainer.data.preparation.ray_engine import RayEngine, connect

    machines = connect()
    by_default = default_processes(recipe, machines.gpus, machines.cores)
    return Workers(processes or by_default, machines.gpus, engine=RayEngine)


def _share(text: str) -> float:
    number, percent = text.removesuffix("%"), text.endswith("%")
    try:
        share = float(number) / (100 if percent else 1)
    except ValueError:
        share = 0.0
    if not 0 < share <= 1:
        raise UserError(f"--sample {text}: expected a share of the files, such as 1% or 0.01.")
    return share


def _say_prepared(done: Prepared) -> None:
    from avd_trainer.data.preparation.prepare import ADVICE

    for line in done.summary.lines(ADVICE):
        say(line)
    for step in done.selection.steps:
        if step.left < step.came:
            say(f"{step.stage}: {step.left} of {step.came} clips are left")
    if done.forecast is not None:
        files, size, hours, gigabytes = done.forecast
        say(
            f"The sample is {files[0]} of {files[1]} files, {size[0] / 1e9:.3g} of {size[1] / 1e9:.3g} GB. All of them "
            f"would take about {hours:.2g} hours on one worker, and {gigabytes:.2g} GB for latents, twice with shards."
        )
    for folder, rows in done.data.items():
        there = "are in" if not done.unchanged else "were already in"
        say(f"{rows} clips {there} {folder}. Look at them with: avd data inspect {folder}")


def _check(model: str, output: Path) -> None:
    """What a person can get wrong and would learn of only after the models are loaded."""
    from avd_trainer.data.shard_writing import expect_no_shards

    _check_model(model)
    expect_no_shards(output)


def _check_model(model: str) -> None:
    if model != TINY and not Path(model).is_dir() and not HUB_ID.fullmatch(model):
        raise UserError(
            f"--model {model} is no folder and no hub id. Pass tiny, or a Wan pipeline in diffusers' layout such as "
            "Wan-AI/Wan2.1-T2V-1.3B-Diffusers."
        )


def _say_written(rows: int, what: str, output: Path) -> None:
    say(f"{rows} {what} are in {output}. Look at them with: avd data inspect {output}")


def _print_report(report: DataReport) -> None:
    _print_table(_lines(report))
    for caption in report.captions:
        say(f"caption: {caption}")
    for warning in report.warnings:
        say(f"warning: {warning}")


def _print_table(lines: list[tuple[str, str]]) -> None:
    width = max(len(name) for name, _ in lines)
    for name, value in lines:
        say(f"{name:<{width}}  {value}")  # whole: a table would shorten a SHA-256 to the width of the terminal


def _row_lines(row: dict[str, Any]) -> list[tuple[str, str]]:
    """Where a row comes from."""
    from avd_trainer.data.inspection import NO_LICENCE, describe_stage

    start, end = (milliseconds / 1000 for milliseconds in row["span"])
    lines = [
        ("clip", row["id"]),
        ("file", row["file"]),
        ("SHA-256", row["sha256"]),
        ("span", f"{start:g} to {end:g} s: {row['clip']['frames']} frames at {row['clip']['fps']:g} per second"),
        ("licence", row["licence"] or NO_LICENCE),
        ("prepared by", f"avd-core {row['avd_core']}"),
        ("caption", row["caption"]),
    ]
    for name, stage in row["stages"].items():
        score = f"; score {json.dumps(stage['score'])}" if "score" in stage else ""
        lines.append((f"stage {name}", describe_stage(stage) + score))
    return lines


def _lines(report: DataReport) -> list[tuple[str, str]]:
    lines = [
        ("examples", f"{report.rows} in {report.files} file(s), {report.bytes / 2**20:.1f} MiB"),
        ("sources", f"{report.sources}"),
        (
            "text",
            f"at most {report.text_length} tokens x {report.text_dim}, {' and '.join(report.text_dtypes)}; in use "
            f"{report.tokens_min} to {report.tokens_max}, {report.tokens_mean:.1f} on average",
        ),
        (
            "unconditional",
            "missing" if report.unconditional_prompt is None else f"of the prompt {report.unconditional_prompt!r}",
        ),
    ]
    if report.provenance is not None:
        lines += _provenance_lines(report.provenance)
    if report.latent_shape is None:
        return [*lines, ("latents", "none: prompts only")]
    lines += [
        ("latents", f"{list(report.latent_shape)} (C, F, H, W), {' and '.join(report.latent_dtypes)}"),
        ("first frames", _describe_image(report.image)),
        ("codec", "not recorded" if report.encoding is None else str(report.encoding)),
        (
            "statistics of",
            f"{report.measured} latents: {report.not_finite} not finite, {report.standing_still} standing still",
        ),
    ]
    if report.latent_mean is not None and report.channel_means is not None and report.channel_stds is not None:
        lines += [
            ("mean", f"{report.latent_mean:.3f}"),
            ("standard deviation", f"{report.latent_std:.3f}"),
            ("means of channels", " ".join(f"{value:.2f}" for value in report.channel_means)),
            ("std of channels", " ".join(f"{value:.2f}" for value in report.channel_stds)),
        ]
    if report.temporal_loss is not None:
        lines.append(("temporal loss", f"{report.temporal_loss:.3f} nats, -log E[Var_t]; less is more motion"))
    return lines


def _describe_image(image: ImageTokens | None) -> str:
    if image is None:
        return "not encoded: for text to video"
    return "latents" + (f" and embeddings of {image.tokens} tokens x {image.dim}" if image.tokens else "")


def _provenance_lines(provenance: Provenance) -> list[tuple[str, str]]:
    licences = ", ".join(f"{licence} ({rows})" for licence, rows in provenance.licences.items())
    lines = [
        ("prepared from", f"{provenance.files} file(s), by avd-core {' and '.join(provenance.versions)}"),
        ("licences", licences),
    ]
    lines += [(f"stage {name}", what) for name, what in provenance.stages.items()]
    return lines if provenance.alike else [*lines, ("stages", "those of the first row; others differ")]
