"""``avd data``: make training data, and look at it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from avd_trainer.runtime.progress import ProgressBar
from avd_trainer.runtime.terminal import readable_errors, say

if TYPE_CHECKING:
    from avd_trainer.data.encode import TextEncoder, VideoEncoder
    from avd_trainer.data.inspection import DataReport

data_app = typer.Typer(help="Make training data, and look at it.", no_args_is_help=True)

TINY = "tiny"

Output = Annotated[Path, typer.Option("--output", "-o", help="Folder of the new data set.")]
Model = Annotated[
    str,
    typer.Option(
        help="The model that the data is for: a Wan pipeline in diffusers' layout (folder or hub id), or tiny for the "
        "codec and text embedding of the tiny preset."
    ),
]
NegativePrompt = Annotated[
    str | None,
    typer.Option(
        help="Prompt of classifier-free guidance's unconditional prediction. Default: the one that Wan2.1 comes with; "
        "for tiny, nothing."
    ),
]


@data_app.command()
def inspect(
    path: Annotated[Path, typer.Argument(help="Folder of a data set.")],
    samples: Annotated[int, typer.Option(min=1, help="Latents to read for the statistics.")] = 256,
) -> None:
    """Print schema, counts, latent statistics and the temporal loss of a data set, and what looks wrong."""
    with readable_errors():
        from avd_trainer.data.inspection import inspect

        _print_report(inspect(path, samples))


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
        from avd_trainer.data.lmdb_import import count_rows, import_lmdb

        rows = count_rows(path)
        text = _text_encoder(model)
        with ProgressBar("rows", rows) as bar:
            written = import_lmdb(
                path,
                output,
                text=text,
                negative_prompt=_negative_prompt(negative_prompt, model),
                width=width,
                on_row=bar.advance,
            )
        _say_written(written, "clips", output)


@data_app.command()
def encode(
    videos: Annotated[Path, typer.Option(help="Folder of videos, searched recursively.")],
    output: Output,
    model: Model,
    frames: Annotated[int, typer.Option(help="Frames per clip, 1 + 4 n.")] = 81,
    height: Annotated[int, typer.Option(help="Height in pixels, a multiple of 16.")] = 480,
    width: Annotated[int, typer.Option(help="Width in pixels, a multiple of 16.")] = 832,
    fps: Annotated[float, typer.Option(help="Frames per second of the clips; Wan2.1's are 16.")] = 16.0,
    negative_prompt: NegativePrompt = None,
) -> None:
    """Cut your own videos into clips and encode them with their captions."""
    with readable_errors():
        from avd_trainer.data.encode import encode_videos
        from avd_trainer.data.videos import video_files

        files = len(video_files(videos))
        codec, text = _video_encoder(model), _text_encoder(model)
        with ProgressBar("videos", files) as bar:
            written = encode_videos(
                videos,
                output,
                codec,
                text,
                frames=frames,
                height=height,
                width=width,
                fps=fps,
                negative_prompt=_negative_prompt(negative_prompt, model),
                on_file=bar.advance,
            )
        _say_written(written, "clips", output)


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

        prompts = len(read_prompts(file))
        text = _text_encoder(model)
        with ProgressBar("prompts", prompts) as bar:
            written = encode_prompts(file, output, text, _negative_prompt(negative_prompt, model), bar.advance)
        _say_written(written, "prompts", output)


def _text_encoder(model: str) -> TextEncoder:
    import torch

    if model == TINY:
        from avd_trainer.config.sections import ArchitectureConfig
        from avd_trainer.data.encode import HashTextEncoder
        from avd_trainer.models.text_encoders.hashed import TEXT_LENGTH

        return HashTextEncoder(TEXT_LENGTH, ArchitectureConfig().text_dim)
    from avd_trainer.models.text_encoders.umt5 import WanTextEncoder

    return WanTextEncoder.from_pretrained(model, _device(), torch.bfloat16)


def _video_encoder(model: str) -> VideoEncoder:
    import torch

    if model == TINY:
        from avd_trainer.models.codecs.block_dct import BlockDCTCodec

        return BlockDCTCodec()
    from avd_trainer.models.codecs.wan import WanCodec

    # float32 as in Wan2.1's own code: encoding is done once, and its rounding would be learnt.
    return WanCodec.from_pretrained(model, _device(), torch.float32)


def _device() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def _negative_prompt(given: str | None, model: str) -> str:
    from avd_trainer.data.encode import WAN_NEGATIVE_PROMPT

    if given is not None:
        return given
    # The tiny teacher was trained with empty captions for guidance.
    return "" if model == TINY else WAN_NEGATIVE_PROMPT


def _say_written(rows: int, what: str, output: Path) -> None:
    say(f"{rows} {what} are in {output}. Look at them with: avd data inspect {output}")


def _print_report(report: DataReport) -> None:
    table = Table(show_header=False, box=None, pad_edge=False)
    for name, value in _lines(report):
        table.add_row(name, escape(value))
    Console().print(table, soft_wrap=True, highlight=False)
    for caption in report.captions:
        say(f"caption: {caption}")
    for warning in report.warnings:
        say(f"warning: {warning}")


def _lines(report: DataReport) -> list[tuple[str, str]]:
    lines = [
        ("samples", f"{report.rows} in {report.files} file(s), {report.bytes / 2**20:.1f} MiB"),
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
    if report.latent_shape is None:
        return [*lines, ("latents", "none: prompts only")]
    lines += [
        ("latents", f"{list(report.latent_shape)} (C, F, H, W), {' and '.join(report.latent_dtypes)}"),
        (
            "statistics of",
            f"{report.sampled} latents: {report.not_finite} not finite, {report.standing_still} standing still",
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
