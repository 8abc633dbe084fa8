"""VBench and VBench-2.0 as their own files describe them: which videos they want, and under which names."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from avd_trainer.runtime.errors import UserError

VIDEOS = "videos"
"""The folder of VBench's videos, which lie side by side; nothing else may be in it."""


@dataclass(frozen=True)
class Rules:
    """What a suite's code and pages say beyond its prompts.

    Attributes:
        title: Its name.
        info: The file with its prompts.
        dimensions: What it judges.
        samples: Videos of a prompt.
        more_samples: Dimensions that want another number.
        name_length: So many characters of the prompt are in a file's name; None for all.
        folder_each: Whether each dimension has a folder of its own.
        too_long: Seconds. Clips of that length or longer belong to another suite; None for no such limit.
        binary: Dimensions that give each video 0 or 1.
        per_prompt: Dimensions that give one number for all videos of a prompt.
    """

    title: str
    info: str
    dimensions: tuple[str, ...]
    samples: int
    more_samples: Mapping[str, int]
    name_length: int | None
    folder_each: bool
    too_long: float | None
    binary: frozenset[str]
    per_prompt: frozenset[str] = field(default_factory=frozenset)

    def samples_of(self, dimension: str) -> int:
        """How many videos of a prompt a dimension wants."""
        return self.more_samples.get(dimension, self.samples)

    def frames_to_write(self, frames: int, fps: float) -> int:
        """Of so many frames, how many keep a clip shorter than ``too_long``; at least one."""
        if self.too_long is None:
            return frames
        return max(1, min(frames, math.ceil(self.too_long * fps) - 1))


VBENCH = Rules(
    title="VBench",
    info="VBench_full_info.json",
    dimensions=(
        "subject_consistency", "background_consistency", "temporal_flickering", "motion_smoothness", "dynamic_degree",
        "aesthetic_quality", "imaging_quality", "object_class", "multiple_objects", "human_action", "color",
        "spatial_relationship", "scene", "temporal_style", "appearance_style", "overall_consistency",
    ),
    samples=5,
    more_samples={"temporal_flickering": 25},  # of which its static filter keeps 5
    name_length=None,
    folder_each=False,
    too_long=5.0,
    binary=frozenset({"dynamic_degree", "human_action"}),
)  # fmt: skip
VBENCH_2 = Rules(
    title="VBench-2.0",
    info="VBench2_full_info.json",
    dimensions=(
        "Human_Anatomy", "Human_Identity", "Human_Clothes", "Diversity", "Composition", "Dynamic_Spatial_Relationship",
        "Dynamic_Attribute", "Motion_Order_Understanding", "Human_Interaction", "Complex_Landscape", "Complex_Plot",
        "Camera_Motion", "Motion_Rationality", "Instance_Preservation", "Mechanics", "Thermotics", "Material",
        "Multi-View_Consistency",
    ),
    samples=3,
    more_samples={"Diversity": 20},
    name_length=180,
    folder_each=True,
    too_long=None,
    binary=frozenset({
        "Camera_Motion", "Dynamic_Attribute", "Dynamic_Spatial_Relationship", "Human_Clothes", "Human_Interaction",
        "Instance_Preservation", "Material", "Mechanics", "Motion_Order_Understanding", "Motion_Rationality",
        "Thermotics",
    }),
    per_prompt=frozenset({"Diversity"}),
)  # fmt: skip
SUITES = (VBENCH, VBENCH_2)


def rules_of(title: str) -> Rules:
    """The rules of a suite by its name.

    Raises:
        ValueError: If there is no such suite.
    """
    for rules in SUITES:
        if rules.title == title:
            return rules
    raise ValueError(f"suite must be one of {', '.join(rules.title for rules in SUITES)}, got {title!r}.")


class Video(NamedTuple):
    """A video that a suite wants.

    Attributes:
        file: Where, within a student's folder; with ``/`` between folder and name.
        prompt: What the suite asks for; the file is named after it.
        number: Its place among the videos of the prompt, from 0.
        dimensions: Which of those that were chosen judge it.
    """

    file: str
    prompt: str
    number: int
    dimensions: tuple[str, ...]


@dataclass(frozen=True)
class Suite:
    """A suite's prompts.

    Attributes:
        rules: Which suite it is.
        sha256: Of the file that they were read from.
        prompts: Of each dimension, in the file's order, each once.
    """

    rules: Rules
    sha256: str
    prompts: Mapping[str, tuple[str, ...]]

    def videos(self, dimensions: Sequence[str], samples: int | None = None) -> list[Video]:
        """All videos that dimensions want; one that several of them judge is there once.

        Args:
            dimensions: Which.
            samples: Videos of a prompt, in place of the suite's own numbers.

        Raises:
            UserError: If there is no such dimension, a prompt cannot be a file's name, or two prompts have one name.
        """
        found: dict[str, Video] = {}
        for dimension in dimensions:
            if dimension not in self.prompts:
                raise UserError(
                    f"--dimension {dimension}: {self.rules.title} has {', '.join(self.prompts)}. Pass some of these."
                )
            for prompt in self.prompts[dimension]:
                for number in range(samples or self.rules.samples_of(dimension)):
                    file = self._file(dimension, prompt, number)
                    known = found.get(file)
                    if known is not None and known.prompt != prompt:
                        raise UserError(
                            f"{file} would be the video of two prompts, {known.prompt!r} and {prompt!r}: the suite's "
                            "own code could not tell them apart. Leave this dimension out."
                        )
                    judges = (dimension,) if known is None else (*known.dimensions, dimension)
                    found[file] = Video(file, prompt, number, tuple(dict.fromkeys(judges)))
        return list(found.values())

    def _file(self, dimension: str, prompt: str, number: int) -> str:
        name = prompt[: self.rules.name_length]
        if "/" in name or "\0" in name or not name:
            raise UserError(
                f"{self.rules.title} names a video after the prompt {prompt!r}, which cannot be a file's name. Leave "
                f"{dimension} out."
            )
        return f"{dimension if self.rules.folder_each else VIDEOS}/{name}-{number}.mp4"


def read_suite(path: Path) -> Suite:
    """Read a suite's prompts, as data: nothing of the suite runs.

    Args:
        path: ``VBench_full_info.json`` or ``VBench2_full_info.json``, or a folder that has one of them: the installed
            package, its environment, or a checkout.

    Raises:
        UserError: If there is none or more than one, or it has another form.
    """
    file = path if path.is_file() else _find_info(path)
    try:
        content = file.read_bytes()
        entries = json.loads(content)
    except (OSError, ValueError) as error:
        raise UserError(f"--suite {file} cannot be read: {error}. Pass the suite's own file again.") from error
    prompts: dict[str, list[str]] = {}
    for entry in entries if isinstance(entries, list) else [entries]:
        prompt, dimensions = _read_entry(entry, file)
        for dimension in dimensions:
            prompts.setdefault(dimension, []).append(prompt)
    rules = next((rules for rules in SUITES if prompts and set(prompts) <= set(rules.dimensions)), None)
    if rules is None:
        raise UserError(
            f"--suite {file} has the dimensions {', '.join(prompts) or 'none'}, which are neither VBench's nor "
            f"VBench-2.0's. Pass {' or '.join(rules.info for rules in SUITES)}."
        )
    ordered = {each: tuple(dict.fromkeys(prompts[each])) for each in rules.dimensions if each in prompts}
    return Suite(rules, hashlib.sha256(content).hexdigest(), ordered)


def _read_entry(entry: Any, file: Path) -> tuple[str, list[str]]:
    known = isinstance(entry, dict)
    prompt, dimensions = (entry.get("prompt_en"), entry.get("dimension")) if known else (None, None)
    if (
        isinstance(prompt, str)
        and isinstance(dimensions, list)
        and all(isinstance(dimension, str) for dimension in dimensions)
    ):
        return prompt, dimensions
    raise UserError(
        f"--suite {file}: expected a list of objects with prompt_en and dimension, got {str(entry)[:80]!r}. Pass "
        f"{' or '.join(rules.info for rules in SUITES)}."
    )


def _find_info(folder: Path) -> Path:
    names = {rules.info for rules in SUITES}
    # An environment, a checkout of either suite, the package itself.
    depths = ("*", "*/*", "*/*/*", "lib/python*/site-packages/vbench*/*")
    found = sorted({path for depth in depths for path in folder.glob(depth) if path.name in names})
    if len(found) != 1:
        listed = f"several: {', '.join(map(str, found))}" if found else "none"
        raise UserError(
            f"--suite {folder}: expected a folder with one of {' and '.join(sorted(names))}, it has {listed}. Pass the "
            "file itself."
        )
    return found[0]


def read_augmented(original: Path, augmented: Path) -> dict[str, str]:
    """For each prompt what a student is shown in its place: line by line, as the suites publish both.

    Where a prompt is there twice the last line counts: its video would replace the earlier one of the same name.

    Raises:
        UserError: If a file cannot be read, or they have different numbers of lines.
    """
    lines = []
    for file in (original, augmented):
        try:
            lines.append([line.strip() for line in file.read_text(encoding="utf-8").splitlines()])
        except (OSError, ValueError) as error:
            raise UserError(f"--augmented {file} cannot be read: {error}. Pass two text files in UTF-8.") from error
    if len(lines[0]) != len(lines[1]):
        raise UserError(
            f"--augmented: {original} has {len(lines[0])} lines and {augmented} {len(lines[1])}, expected a line for "
            "each prompt in both. Pass the two lists that belong together."
        )
    return dict(zip(*lines, strict=True))
