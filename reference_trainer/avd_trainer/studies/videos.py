"""Videos on disk, of students or of anybody, measured by their pixels alone beside real ones."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

from rich.markup import escape
from rich.table import Table

from avd_trainer.data.video_sets import Form, VideoFile, read_clip
from avd_trainer.evaluation.controls import CONTROLS
from avd_trainer.evaluation.measure_table import Row, markdown_lines, with_interval, with_spread
from avd_trainer.evaluation.reference import LIMIT_SHARE, LIMIT_STDS, Spread
from avd_trainer.evaluation.video_measures import (
    LEAST_FRAMES,
    LEAST_SIDE,
    VIDEO_MEASURES,
    expect_opencv,
    video_measures,
)
from avd_trainer.evaluation.video_reference import LEAST_CLIPS, VIDEO_CONTROLS, RealVideos, Values, spoil
from avd_trainer.runtime.environment import environment
from avd_trainer.runtime.errors import UserError
from avd_trainer.runtime.files import write_json, write_text
from avd_trainer.runtime.progress import ProgressBar
from avd_trainer.studies.dots import save_panels
from avd_trainer.studies.statistics import LEAST_SEEDS, LEVEL, estimate
from avd_trainer.studies.students import FIGURE, REQUEST, RESULTS, TABLE


class JudgedSet(NamedTuple):
    """The clips of one set, or of one control.

    Attributes:
        row: Its title, and means with intervals.
        values: Of each clip, by name of the measure.
        files: The names of the clips' files, in the same order.
        distances: To real clips, by name of the measure; nothing without real clips.
        worse: The measures by which it is farther from real clips than they are from each other.
    """

    row: Row
    values: Values
    files: Sequence[str]
    distances: Mapping[str, float]
    worse: Sequence[str]


class JudgedVideos(NamedTuple):
    """Sets of videos, beside real ones where there are any.

    Attributes:
        form: What all were brought to.
        sets: In the order that was asked for.
        controls: Real clips that were spoiled, by name of the control; nothing without real clips.
        real: Real clips.
    """

    form: Form
    sets: Sequence[JudgedSet]
    controls: Mapping[str, JudgedSet]
    real: RealVideos | None

    @property
    def title(self) -> str:
        """What was measured."""
        return f"{' and '.join(each.row.title for each in self.sets)}: videos of {self.form}"


def judge_videos(
    sets: Mapping[str, Sequence[VideoFile]], reference: Sequence[VideoFile] | None, form: Form
) -> JudgedVideos:
    """Measure each clip of each set; of real ones also what they score when they are spoiled.

    Args:
        sets: Files, by title; one clip is in memory at a time.
        reference: Real clips; None measures without any to compare with.
        form: What all are brought to.

    Raises:
        UserError: If they cannot be measured (:func:`expect_measurable`), or one cannot be read.
    """
    expect_measurable(form, reference)
    measured: dict[str, list[dict[str, float]]] = {title: [] for title in sets}
    real_clips: list[dict[str, float]] = []
    spoiled: dict[str, list[dict[str, float]]] = {name: [] for name in VIDEO_CONTROLS}
    with ProgressBar("videos", sum(map(len, sets.values())) + len(reference or ())) as bar:
        for file in reference or ():
            clip = read_clip(file, form)
            real_clips.append(video_measures(clip))
            for name, own in spoiled.items():
                own.append(video_measures(spoil(clip, name)))
            bar.advance()
        for title, files in sets.items():
            for file in files:
                measured[title].append(video_measures(read_clip(file, form)))
                bar.advance()
    values = {title: _by_measure(clips) for title, clips in measured.items()}
    steps = {"temporal_rolloff": 1 / form.frames}  # frequencies of a clip of so many frames
    real = None if reference is None else RealVideos.of(_by_measure(real_clips), list(values.values()), steps)
    return JudgedVideos(
        form,
        [_judge(title, own, sets[title], real) for title, own in values.items()],
        {
            name: _judge(CONTROLS[name].title, _by_measure(own), reference or (), real)
            for name, own in spoiled.items()
            if own
        },
        real,
    )


def expect_measurable(form: Form, reference: Sequence[VideoFile] | None) -> None:
    """See that clips can be measured, before any is made or read.

    Args:
        form: What all are to be brought to.
        reference: Real clips, if there are any.

    Raises:
        UserError: If clips are too small or too short, real ones too few, or OpenCV is not installed.
    """
    expect_opencv()
    if form.frames < LEAST_FRAMES or min(form.width, form.height) < LEAST_SIDE:
        raise UserError(
            f"All clips can be brought to {form}, and at least {LEAST_FRAMES} frames of {LEAST_SIDE}x{LEAST_SIDE} are "
            "measured. Pass a larger --size, or take out the clips that are smaller or shorter."
        )
    if reference is not None and len(reference) < LEAST_CLIPS:
        raise UserError(
            f"--reference has {len(reference)} clips, and at least {LEAST_CLIPS} are needed to tell how real clips "
            "vary. Add some, or cut long ones into clips."
        )


def save_judged(judged: JudgedVideos, request: Mapping[str, Any], output: Path) -> None:
    """Write table, figure and values into a folder, with what was asked for."""
    results = results_of(judged)
    write_text(output / TABLE, render(judged))
    write_json(output / RESULTS, {**results, REQUEST: request})
    save_panels(output / FIGURE, results, VIDEO_MEASURES, "clips")


def render(judged: JudgedVideos) -> str:
    """The tables in Markdown, and below each how to read it."""
    real = judged.real
    rows = [
        *((each.row.title, each) for each in judged.sets),
        *((f"*{each.row.title}*", each) for each in judged.controls.values()),
    ]
    headings = [_plain(name) for name in VIDEO_MEASURES]
    means = [[title, *_cells(each)] for title, each in rows]
    counted = ", ".join(f"{each.row.title} {len(each.files)}" for each in judged.sets)
    parts = [f"# {judged.title}", f"Clips: {counted}."]
    if real is None:
        return "\n\n".join([*parts, markdown_lines(headings, means), _caption(judged)]) + "\n"
    distances = [
        [title, *(with_interval(Row("", each.distances), name) for name in VIDEO_MEASURES)] for title, each in rows
    ]
    parts += [
        markdown_lines(headings, [["real", *_real_cells(real.means)], *means]),
        _caption(judged),
        "## Distance to real clips",
        markdown_lines(headings, [["real", *_real_cells(real.distances)], *distances]),
        f"Wasserstein distance of single clips' values, in sets of {real.size}. real: halves of the real clips from "
        "each other.",
    ]
    return "\n\n".join(parts) + "\n"


def show(judged: JudgedVideos) -> Table:
    """For a terminal: a measure a line, without controls."""
    columns = {each.row.title: _cells(each) for each in judged.sets}
    if judged.real is not None:
        columns = {"real": _real_cells(judged.real.means), **columns}
    # Titles are names of folders: "[a]" is no style.
    table = Table(title=escape(judged.title), caption=_caption(judged), caption_justify="left")
    table.add_column("")
    for heading in columns:
        table.add_column(escape(heading), justify="right")
    for name, *cells in zip(VIDEO_MEASURES, *columns.values(), strict=True):
        table.add_row(_plain(name), *cells)
    return table


def results_of(judged: JudgedVideos) -> dict[str, Any]:
    """All of it as plain values, in the form of a study's ``results.json``, with clips in place of seeds."""
    real = judged.real
    return {
        "title": judged.title,
        "form": judged.form._asdict(),
        "reference": None
        if real is None
        else {
            "clips": real.clips,
            "size": real.size,
            "spreads": {name: asdict(each) for name, each in real.means.items()},
            "distances": {name: asdict(each) for name, each in real.distances.items()},
            "values": real.values,
        },
        "controls": {
            "controls": {name: each.row.values for name, each in judged.controls.items()},
            "distances": {name: each.distances for name, each in judged.controls.items()},
            "worse": {name: each.worse for name, each in judged.controls.items()},
        },
        "variants": {each.row.title: _variant(each) for each in judged.sets},
        "environment": environment(),
    }


def _variant(judged: JudgedSet) -> dict[str, Any]:
    none = (None, None)
    return {
        "title": judged.row.title,
        "measures": {
            name: {
                "mean": mean,
                "low": judged.row.intervals.get(name, none)[0],
                "high": judged.row.intervals.get(name, none)[1],
                "distance": judged.distances.get(name),
            }
            for name, mean in judged.row.values.items()
        },
        "worse": judged.worse,
        "seeds": {
            file: {"values": {name: each[place] for name, each in judged.values.items()}}
            for place, file in enumerate(judged.files)
        },
    }


def _judge(title: str, values: Values, files: Sequence[VideoFile], real: RealVideos | None) -> JudgedSet:
    found = {name: estimate(each) for name, each in values.items()}
    intervals = {
        name: (each.low, each.high) for name, each in found.items() if each.low is not None and each.high is not None
    }
    row = Row(title, {name: each.mean for name, each in found.items()}, intervals)
    distances = {} if real is None else real.distance(values)
    worse = [] if real is None else real.worse(distances)
    return JudgedSet(row, values, [str(file.path) for file in files], distances, worse)


def _cells(judged: JudgedSet) -> list[str]:
    return [with_interval(judged.row, name) + " !" * (name in judged.worse) for name in VIDEO_MEASURES]


def _real_cells(spreads: Mapping[str, Spread]) -> list[str]:
    return [with_spread(spreads[name]) for name in VIDEO_MEASURES]


def _plain(name: str) -> str:
    return name.replace("_", " ")


def _caption(judged: JudgedVideos) -> str:
    sentences = [
        f"Means over clips, with {LEVEL:.0%} intervals (bootstrap over clips) from {LEAST_SEEDS} clips on.",
        "Clips of one prompt are alike and count as independent, so with several of each the true intervals are wider.",
    ]
    if judged.real is not None:
        sentences += [
            f"real: mean ± standard deviation of sets of {judged.real.size} of {judged.real.clips} real clips.",
            f"!: farther from real clips than halves of them are from each other, by more than {LIMIT_STDS:.0f} "
            f"standard deviations, {LIMIT_SHARE:.0%} of the mean and, of the temporal roll-off, one frequency.",
        ]
    return "\n".join(sentences)


def _by_measure(clips: Sequence[Mapping[str, float]]) -> Values:
    return {name: [each[name] for each in clips] for name in VIDEO_MEASURES}
