"""Results of VBench and VBench-2.0, read back from what they wrote, as one table: data alone, nothing of them runs."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from scipy.stats import binomtest

from avd_trainer.evaluation.vbench.folder import RESULTS, Record, folders_of, read_record
from avd_trainer.evaluation.vbench.suites import SUITES
from avd_trainer.runtime.errors import UserError

FILTERED = "filtered_videos"
"""Where VBench's static filter copies what it keeps of the videos for temporal_flickering, under new numbers."""
FLICKERING = "temporal_flickering"
IDENTITY = "student"
"""The setting that is a word for a student's weights."""
LEFT_OUT = -1
"""VBench-2.0's result of a video that does not show what was to be judged; its mean is over the others."""
PRESERVATION = "Instance_Preservation"
FAILED = re.compile(r"Error processing video: (?:.*/)?(.+)_clip_\d{4}\.mp4")
"""What VBench-2.0 prints where its model could not judge a part of a video, which then counts as preserved."""
LEVEL = 0.95


class Interval(NamedTuple):
    """A 95% interval, by Wilson's score."""

    low: float
    high: float


class Count(NamedTuple):
    """So many of so many videos.

    Attributes:
        hits: Videos with 1.
        videos: Videos with 0 or 1.
    """

    hits: int
    videos: int

    @property
    def share(self) -> float:
        """In [0, 1]."""
        return self.hits / self.videos

    @property
    def interval(self) -> Interval:
        """Of the share, as if the videos were independent of each other."""
        found: Any = binomtest(self.hits, self.videos).proportion_ci(LEVEL, method="wilson")
        return Interval(float(found.low), float(found.high))


PAPER: dict[str, dict[str, Count]] = {
    PRESERVATION: {
        "teacher": Count(158, 171), "DMD": Count(152, 171), "+TR": Count(146, 171), "+TR+Reg": Count(142, 171),
        "+TR+AdaLoss": Count(158, 171), "half rate": Count(157, 171),
    },
    "dynamic_degree": {
        "teacher": Count(308, 360), "DMD": Count(260, 360), "+TR": Count(360, 360), "+TR+Reg": Count(283, 360),
        "+TR+AdaLoss": Count(359, 360), "half rate": Count(352, 360),
    },
}  # fmt: skip
"""Table 2 of Adaptive Video Distillation, Wan2.1-1.3B, as the counts that its percentages stand for."""


@dataclass(frozen=True)
class Score:
    """What a suite says of a student in one dimension.

    Attributes:
        mean: The suite's own number.
        judged: Videos that it is the mean of (prompts, where the suite gives one number to all videos of a prompt).
        wanted: How many there should be.
        left_out: Of those, how many the suite left out since they do not show what was to be judged.
        count: In dimensions of 0 and 1.
        failed: Videos that count as preserved although a part of them could not be judged; None where that is not
            known.
        unfiltered: Whether videos for flicker did not go through the suite's static filter.
        samples: Videos of a prompt where they are not as many as the suite's; None where they are.
    """

    mean: float
    judged: int
    wanted: int
    left_out: int = 0
    count: Count | None = None
    failed: tuple[str, ...] | None = ()
    unfiltered: bool = False
    samples: int | None = None


@dataclass(frozen=True)
class Results:
    """What a suite says of a student.

    Attributes:
        record: Of the student's folder.
        scores: By dimension, in the suite's order.
    """

    record: Record
    scores: Mapping[str, Score]


def read_results(folder: Path) -> Results:
    """Read all ``*_eval_results.json`` below ``results`` in a student's folder.

    Raises:
        UserError: If there are none, one has another form, is of other videos than the folder's, or two say different
            things of one dimension.
    """
    record = read_record(folder)
    files = sorted((folder / RESULTS).rglob("*_eval_results.json"))
    if not files:
        raise UserError(
            f"{folder / RESULTS} has no *_eval_results.json. Run {record.rules.title} with --output_path in it first."
        )
    sources: dict[str, tuple[Path, Any]] = {}
    for file in files:
        for dimension, value in _read(file).items():
            known, other = sources.setdefault(dimension, (file, value))
            if other != value:
                raise UserError(f"{known} and {file} say different things of {dimension}. Delete the one that is old.")
    unknown = sorted(set(sources) - set(record.dimensions))
    if unknown:
        file, _ = sources[unknown[0]]
        raise UserError(
            f"{file} has results of {', '.join(unknown)}, and {folder} has videos for {', '.join(record.dimensions)}. "
            "Move it into the folder of the student that it is of."
        )
    return Results(
        record,
        {each: _score(folder, record, each, *sources[each]) for each in record.dimensions if each in sources},
    )


def to_json(results: Mapping[str, Results]) -> dict[str, Any]:
    """All numbers, by student and dimension, and the paper's."""
    return {
        "students": {
            title: {
                "suite": found.record.rules.title,
                "settings": dict(found.record.settings),
                "scores": {dimension: _score_json(score) for dimension, score in found.scores.items()},
            }
            for title, found in results.items()
        },
        "paper": {
            dimension: {title: _count_json(count) for title, count in PAPER[dimension].items()}
            for dimension in _dimensions(results)
            if dimension in PAPER
        },
        "notes": notes(results),
    }


def table(results: Mapping[str, Results]) -> list[list[str]]:
    """Rows of cells, the first one the header: a dimension a row, then students, then the paper's columns.

    In percent; ``[from, to]`` is the 95% interval of dimensions of 0 and 1, behind it how many videos have 1. ``!`` is
    at scores that :func:`notes` says more of.
    """
    dimensions = _dimensions(results)
    paper = list(dict.fromkeys(title for each in dimensions for title in PAPER.get(each, {})))
    rows = [["dimension", *results, *(f"paper: {title}" for title in paper)]]
    for dimension in dimensions:
        cells = [_cell(found.scores.get(dimension)) for found in results.values()]
        quoted = PAPER.get(dimension, {})
        rows.append([dimension, *cells, *(_count_cell(quoted[title]) if title in quoted else "" for title in paper)])
    return rows


def notes(results: Mapping[str, Results]) -> list[str]:
    """What a reader of the table has to know, a sentence each."""
    said = _differences(results)
    for dimension in _dimensions(results):
        scores = {title: found.scores[dimension] for title, found in results.items() if dimension in found.scores}
        sizes = sorted({score.count.videos for score in scores.values() if score.count is not None})
        said += [f"{dimension}: one of {size} videos is {100 / size:.2f} points." for size in sizes]
        for title, score in scores.items():
            said += [f"{title}, {dimension}: {remark}" for remark in _remarks(score, results[title].record, dimension)]
    judged_apart = [PurePosixPath(title).name for title, found in results.items() if PRESERVATION in found.scores]
    if len(set(judged_apart)) < len(judged_apart):
        said.append(
            f"{PRESERVATION}: students of one folder's name. VBench-2.0 keeps what it cuts out of videos in "
            "model_clip/NAME, and takes what is there: judged in one place, the second was given the first's."
        )
    if any(dimension in PAPER for dimension in _dimensions(results)):
        said.append(
            "paper: Table 2 of Adaptive Video Distillation (Wan2.1-1.3B), quoted; 92.39 there is 158 of 171, 97.77 is "
            "352 of 360. Other prompts, sizes and weights than yours may be behind it."
        )
    if any(score.count is not None for found in results.values() for score in found.scores.values()):
        said.append(
            "[from, to]: 95% interval by Wilson's score, as if videos were independent. Videos of one prompt are "
            "alike, so the true interval is wider."
        )
    return said


def _read(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{file} cannot be read: {error}. Judge the videos again.") from error
    if not isinstance(content, dict):
        raise UserError(f"{file}: expected an object with a dimension each, got a {type(content).__name__}.")
    return content


def _score(folder: Path, record: Record, dimension: str, file: Path, value: Any) -> Score:
    mean, videos = _parse(file, dimension, value)
    _expect_own(folder, record, dimension, file, [path for path, _ in videos])
    judged = [result for _, result in videos if result != LEFT_OUT]
    if not judged or not math.isfinite(mean):
        raise UserError(f"{file}: {dimension} has no judged video (mean {mean}). Look into what the suite printed.")
    # Of the many videos for flicker those after the fifth are there to be chosen from.
    most = record.rules.samples if dimension == FLICKERING else record.rules.samples_of(dimension)
    most = 1 if dimension in record.rules.per_prompt else most
    samples = record.settings.get("samples")
    wanted = [each for each in record.of(dimension) if each.number < most]
    return Score(
        mean=mean,
        judged=len(judged),
        wanted=len(wanted),
        left_out=len(videos) - len(judged),
        count=_count(file, dimension, mean, judged) if dimension in record.rules.binary else None,
        failed=_failed(folder, videos) if dimension == PRESERVATION else (),
        unfiltered=dimension == FLICKERING and not any(FILTERED in PurePosixPath(path).parts for path, _ in videos),
        samples=None if samples == record.rules.samples_of(dimension) else samples,
    )


def _parse(file: Path, dimension: str, value: Any) -> tuple[float, list[tuple[str, float]]]:
    """The mean, and path and result of each video."""
    try:
        mean, listed = value
        videos = [(str(each["video_path"]), float(each["video_results"])) for each in listed]
        return float(mean), videos
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"{file}: {dimension} should be [mean, [{{video_path, video_results}}, ...]], got {str(value)[:80]}. Pass "
            "results of VBench 0.1.5 or of VBench-2.0."
        ) from error


def _expect_own(folder: Path, record: Record, dimension: str, file: Path, paths: Sequence[str]) -> None:
    """See that results are of a folder's videos: each a different one of them, and as far as paths tell, there."""
    own = folder.resolve().name
    names = {PurePosixPath(each.file).name: PurePosixPath(own, each.file) for each in record.of(dimension)}
    for path in paths:
        # What is before the last ".." leads elsewhere: "../avd/videos/a.mp4" says "avd/videos/a.mp4".
        parts = PurePosixPath(path).parts
        found = PurePosixPath(*parts[len(parts) - [*parts[::-1], ".."].index("..") :])
        expected = names.get(found.name)
        if expected is None:
            raise UserError(
                f"{file} judges {found.name!r} for {dimension}, and {folder} wants no such video. Is it the result of "
                "another student, or of other prompts?"
            )
        if dimension == FLICKERING and FILTERED in found.parts:
            continue
        # As far as the path goes: who runs a suite in the folder itself passes a short one.
        depth = min(len(found.parts), len(expected.parts))
        if found.parts[-depth:] != expected.parts[-depth:]:
            raise UserError(
                f"{file} judges {path}, expected a video at .../{expected}: it is the result of another folder. Judge "
                f"{folders_of(record)[0]} of {folder}, or move the result into the folder that it is of."
            )
    if len({PurePosixPath(path).name for path in paths}) < len(paths):
        raise UserError(f"{file} has a video more than once in {dimension}. Judge the videos again.")


def _count(file: Path, dimension: str, mean: float, judged: Sequence[float]) -> Count:
    count = Count(int(sum(judged)), len(judged))
    if not set(judged) <= {0.0, 1.0} or not math.isclose(mean, count.share, abs_tol=1e-6):
        raise UserError(
            f"{file}: expected 0 or 1 for each video in {dimension}, and {mean} as their mean, got {count.hits} of "
            f"{count.videos}. Pass the file as VBench 0.1.5 or VBench-2.0 wrote it."
        )
    return count


def _failed(folder: Path, videos: Sequence[tuple[str, float]]) -> tuple[str, ...] | None:
    """Videos that count as preserved although a part of them could not be judged, by what the suite printed."""
    logs = sorted((folder / RESULTS).rglob("*.log"))
    if not logs:
        return None
    printed = "\n".join(log.read_text(encoding="utf-8", errors="replace") for log in logs)
    stems = set(FAILED.findall(printed))
    names = (PurePosixPath(path) for path, result in videos if result == 1)
    return tuple(name.name for name in names if name.stem in stems)


def _differences(results: Mapping[str, Results]) -> list[str]:
    """What else than their weights differs between students that one suite has judged."""
    said = []
    for rules in SUITES:
        settings = {title: found.record.settings for title, found in results.items() if found.record.rules == rules}
        for name in dict.fromkeys(name for own in settings.values() for name in own if name != IDENTITY):
            # "the suite's", as without --samples
            values = {title: "the suite's" if own.get(name) is None else own[name] for title, own in settings.items()}
            if any(value != next(iter(values.values())) for value in values.values()):
                listed = ", ".join(f"{title} {value}" for title, value in values.items())
                said.append(f"{rules.title}: students differ in {name}: {listed}.")
    return said


def _remarks(score: Score, record: Record, dimension: str) -> list[str]:
    """What is wrong with a score, or not known."""
    said = []
    if score.samples is not None:
        said.append(
            f"{score.samples} videos of a prompt, and {record.rules.title} wants {record.rules.samples_of(dimension)}."
        )
    if score.left_out:
        said.append(f"{score.left_out} videos do not show what is to be judged, and are not in the mean.")
    missing = score.wanted - score.judged - score.left_out
    if missing > 0:
        said.append(f"{missing} of {score.wanted} are not in the mean: the suite found no video, or nothing to judge.")
    if score.unfiltered:
        said.append("videos did not go through the suite's static filter, so motion counts as flicker.")
    if score.failed is None:
        said.append("no log in results/, so errors of its model, which count as preserved, cannot be told.")
    elif score.failed:
        some = ", ".join(repr(name) for name in score.failed[:3])
        said.append(f"{len(score.failed)} videos count as preserved although the model failed on them, such as {some}.")
    if dimension == PRESERVATION and record.settings["frames"] // record.settings["fps"] < 2:
        said.append("clips of under 2 seconds are not looked at: all of them count as preserved.")
    return said


def _dimensions(results: Mapping[str, Results]) -> list[str]:
    return list(dict.fromkeys(dimension for found in results.values() for dimension in found.scores))


def _cell(score: Score | None) -> str:
    if score is None:
        return ""
    complete = score.judged == score.wanted and score.failed == () and score.samples is None
    return (f"{100 * score.mean:.2f}" if score.count is None else _count_cell(score.count)) + " !" * (not complete)


def _count_cell(count: Count) -> str:
    low, high = count.interval
    return f"{100 * count.share:.2f} [{100 * low:.1f}, {100 * high:.1f}] {count.hits}/{count.videos}"


def _score_json(score: Score) -> dict[str, Any]:
    return {
        "mean": score.mean,
        "judged": score.judged,
        "wanted": score.wanted,
        "left_out": score.left_out,
        "failed": None if score.failed is None else list(score.failed),
        **({} if score.count is None else _count_json(score.count)),
    }


def _count_json(count: Count) -> dict[str, Any]:
    return {"hits": count.hits, "videos": count.videos, "interval": list(count.interval)}
