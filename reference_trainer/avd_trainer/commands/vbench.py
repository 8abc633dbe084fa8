"""``avd evaluate vbench``: a student judged by VBench or VBench-2.0, from their prompts to a table."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from avd_trainer.commands.clip_files import MOST_SEED
from avd_trainer.commands.compare import titles_of
from avd_trainer.commands.options import read_part
from avd_trainer.commands.sampling_options import (
    ComputeDtype,
    Device,
    Fps,
    HalfRate,
    HalfRateSteps,
    Pipeline,
    RatesOfSteps,
    Size,
    asked_rates,
)
from avd_trainer.runtime.errors import UserError
from avd_trainer.runtime.progress import ProgressBar
from avd_trainer.runtime.terminal import readable_errors, say

if TYPE_CHECKING:
    from avd_trainer.evaluation.vbench.checking import Fault
    from avd_trainer.evaluation.vbench.folder import Record
    from avd_trainer.evaluation.vbench.suites import Rules, Suite

vbench_app = typer.Typer(help="Judge students by VBench or VBench-2.0.", no_args_is_help=True)

MOST_FAULTS = 10
"""So many faulty files are named; all are in the report."""

SuitePath = Annotated[
    Path,
    typer.Option(
        "--suite",
        metavar="PATH",
        help="VBench_full_info.json or VBench2_full_info.json, or a folder with one of them: the installed package, "
        "its environment, a checkout.",
    ),
]
Dimensions = Annotated[
    list[str] | None, typer.Option("--dimension", help="Which to judge. Repeatable. Default: all of the suite.")
]
Samples = Annotated[
    int | None,
    typer.Option(min=1, help="Videos of a prompt, in place of the suite's own numbers: for a trial."),
]
Augmented = Annotated[
    tuple[Path, Path] | None,
    typer.Option(
        metavar="ORIGINAL AUGMENTED",
        help="Two lists of prompts, line by line: show the student the second's. Files keep the names of the first's.",
    ),
]
Folder = Annotated[Path, typer.Argument(help="An --output folder of avd evaluate vbench generate.")]


@vbench_app.command()
def prompts(
    suite: SuitePath,
    dimension: Dimensions = None,
    samples: Samples = None,
    frames: Annotated[int, typer.Option(min=1, help="Of the student's clips. Default: Wan2.1's.")] = 81,
    fps: Annotated[float, typer.Option(min=1, help="Frames per second, likewise.")] = 16,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="A file for the list: names, prompts, dimensions. JSON.")
    ] = None,
) -> None:
    """Say which videos a suite wants: how many of which prompts, their names, frames and rate."""
    with readable_errors():
        from avd_trainer.evaluation.vbench.suites import read_suite
        from avd_trainer.runtime.files import write_json

        found = read_suite(suite)
        chosen = dimension or list(found.prompts)
        videos = found.videos(chosen, samples)
        Console().print(_prompts_table(found, chosen, samples), soft_wrap=True)
        kept = found.rules.frames_to_write(frames, fps)
        say(f"{len(videos)} videos in all: one that several dimensions judge is made once. {videos[0].file} is one.")
        say(
            f"{kept} frames at {fps:g} fps, {kept / fps:.2f} s. {_about_length(found.rules, kept, frames, fps)}".strip()
        )
        if output is not None:
            write_json(output, [video._asdict() for video in videos])
            say(f"The list is in {output}.")


@vbench_app.command()
def generate(
    student: Annotated[Path, typer.Argument(help="The --output folder of avd export, or of a finished run.")],
    suite: SuitePath,
    output: Annotated[
        Path,
        typer.Option(
            "--output",
            "-o",
            help="Folder of this student's videos and results; VBench-2.0 takes its name for the student's.",
        ),
    ],
    dimension: Dimensions = None,
    samples: Samples = None,
    augmented: Augmented = None,
    frames: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Write so many of a clip's frames, from the first. Default: all, for VBench as many as are shorter "
            "than 5 s.",
        ),
    ] = None,
    seed: Annotated[
        int, typer.Option(min=0, max=MOST_SEED, help="From which, prompt and number follows the seed of each video.")
    ] = 0,
    shard: Annotated[
        str | None,
        typer.Option(help="I/N: make the I-th of N parts, counted from 0, for an array of jobs. Without it: all."),
    ] = None,
    half_rate: HalfRate = None,
    half_rate_steps: HalfRateSteps = None,
    rates: RatesOfSteps = None,
    size: Size = None,
    fps: Fps = None,
    pipeline: Pipeline = None,
    device: Device = None,
    dtype: ComputeDtype = None,
) -> None:
    """Make a student's videos under the suite's names. The same command again goes on."""
    with readable_errors():
        part = (0, 1) if shard is None else read_part(shard)
        from avd_trainer.evaluation.vbench.folder import Record, check_names, claim, record_videos
        from avd_trainer.evaluation.vbench.generating import (
            Sampling,
            decoded_frames,
            describe,
            generate_videos,
            part_of,
        )
        from avd_trainer.evaluation.vbench.suites import read_augmented, read_suite
        from avd_trainer.inference.choices import choose_device, choose_dtype, choose_shape
        from avd_trainer.inference.students import open_student_or_run
        from avd_trainer.runtime.files import claim_folder

        found = read_suite(suite)
        videos = found.videos(dimension or list(found.prompts), samples)
        shown = None if augmented is None else read_augmented(*augmented)
        recorded = record_videos(videos, shown, seed)
        opened = open_student_or_run(student, pipeline)
        steps = asked_rates(opened, half_rate, half_rate_steps, rates)
        shape = choose_shape(opened, size, steps)
        rate, made = fps or opened.fps, decoded_frames(shape)
        kept = found.rules.frames_to_write(made, rate) if frames is None else frames
        if kept > made:
            raise UserError(f"--frames {kept}: clips of this --size have {made}. Pass at most so many.")
        where = choose_device(device)
        sampling = Sampling(steps, shape, kept, rate, where, choose_dtype(dtype, where))
        settings = describe(opened, sampling, seed=seed, samples=samples, augmented=shown is not None)
        claim_folder(output)
        check_names(output, [video.file for video in videos])
        record = claim(output, Record(found.rules, student.resolve().name, settings, recorded))
        say(f"{kept} of {made} frames at {rate:g} fps. {_about_length(found.rules, kept, made, rate)}".strip())
        mine = part_of(recorded, part)
        wanted = [each for each in mine if not (output / each.video.file).exists()]
        if wanted:
            with ProgressBar("videos", len(mine), start=len(mine) - len(wanted)) as bar:
                generate_videos(opened, output, record, wanted, sampling, bar.advance)
        there = sum((output / each.video.file).exists() for each in record.videos)
        say(f"{len(wanted)} videos were made; {there} of {len(record.videos)} are in {output}.")
        if there == len(record.videos):
            say(f"Check them before they are judged: avd evaluate vbench check {output}")


@vbench_app.command()
def check(folder: Folder) -> None:
    """See that a folder has what the suite will look for; exit status 1 if it has not. All is in check.json.

    Blank and frozen videos are named, and are no reason for status 1.
    """
    with readable_errors():
        from avd_trainer.evaluation.vbench.checking import LOOKED_AT, check_videos
        from avd_trainer.evaluation.vbench.folder import read_record
        from avd_trainer.runtime.files import write_json

        record = read_record(folder)
        with ProgressBar("check", len(record.videos)) as bar:
            faults = check_videos(folder, record, bar.advance)
        write_json(folder / "check.json", [fault._asdict() for fault in faults])
        Console().print(_faults_table(record, faults), soft_wrap=True)
        for fault in faults[:MOST_FAULTS]:
            say(f"{fault.kind}: {fault.file} ({fault.found})")
        if len(faults) > MOST_FAULTS:
            say(f"and {len(faults) - MOST_FAULTS} more, in {folder / 'check.json'}")
        wrong = [fault for fault in faults if fault.kind not in LOOKED_AT]
        if not faults:
            say(f"All {len(record.videos)} videos are as {record.rules.title} wants them.")
        if len(wrong) < len(faults):
            say(
                "Look at what is blank or frozen: if that is what your student does keep it, since made again it is "
                "the same. Otherwise mend the student, and give its videos a new folder."
            )
        if not wrong:
            return
        say("Delete what else is wrong, and repeat the command that generated the videos: it makes what is missing.")
    raise typer.Exit(1)


@vbench_app.command()
def collect(
    folders: Annotated[list[Path], typer.Argument(help="--output folders of avd evaluate vbench generate, judged.")],
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="Folder for the table and all numbers: vbench.md, vbench.json."),
    ] = None,
) -> None:
    """Read what the suites wrote into results in each folder: one table, students side by side, beside the paper's."""
    with readable_errors():
        from avd_trainer.evaluation.vbench.collecting import notes, read_results, table, to_json
        from avd_trainer.evaluation.vbench.folder import RECORD
        from avd_trainer.runtime.files import claim_folder, write_json, write_text

        if len({folder.resolve() for folder in folders}) < len(folders):
            raise UserError("A folder is given twice. Pass each once.")
        if output is not None and (output / RECORD).is_file():
            raise UserError(f"--output {output} is a student's folder. Choose another one for the table.")
        results = {title: read_results(folder) for title, folder in zip(titles_of(folders), folders, strict=True)}
        header, *rows = table(results)
        shown = Table(*(escape(cell) for cell in header))
        for row in rows:
            shown.add_row(*(escape(cell) for cell in row))
        Console().print(shown)
        said = notes(results)
        for note in said:
            say(note)
        if output is not None:
            claim_folder(output)
            lines = [header, ["---", *("--:" for _ in header[1:])], *rows]
            markdown = "\n".join(f"| {' | '.join(line)} |" for line in lines)
            write_text(output / "vbench.md", "\n".join([markdown, "", *(f"- {note}" for note in said), ""]))
            write_json(output / "vbench.json", to_json(results))
            say(f"The table and all numbers are in {output}.")


def _prompts_table(suite: Suite, dimensions: Sequence[str], samples: int | None) -> Table:
    table = Table(title=suite.rules.title)
    for heading in ("dimension", "prompts", "samples", "videos"):
        table.add_column(heading, justify="left" if heading == "dimension" else "right")
    for dimension in dimensions:
        prompts, each = len(suite.prompts[dimension]), samples or suite.rules.samples_of(dimension)
        table.add_row(dimension, str(prompts), str(each), str(prompts * each))
    return table


def _about_length(rules: Rules, kept: int, made: int, fps: float) -> str:
    """What a clip's length means to a suite; nothing where it means nothing."""
    if rules.too_long is None:
        return "Clips of under 2 s are not looked at for Instance_Preservation." if kept < 2 * fps else ""
    if kept / fps >= rules.too_long:
        return (
            f"{rules.title}'s FAQ sends clips of {rules.too_long:g} s and longer to VBench-Long: for {rules.title} "
            "leave --frames out."
        )
    if kept < made:
        return (
            f"All {made} would be {made / fps:.2f} s, and {rules.title}'s FAQ sends clips of {rules.too_long:g} s and "
            f"longer to VBench-Long; --frames {made} writes them all."
        )
    return ""


def _faults_table(record: Record, faults: Sequence[Fault]) -> Table:
    """How many videos of each dimension have which fault."""
    from avd_trainer.evaluation.vbench.checking import count_faults

    table = Table("dimension", "videos", "fault", "how many")
    for dimension, counts in count_faults(record, faults).items():
        name, videos = (dimension, str(len(record.of(dimension)))) if dimension else ("none", "")
        for kind, count in counts.items() or [("none", 0)]:
            table.add_row(name, videos, kind, str(count))
    return table
