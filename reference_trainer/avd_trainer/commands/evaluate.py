"""``avd evaluate``: students on captions of moving shapes, or any students and folders of videos by their pixels."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import typer
from rich.console import Console

from avd_trainer.commands.clip_files import (
    PROMPTS,
    SAMPLING,
    clip_files,
    clip_rows,
    expect_finished,
    read_asked_prompts,
)
from avd_trainer.commands.compare import are_videos, titles_of
from avd_trainer.commands.sampling_options import (
    ComputeDtype,
    Device,
    Image,
    Pipeline,
    Prompts,
    PromptsFile,
    Seed,
    refuse_for_videos,
)
from avd_trainer.runtime.errors import UserError
from avd_trainer.runtime.progress import ProgressBar
from avd_trainer.runtime.terminal import readable_errors, say

if TYPE_CHECKING:
    import torch

    from avd_trainer.data.video_sets import VideoFile
    from avd_trainer.inference.students import Shape, Student

CLIPS = "clips"
"""In the output, a folder of clips for each student that was sampled."""
CAPTIONS, NOISES = 64, 2
"""Captions of moving shapes, and clips of each caption or prompt, where nobody asked for another number."""


def evaluate(
    students: Annotated[
        list[Path],
        typer.Argument(help="One or more: --output folders of avd export, finished runs, folders of videos."),
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for table, figure and values.")],
    prompt: Prompts = None,
    prompts_file: PromptsFile = None,
    reference: Annotated[
        Path | None,
        typer.Option(metavar="FOLDER", help="Real videos, to compare with and to spoil for controls."),
    ] = None,
    image: Image = None,
    captions: Annotated[
        int | None,
        typer.Option(
            min=2, help=f"Without prompts and videos: of moving shapes, how many ({CAPTIONS} without this option)."
        ),
    ] = None,
    noises: Annotated[
        int | None, typer.Option(min=1, help=f"Clips of each caption or prompt ({NOISES} without this option).")
    ] = None,
    seed: Seed = 0,
    size: Annotated[
        str | None,
        typer.Option(metavar="WxHxF", help="Of clips of prompts, 832x480x81. Default: what each was trained on."),
    ] = None,
    fps: Annotated[
        float | None,
        typer.Option(
            min=1, help="Frames per second of folders of numbered pictures, which are clips with this option."
        ),
    ] = None,
    pipeline: Pipeline = None,
    device: Device = None,
    dtype: ComputeDtype = None,
) -> None:
    """Measure students and folders of videos, beside real and spoiled clips.

    Students of the tiny preset on captions of moving shapes that none was trained on; with prompts any students, and
    videos, by their pixels alone. Leaves measures.md, measures.png and measures.json.
    """
    with readable_errors():
        _check_folders(students, output)
        named = dict(zip(titles_of(students), students, strict=True))
        videos = {title: folder for title, folder in named.items() if are_videos(folder)}
        asked = prompt is not None or prompts_file is not None
        if not (videos or asked or reference):
            if image is not None or size is not None or dtype is not None:
                raise UserError(
                    "--dtype, --image and --size are for clips of prompts: pass --prompt, or leave them out."
                )
            _expect_pictures(fps, [])
            _evaluate_captions(named, output, captions or CAPTIONS, noises or NOISES, seed, pipeline, device)
            return
        if captions is not None:
            raise UserError("--captions are of moving shapes: leave it out, or leave out prompts and videos.")
        if asked and len(videos) == len(named):
            raise UserError("Prompts are for students, and there are only videos here: leave the prompts out.")
        if len(videos) == len(named):
            refuse_for_videos({
                "--noises": noises, "--image": image, "--seed": seed, "--size": size, "--pipeline": pipeline,
                "--device": device, "--dtype": dtype,
            })  # fmt: skip
        from avd_trainer.data.video_sets import common_form, look_into
        from avd_trainer.inference.choices import choose_device, choose_dtype
        from avd_trainer.inference.students import open_students
        from avd_trainer.studies.videos import expect_measurable

        # All that a person can get wrong comes before the models.
        for folder in (*videos.values(), *([] if reference is None else [reference])):
            expect_finished(folder)
        sets = {title: look_into(folder, fps) for title, folder in videos.items()}
        real = None if reference is None else look_into(reference, fps)
        _expect_pictures(fps, [file.path for files in (*sets.values(), real or ()) for file in files])
        plans = {}
        if len(videos) < len(named):
            prompts = [each for each in read_asked_prompts(prompt, prompts_file) for _ in range(noises or NOISES)]
            titles = [title for title in named if title not in videos]
            opened = open_students([named[title] for title in titles], pipeline)
            plans = {
                title: _plan(student, output / CLIPS / title.replace("/", "_"), prompts, image, seed, size)
                for title, student in zip(titles, opened, strict=True)
            }
        # Of students it is their clips that are measured: those are a folder of videos, too.
        folders = [*videos.values(), *(plan.folder for plan in plans.values())]
        request = {
            "sets": _seen_from(output, folders),
            "reference": _seen_from(output, [] if reference is None else [reference]),
            "fps": fps,
        }
        _expect_same(output, request)
        where = choose_device(device)
        kind = choose_dtype(dtype, where)
        planned = [file for plan in plans.values() for file in plan.files]
        expect_measurable(
            common_form([*(file for files in sets.values() for file in files), *planned, *(real or ())]), real
        )
        if plans:
            sets |= _sample(plans, image, where, kind)
        _evaluate_videos({title: sets[title] for title in named}, real, request, output)


def _evaluate_captions(
    named: Mapping[str, Path],
    output: Path,
    captions: int,
    noises: int,
    seed: int,
    pipeline: str | None,
    device: str | None,
) -> None:
    from avd_trainer.evaluation.measure_table import rich_table
    from avd_trainer.inference.choices import choose_device
    from avd_trainer.inference.students import open_students
    from avd_trainer.runtime.files import claim_folder
    from avd_trainer.studies.definition import StudyEvaluationConfig
    from avd_trainer.studies.students import captions_of, evaluate_students, save_evaluation

    folders = list(named.values())
    counts = {"captions": captions, "noises": noises, "seed": seed}
    request = {"sets": _seen_from(output, folders), **counts}
    _expect_same(output, request)
    opened = dict(zip(named, open_students(folders, pipeline), strict=True))
    said, where = captions_of(opened), choose_device(device)
    claim_folder(output)
    options = StudyEvaluationConfig(captions=captions, noises=noises)
    evaluated = evaluate_students(opened, options, captions=said, seed=seed, device=where)
    save_evaluation(evaluated, request, output)
    Console().print(rich_table(evaluated.rows, evaluated.reference))
    say(f"Table, figure and values are in {output}.")


def _evaluate_videos(
    sets: Mapping[str, Sequence[VideoFile]],
    real: Sequence[VideoFile] | None,
    request: Mapping[str, Any],
    output: Path,
) -> None:
    from avd_trainer.data.video_sets import changes_to, common_form
    from avd_trainer.runtime.files import claim_folder
    from avd_trainer.studies.videos import judge_videos, save_judged, show

    form = common_form(file for files in (*sets.values(), real or ()) for file in files)
    say(f"All clips are measured as {form}.")
    for title, files in (*sets.items(), ("--reference", real or ())):
        for change in changes_to(form, files):
            say(f"{title}: {change}.")
    claim_folder(output)
    judged = judge_videos(sets, real, form)
    save_judged(judged, request, output)
    Console().print(show(judged))
    say(f"Table, figure and values are in {output}.")


class _Plan(NamedTuple):
    """The clips that a student is to make.

    Attributes:
        student: The student.
        shape: ``(C, F, H, W)`` of their latents.
        folder: Where they are written.
        files: In the form that they will have.
        rows: Of each its file, prompt and seed.
    """

    student: Student
    shape: Shape
    folder: Path
    files: Sequence[VideoFile]
    rows: Sequence[Mapping[str, Any]]


def _plan(
    student: Student, folder: Path, prompts: Sequence[str], image: Path | None, seed: int, size: str | None
) -> _Plan:
    """Look at everything that a student's clips need, without loading it.

    Raises:
        UserError: If the student cannot make such clips, or ``folder`` has some that were not left by a stopped run.
    """
    from avd_trainer.data.video_sets import Form, VideoFile
    from avd_trainer.inference.choices import choose_shape
    from avd_trainer.inference.generation import fitting_picture
    from avd_trainer.models.codecs.latent_space import SPATIAL_STRIDES, TEMPORAL_STRIDE
    from avd_trainer.studies.students import RESULTS

    shape = choose_shape(student, size, (1,))
    fitting_picture(student, image, shape)
    measured = (folder / PROMPTS).is_file() and (folder.parents[1] / RESULTS).is_file()
    if measured or (folder.exists() and not (folder / SAMPLING).is_file()):
        raise UserError(
            f"{folder} has clips of an earlier evaluation. Measure them by passing that folder in place of the "
            "student, or choose another --output."
        )
    stride, (_, frames, height, width) = SPATIAL_STRIDES[student.latent_space], shape
    form = Form(stride * width, stride * height, 1 + TEMPORAL_STRIDE * (frames - 1), student.fps)
    paths = clip_files(folder, prompts)
    return _Plan(student, shape, folder, [VideoFile(path, form) for path in paths], clip_rows(prompts, paths, seed))


def _claim(plan: _Plan, image: Path | None, dtype: torch.dtype) -> None:
    """Say in a student's folder how its clips are made, or see that those that are there are made so.

    Raises:
        UserError: If they are not.
    """
    from avd_trainer.inference.students import identify
    from avd_trainer.runtime.files import claim_folder, read_json, write_json

    sampling = {
        "student": identify(plan.student, with_interpolator=False),
        "timesteps": list(plan.student.timesteps),
        "sampler": plan.student.sampler,
        "form": plan.files[0].form._asdict(),
        "dtype": str(dtype).removeprefix("torch."),
        "image": None if image is None else hashlib.sha256(image.read_bytes()).hexdigest(),
        "clips": list(plan.rows),
    }
    claim_folder(plan.folder)
    record = plan.folder / SAMPLING
    if not record.is_file():
        write_json(record, sampling)
    elif changed := [name for name, value in read_json(record).items() if sampling.get(name) != value]:
        raise UserError(
            f"{plan.folder} has clips of a run that was stopped, with other values of {', '.join(changed)}. Repeat "
            "the command as it was, or choose another --output."
        )


def _sample(
    plans: Mapping[str, _Plan], image: Path | None, device: torch.device, dtype: torch.dtype
) -> dict[str, list[VideoFile]]:
    """Sample each prompt with each student, from the same noise, and write the clips: what is measured are the files,
    as with everybody else's videos.

    Each clip is written before the next one is sampled, and those that are there are not made again.
    """
    from avd_trainer.data.video_files import save_clip
    from avd_trainer.data.video_sets import look_at
    from avd_trainer.inference.generation import decode_clips, sample_clips
    from avd_trainer.runtime.files import write_json

    for plan in plans.values():
        _claim(plan, image, dtype)
    missing = {
        title: [(file.path, row) for file, row in zip(plan.files, plan.rows, strict=True) if not file.path.exists()]
        for title, plan in plans.items()
    }
    steps = {title: len(plan.student.timesteps) for title, plan in plans.items()}
    with ProgressBar("sample", sum(len(clips) * steps[title] for title, clips in missing.items())) as bar:
        for title, plan in plans.items():
            rows = [row for _, row in missing[title]]
            samples = sample_clips(
                plan.student, [row["prompt"] for row in rows], [(1,) * steps[title]], plan.shape, image=image,
                seeds=[row["seed"] for row in rows], device=device, dtype=dtype, on_step=bar.advance,
            )  # fmt: skip
            latents = (sample.latents for (sample,) in samples)
            if rows:
                videos = decode_clips(plan.student, latents, device=device, dtype=dtype)
                for (path, _), video in zip(missing[title], videos, strict=True):
                    save_clip(video, path.with_suffix(""), plan.student.fps, ["mp4"])
            write_json(plan.folder / PROMPTS, plan.rows)
    return {title: [look_at(file.path) for file in plan.files] for title, plan in plans.items()}


def _seen_from(output: Path, folders: Sequence[Path]) -> list[str]:
    """Folders by their way from ``output``, sorted: the same from wherever the command is given."""
    return sorted(os.path.relpath(folder.resolve(), output.resolve()) for folder in folders)


def _expect_same(output: Path, request: Mapping[str, Any]) -> None:
    """See that no measures of something else would be replaced; those of the same folders and settings may be.

    Args:
        output: Where measures may be.
        request: What is to be measured, and how, as it is kept beside the values.

    Raises:
        UserError: If there are measures of something else.
    """
    from avd_trainer.runtime.files import read_json
    from avd_trainer.studies.students import REQUEST, RESULTS

    if not (output / RESULTS).is_file():
        return
    found = read_json(output / RESULTS)
    known = found.get(REQUEST) if isinstance(found, dict) else None
    if known is None:
        differences = ["it does not say of which"]
    else:
        names = dict.fromkeys([*known, *request])
        differences = [
            f"{name} {_listed(known.get(name))}, not {_listed(request.get(name))}"
            for name in names
            if known.get(name) != request.get(name)
        ]
    if differences:
        raise UserError(
            f"{output / RESULTS} is of other sets or settings: {'; '.join(differences)}. Repeat the command as it "
            "was, or choose another --output."
        )


def _listed(value: Any) -> str:
    if value is None or value == []:
        return "none"
    return ", ".join(value) if isinstance(value, list) else str(value)


def _expect_pictures(fps: float | None, clips: Sequence[Path]) -> None:
    """See that ``--fps`` says something.

    Raises:
        UserError: If it was given, and no clip is a folder of pictures.
    """
    if fps is not None and not any(clip.is_dir() for clip in clips):
        raise UserError(
            "--fps is of folders of numbered pictures, and there are none: videos say their own rate. Leave it out."
        )


def _check_folders(students: Sequence[Path], output: Path) -> None:
    """See that each student is given once, and that ``output`` is no student itself.

    Raises:
        UserError: If it is not so.
    """
    from avd_trainer.training.export import ABOUT
    from avd_trainer.training.folder import method_of_run

    for place, student in enumerate(students):
        if student.resolve() in {other.resolve() for other in students[:place]}:
            raise UserError(f"{student} is given twice. Pass each student once.")
    if (output / ABOUT).is_file() or method_of_run(output) is not None:
        raise UserError(
            f"--output {output} holds an export or a run, which this would mix with its table. Choose another folder."
        )
