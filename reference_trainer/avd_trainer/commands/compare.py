"""``avd compare``: clips of several students from the same noise."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from avd_trainer.commands.clip_files import (
    PROMPTS,
    check_output,
    clip_files,
    expect_finished,
    read_asked_prompts,
    write_clips,
    write_list,
)
from avd_trainer.commands.sampling_options import (
    ComputeDtype,
    Device,
    Image,
    Output,
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
    from avd_trainer.inference.students import Shape, Student


def compare(
    students: Annotated[
        list[Path],
        typer.Argument(help="Two or more: --output folders of avd export, finished runs; or folders of videos."),
    ],
    output: Output,
    prompt: Prompts = None,
    prompts_file: PromptsFile = None,
    image: Image = None,
    seed: Seed = 0,
    size: Annotated[
        str | None,
        typer.Option(metavar="WxHxF", help="Pixels and frames, 832x480x81. Default: what the first was trained on."),
    ] = None,
    fps: Annotated[
        float | None,
        typer.Option(
            min=1, help="Frames per second of the files; needed where clips are folders of numbered pictures."
        ),
    ] = None,
    pipeline: Pipeline = None,
    device: Device = None,
    dtype: ComputeDtype = None,
) -> None:
    """Sample the same prompts and the same noise with several students, and show their clips side by side.

    Of folders of videos, the files of equal names.
    """
    with readable_errors():
        if len(students) == 1:
            raise UserError(
                f"{students[0]} alone cannot be compared. Pass two students or more, or as many folders of videos."
            )
        of_videos = [folder for folder in students if are_videos(folder)]
        if of_videos:
            if len(of_videos) < len(students):
                raise UserError(
                    f"{of_videos[0]} is a folder of videos, and others are not. Sample the students first, by avd "
                    "evaluate or avd sample, and compare the folders."
                )
            refuse_for_videos({
                "--prompt": prompt, "--prompts-file": prompts_file, "--image": image, "--seed": seed, "--size": size,
                "--pipeline": pipeline, "--device": device, "--dtype": dtype,
            })  # fmt: skip
            _compare_videos(students, output, fps)
            return
        prompts = read_asked_prompts(prompt, prompts_file)
        alone = prompts_file is None and len(prompts) == 1
        check_output(output, alone)
        from avd_trainer.inference.choices import choose_device, choose_dtype
        from avd_trainer.inference.generation import decode_clips, sample_at_full_rate
        from avd_trainer.inference.students import open_students
        from avd_trainer.runtime.files import claim_folder

        files = [output] if alone else clip_files(output, prompts)
        _check_new(files)
        opened = open_students(students, pipeline)
        shape = _common_shape(opened, size)
        where = choose_device(device)
        kind = choose_dtype(dtype, where)
        claim_folder(output.parent if alone else output)
        with ProgressBar("sample", len(prompts) * sum(len(student.timesteps) for student in opened)) as bar:
            columns = [
                sample_at_full_rate(
                    student, prompts, shape, image=image, seed=seed, device=where, dtype=kind, on_step=bar.advance
                )
                for student in opened
            ]
        # All by the first one's codec: they make latents of one space.
        latents = (each for row in zip(*columns, strict=True) for each in row)
        videos = decode_clips(opened[0], latents, device=where, dtype=kind)

        def list_files(written: int) -> None:
            if not alone:
                write_list(output / PROMPTS, prompts[:written], files[:written], seed)

        write_clips(videos, titles_of(students), files, fps or opened[0].fps, list_files)
        say(f"{'The clip is' if len(files) == 1 else f'{len(files)} clips are'} in {output}.")


def are_videos(folder: Path) -> bool:
    """Whether a folder holds videos rather than a student: a run, which writes samples, is one."""
    from avd_trainer.data.video_sets import holds_videos
    from avd_trainer.training.export import ABOUT
    from avd_trainer.training.folder import method_of_run

    student = (folder / ABOUT).is_file() or (folder / "scheduler").is_dir() or method_of_run(folder) is not None
    return not student and holds_videos(folder)


def _compare_videos(folders: Sequence[Path], output: Path, fps: float | None) -> None:
    """Show files of equal names side by side, in the one form that all can be brought to."""
    from avd_trainer.data.video_sets import changes_to, common_form, look_at, read_clip, same_names
    from avd_trainer.runtime.files import claim_folder

    for folder in folders:
        expect_finished(folder)
    names, left_out = same_names(folders, fps)
    alone = len(names) == 1
    check_output(output, alone)
    for folder in folders:
        if output.resolve().is_relative_to(folder.resolve()):
            raise UserError(f"--output {output} is in {folder}, whose videos are shown. Choose a place outside of it.")
    # Below folders of the same names as theirs: "a/b" and "a_b" are two.
    files = [output] if alone else [output / f"{name}.mp4" for name in names]
    _check_new(files)
    rows = [[look_at(path, fps) for path in paths] for paths in names.values()]
    titles = titles_of(folders)
    form = common_form(file for row in rows for file in row)
    for title, column in zip(titles, zip(*rows, strict=True), strict=True):
        for change in changes_to(form, column):
            say(f"{title}: {change}.")
    claim_folder(output.parent if alone else output)
    for file in files:
        file.parent.mkdir(parents=True, exist_ok=True)
    shown = (read_clip(file, form) for row in rows for file in row)
    write_clips(shown, titles, files, fps or form.fps, lambda _: None)
    if left_out:
        say(f"{left_out} other files have no counterpart in every folder, and are left out.")
    say(f"{'The clip is' if alone else f'{len(files)} clips are'} in {output}.")


def _check_new(files: Sequence[Path]) -> None:
    """See that nothing would be replaced.

    Raises:
        UserError: If one of the files is there.
    """
    for file in files:
        if file.exists():
            raise UserError(f"{file} is there already, and is not replaced. Delete it, or choose another --output.")


def titles_of(folders: Sequence[Path]) -> list[str]:
    """The names of folders, or their whole paths where names are the same."""
    names = [folder.resolve().name for folder in folders]
    return names if len(set(names)) == len(names) else [str(folder) for folder in folders]


def _common_shape(students: Sequence[Student], size: str | None) -> Shape:
    """The latent shape for all of them.

    Raises:
        UserError: If they have no common latents, or one cannot take the size.
    """
    from avd_trainer.inference.choices import choose_shape
    from avd_trainer.models.architecture import latent_channels
    from avd_trainer.models.codecs.latent_space import LATENT_SPACES

    first, *others = students
    shape = choose_shape(first, size, (1,))
    for other in others:
        if (other.latent_space, latent_channels(other.architecture)) != (first.latent_space, shape[0]):
            raise UserError(
                f"{first.folder} makes latents of {LATENT_SPACES[first.latent_space]}, and {other.folder} of "
                f"{LATENT_SPACES[other.latent_space]}: no noise is for both. Compare students of one latent space."
            )
        choose_shape(other._replace(clip=shape), None, (1,))
    return shape
