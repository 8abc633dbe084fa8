"""What ``avd sample`` and ``avd compare`` have in common: prompts, and files of the clips that show them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from avd_trainer.runtime.errors import UserError
from avd_trainer.runtime.progress import ProgressBar

if TYPE_CHECKING:
    from torch import Tensor

ENDINGS = (".mp4", ".gif")
PROMPTS = "prompts.json"
"""Beside clips: see :func:`write_list`."""
SAMPLING = "sampling.json"
"""Beside clips of ``avd evaluate``: how they are made. Without :data:`PROMPTS` some of them are missing."""
MOST_SEED = 2**63 - 1
"""torch takes twice as much: so the seeds of later prompts fit too."""


def read_asked_prompts(given: Sequence[str] | None, file: Path | None) -> list[str]:
    """Those of ``--prompt``, then those of ``--prompts-file``.

    Raises:
        UserError: If there are none, or the file cannot be read.
    """
    from avd_trainer.data.encode import read_prompts

    prompts = [*(given or []), *([] if file is None else (text for _, text in read_prompts(file)))]
    if not prompts:
        raise UserError("There is nothing to show. Pass --prompt TEXT or --prompts-file FILE.")
    return prompts


def check_output(output: Path, alone: bool) -> None:
    """See that ``--output`` is what one prompt asks for, a clip, or what several do, a folder.

    Raises:
        UserError: If it is not.
    """
    if not alone and output.suffix in ENDINGS:
        raise UserError(
            f"--output {output} is one clip, which is for one --prompt alone. Pass a folder for the clips of several "
            "prompts or of a --prompts-file."
        )
    if alone and output.suffix not in ENDINGS:
        raise UserError(
            f"--output {output} has an unknown ending: of one prompt it is a file that ends in {' or '.join(ENDINGS)}."
        )
    if alone and output.is_dir():
        raise UserError(f"--output {output} is a folder. Pass the name of a file.")


def clip_files(output: Path, prompts: Sequence[str]) -> list[Path]:
    """The file of each prompt, in a folder."""
    from avd_trainer.inference.generation import clip_name

    return [output / f"{clip_name(number, prompt)}.mp4" for number, prompt in enumerate(prompts)]


def write_clips(
    videos: Iterator[Tensor], names: Sequence[str], files: Sequence[Path], fps: float, on_file: Callable[[int], None]
) -> None:
    """Decode and write file by file: each has the next videos under ``names``; ``on_file`` is told how many there are.

    A large clip takes long to decode and long to write, so the bar counts both.
    """
    with ProgressBar("decode and write", len(files) * (len(names) + 1)) as bar:
        for number, file in enumerate(files, 1):
            versions = {}
            for name in names:
                versions[name] = next(videos)
                bar.advance()
            _save(versions, file, fps)
            on_file(number)
            bar.advance()


def _save(versions: Mapping[str, Tensor], file: Path, fps: float) -> None:
    """Write one clip, or several next to each other below their labels."""
    import torch

    from avd_trainer.data.video_files import save_clip, save_grid

    path, formats = file.with_suffix(""), [file.suffix.removeprefix(".")]
    labels, videos = list(versions), list(versions.values())
    if len(videos) == 1:
        save_clip(videos[0], path, fps, formats)
    else:
        save_grid(torch.stack(videos), labels, path, fps, formats)


def write_list(file: Path, prompts: Sequence[str], files: Sequence[Path], seed: int) -> None:
    """Say of each clip its file, prompt and seed."""
    from avd_trainer.runtime.files import write_json

    write_json(file, clip_rows(prompts, files, seed))


def clip_rows(prompts: Sequence[str], files: Sequence[Path], seed: int) -> list[dict[str, Any]]:
    """Of each clip its file, prompt and seed."""
    return [
        {"file": path.name, "prompt": prompt, "seed": seed + number}
        for number, (path, prompt) in enumerate(zip(files, prompts, strict=True))
    ]


def expect_finished(folder: Path) -> None:
    """See that no set below a folder misses clips since ``avd evaluate`` was stopped.

    Raises:
        UserError: If one does.
    """
    for record in folder.rglob(SAMPLING):
        if not record.with_name(PROMPTS).is_file():
            raise UserError(
                f"{record.parent} misses clips, since the avd evaluate that made them was stopped. Repeat that "
                "command, which goes on."
            )
