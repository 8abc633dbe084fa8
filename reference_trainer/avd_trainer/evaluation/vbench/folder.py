"""A student's folder for a suite: what is recorded of it, and which videos are in it.

``vbench.json`` is beside the videos, not among them: VBench takes the ending of whatever file it meets first for that
of all videos. In VBench-2.0 the folder's own name is the student's, by which it keeps what it cuts out of the videos.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from avd_trainer.evaluation.vbench.suites import VIDEOS, Rules, Video, rules_of
from avd_trainer.runtime.errors import UserError
from avd_trainer.runtime.files import read_json, write_json
from avd_trainer.training.folder import locked

RECORD = "vbench.json"
RESULTS = "results"
"""Where a suite is told to write its results, and a person what it prints: so it is there before the suite runs."""


class Recorded(NamedTuple):
    """A video of the record.

    Attributes:
        video: What the suite wants.
        shown: The prompt that the student is shown: the suite's, or an augmented one.
        seed: Of its noise.
    """

    video: Video
    shown: str
    seed: int


@dataclass(frozen=True)
class Record:
    """What a student's folder is for.

    Attributes:
        rules: The suite.
        student: What the student was called; for people.
        settings: All that decides what is in the videos; the same for all videos of a folder.
        videos: Those that are wanted.
    """

    rules: Rules
    student: str
    settings: Mapping[str, Any]
    videos: tuple[Recorded, ...]

    @property
    def dimensions(self) -> list[str]:
        """Those that are wanted, in the suite's order."""
        wanted = {dimension for each in self.videos for dimension in each.video.dimensions}
        return [dimension for dimension in self.rules.dimensions if dimension in wanted]

    def of(self, dimension: str) -> list[Video]:
        """The videos of a dimension."""
        return [each.video for each in self.videos if dimension in each.video.dimensions]


def seed_of(seed: int, prompt: str, number: int) -> int:
    """The seed of a prompt's video: the same in any order, on any number of machines and in any dimension.

    The first 63 bits of a SHA-256 over the seed of all, the number and the prompt.
    """
    digest = hashlib.sha256(f"{seed}/{number}/{prompt}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def record_videos(videos: Sequence[Video], augmented: Mapping[str, str] | None, seed: int) -> tuple[Recorded, ...]:
    """Choose what is shown for each video, and its seed.

    Raises:
        UserError: If there are augmented prompts, but not of each.
    """
    missing = [] if augmented is None else [each.prompt for each in videos if each.prompt not in augmented]
    if missing:
        raise UserError(
            f"--augmented has no line for {missing[0]!r}, and for {len(set(missing)) - 1} more prompts of the "
            "dimensions. Pass the lists of these dimensions, or of all."
        )
    return tuple(
        Recorded(
            each, each.prompt if augmented is None else augmented[each.prompt], seed_of(seed, each.prompt, each.number)
        )
        for each in videos
    )


def claim(folder: Path, record: Record) -> Record:
    """Write the record of a folder, or add dimensions to the one that is there; one process after the other.

    Makes the folder of results, too.

    Returns:
        The record of all videos that were ever wanted.

    Raises:
        UserError: If the folder is of another suite, student or settings.
    """
    with locked(folder, wait=True):
        (folder / RESULTS).mkdir(exist_ok=True)
        if (folder / RECORD).is_file():
            known = read_record(folder)
            _expect_same(folder, known, record)
            record = Record(record.rules, known.student, record.settings, _join(known.videos, record.videos))
            if record == known:
                return record
        write_json(
            folder / RECORD,
            {
                "suite": record.rules.title,
                "student": record.student,
                "settings": dict(record.settings),
                "videos": [
                    {**each.video._asdict(), "dimensions": list(each.video.dimensions), "shown": each.shown,
                     "seed": each.seed}
                    for each in record.videos
                ],
            },
        )  # fmt: skip
        return record


def read_record(folder: Path) -> Record:
    """The record of a folder.

    Raises:
        UserError: If there is none, or it is damaged.
    """
    file = folder / RECORD
    if not file.is_file():
        raise UserError(f"{folder} has no {RECORD}: expected an --output folder of avd evaluate vbench generate.")
    content = read_json(file)
    try:
        videos = tuple(
            Recorded(
                Video(each["file"], each["prompt"], each["number"], tuple(each["dimensions"])),
                each["shown"],
                each["seed"],
            )
            for each in content["videos"]
        )
        return Record(rules_of(content["suite"]), content["student"], content["settings"], videos)
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"{file} is damaged ({error!r}). Delete it, and repeat the command that generates the videos."
        ) from error


def check_names(folder: Path, files: Sequence[str]) -> None:
    """See that the file system takes the names of videos, before any is made: the longest, and each odd character.

    Raises:
        UserError: If it does not, or does not tell two of them apart.
    """
    names = sorted({file.rpartition("/")[2] for file in files}, key=lambda name: len(name.encode()))
    odd = {character: name for name in names for character in name if not character.isalnum()}
    folded: dict[str, str] = {}
    twins = []
    for file in files:
        other = folded.setdefault(file.casefold(), file)
        if other != file:
            twins.append((other, file))
    with tempfile.TemporaryDirectory(dir=folder, prefix="names-") as probe:
        for name in {*odd.values(), *names[-1:]}:
            try:
                (Path(probe) / name).touch()
            except OSError as error:
                raise UserError(
                    f"The file system of --output {folder} does not take the name {name!r} ({error.strerror}), under "
                    "which the suite looks for a video. Choose a folder on another disk, such as ext4 or xfs."
                ) from error
        (Path(probe) / "case").touch()
        if twins and (Path(probe) / "CASE").exists():
            raise UserError(
                f"The file system of --output {folder} does not tell capitals from small letters, so {twins[0][0]!r} "
                f"and {twins[0][1]!r} would be one file. Choose a folder on another disk, such as ext4 or xfs."
            )


def folders_of(record: Record) -> list[str]:
    """The folders of videos, within the student's."""
    return record.dimensions if record.rules.folder_each else [VIDEOS]


def present(folder: Path, record: Record) -> set[str]:
    """Files that are in the folders of videos, whatever they are, as a record names them."""
    return {
        f"{each}/{name}"
        for each in folders_of(record)
        if (folder / each).is_dir()
        for name in os.listdir(folder / each)
    }


def _expect_same(folder: Path, known: Record, record: Record) -> None:
    differences = [] if known.rules == record.rules else [f"suite {known.rules.title}, not {record.rules.title}"]
    for name in dict.fromkeys([*known.settings, *record.settings]):
        old, new = known.settings.get(name), record.settings.get(name)
        if old != new:
            differences.append(f"{name} {old}, not {new}")
    shown = {each.video.file: each.shown for each in known.videos}
    if any(shown.get(each.video.file, each.shown) != each.shown for each in record.videos):
        differences.append("other augmented prompts")
    if differences:
        raise UserError(
            f"--output {folder} has videos of another student or other settings: {'; '.join(differences)}. Repeat the "
            "command as it was, or choose another --output."
        )


def _join(known: tuple[Recorded, ...], new: tuple[Recorded, ...]) -> tuple[Recorded, ...]:
    """All of them; a video of both is judged by the dimensions of both."""
    joined = {each.video.file: each for each in known}
    for each in new:
        other = joined.get(each.video.file, each)
        judges = tuple(dict.fromkeys([*other.video.dimensions, *each.video.dimensions]))
        joined[each.video.file] = other._replace(video=other.video._replace(dimensions=judges))
    return tuple(joined.values())
