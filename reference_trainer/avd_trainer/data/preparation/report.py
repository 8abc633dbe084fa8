"""What was kept of a folder of videos, and why the rest was not: one page with pictures, and all numbers as JSON."""

from __future__ import annotations

import base64
import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from importlib.resources import files
from itertools import groupby, pairwise
from pathlib import Path
from typing import Any, Literal

import numpy as np
from av.error import FFmpegError
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict

from avd_trainer.data.preparation.clip_reader import VideoReader
from avd_trainer.data.preparation.frames import spread
from avd_trainer.data.preparation.journal import Journal
from avd_trainer.data.preparation.prepare import RECIPE, SOURCE
from avd_trainer.data.preparation.recipe import Chosen, Recipe, load_recipe
from avd_trainer.data.preparation.selection import Clip, Selection, select
from avd_trainer.data.preparation.stage import ClipSettings, Done, FrameRequest, Limits
from avd_trainer.data.preparation.worker import DECODING
from avd_trainer.runtime.files import read_json, write_text

PAGE, NUMBERS = "report.html", "report.json"
BINS = 40
"""Bars of a histogram."""
SHOWN = 4
"""Clips of each kind that a stage shows, and pairs of neighbours on both sides of its limits."""
SHOWN_KEPT = 12
"""Kept clips that are shown."""
SHOWN_REASONS = 50
"""Reasons that files and failures are listed with; more are counted."""
WIDE_RANGE = 50
"""Times that the upper end of the scores is as large as the lower, from which on their axis is logarithmic."""
THUMBNAIL_FRAMES, THUMBNAIL_SIDE, THUMBNAIL_QUALITY = 3, 90, 75


CLIP_ID = re.compile(r"[0-9a-f]{16}-\d{9}-\d{9}")
"""Of clips that reasons name."""


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


class Histogram(_Part):
    """How a score spreads over the clips that came to its stage."""

    edges: tuple[float, ...]
    """Of the bars, one more than there are bars; scores beyond the ends count in the outer bars."""
    kept: tuple[int, ...]
    """Clips of each bar that the stage left."""
    left_out: tuple[int, ...]
    """Clips of each bar that it left out."""
    logarithmic: bool
    """Whether bars are equally wide in the logarithm."""
    limits: Mapping[str, float]
    """Scores at which the stage decides, each by what it is."""


class Example(_Part):
    """A clip that is shown."""

    clip: str
    """Its id."""
    score: float | None
    """If the stage has one."""
    verdict: Literal["left out", "kept"]
    """What the stage decided."""
    reason: str
    """Why it was left out; empty if it was not."""


class StageReport(_Part):
    """What a stage did."""

    name: str
    """As in the recipe."""
    meaning: str
    """What its score is; empty without one."""
    settings: Mapping[str, Any]
    """As in the recipe, with defaults."""
    came: int
    """Clips that earlier stages left; for a stage that decides on files, their clips."""
    left: int
    """Clips that this one left."""
    failed: Mapping[str, int]
    """Reasons for which it has no result for clips that came, each with the number of these clips."""
    rows: int
    """Files or clips that it has worked on."""
    seconds: float
    """That it took for them, on all processes together."""
    histogram: Histogram | None
    """If its score is a number."""
    left_out: tuple[Example, ...]
    """Clips that it left out, evenly spread over their scores."""
    borderline: tuple[Example, ...]
    """Clips whose scores lie next to where the decision changes, on both sides."""
    across: tuple[Example, ...]
    """If its score is a number and it left out nothing: clips evenly spread over their scores, to choose a limit by."""


class ClipReport(_Part):
    """What became of a clip."""

    id: str
    """Its key in the journal."""
    file: str
    """Relative to the folder of videos."""
    start: int
    """Milliseconds from the file's first frame."""
    end: int
    """The first millisecond behind it."""
    kept: bool
    """Whether it is in the training set."""
    stage: str | None
    """Which stage left it out."""
    reason: str | None
    """Why."""
    scores: Mapping[str, float]
    """By stage; of those that decide on a number."""
    caption: str | None
    """Of kept clips, if they have one."""


class Report(_Part):
    """All numbers of the report."""

    videos: str
    """Folder of the files."""
    files: int
    """Files that were found."""
    files_left_out: Mapping[str, int]
    """Reasons for which files gave no clip, each with the number of files; the stage's name stands before it."""
    clips: int
    """Clips of all files."""
    kept: int
    """Clips of the training set."""
    hours_kept: float
    """How long these are together."""
    stages: tuple[StageReport, ...]
    """In the recipe's order."""
    other_seconds: Mapping[str, float]
    """Seconds on all processes for what is no stage: decoding clips."""
    examples: tuple[Example, ...]
    """Kept clips, evenly spread."""
    recipe: str
    """The whole recipe, as YAML."""
    all_clips: tuple[ClipReport, ...]
    """In order of id."""


def write_report(
    folder: Path, overrides: Sequence[str] = (), on_picture: Callable[[], None] = lambda: None
) -> tuple[Report, Path]:
    """Write ``report.html`` (needs no other file) and ``report.json`` into the folder of prepared videos.

    Decodes three frames of each clip that is shown, and nothing else.

    Args:
        folder: Of the prepared videos.
        overrides: ``key=value`` on top of its recipe, to see what another threshold would keep.
        on_picture: Called for each clip that is shown.

    Returns:
        What the page shows, and the page.

    Raises:
        ConfigError: As :func:`load_recipe`.
        UserError: If there is no journal, or the files cannot be written.
    """
    with Journal(folder, write=False) as journal:
        recipe = load_recipe(folder / RECIPE, overrides)
        videos = Path(read_json(folder / SOURCE)["videos"])
        selection = select(journal, recipe, finished=_has_finished(journal, recipe))
        report = summarise(journal, recipe, selection, videos)
    write_text(folder / NUMBERS, report.model_dump_json(indent=1))
    shown = {example.clip for example in _all_examples(report)}
    pictures = draw_pictures([selection.clips[clip] for clip in sorted(shown)], videos, recipe.head.clip, on_picture)
    about = {clip.id: clip.model_dump(mode="json") for clip in report.all_clips if clip.id in shown}
    data = report.model_dump(mode="json", exclude={"all_clips"}) | {"about": about, "pictures": pictures}
    template = files("avd_trainer.data.preparation").joinpath(PAGE).read_text(encoding="utf-8")
    # Names of files and captions must not end the script that they stand in.
    write_text(folder / PAGE, template.replace("{{data}}", json.dumps(data).replace("<", "\\u003c")))
    return report, folder / PAGE


def summarise(journal: Journal, recipe: Recipe, selection: Selection, videos: Path) -> Report:
    """All numbers of the report, and which clips it shows."""
    scores = {name: _scores(journal, chosen, selection.clips) for name, chosen in recipe.stages.items()}
    steps = {step.stage: step for step in selection.steps}
    kept = selection.kept
    coming = list(selection.clips)
    stages = []
    for name, chosen in recipe.stages.items():
        dropped = {clip: words for clip in coming if (words := _why(selection, clip, name)) is not None}
        times = [seconds for _, _, seconds in journal.outcomes(name, chosen.digest)]
        of_coming = {clip: score for clip in coming if (score := scores[name].get(clip)) is not None}
        left_out = {clip: score for clip, score in of_coming.items() if clip in dropped}
        has_numbers = chosen.stage.score is not None and bool(of_coming)
        stages.append(
            StageReport(
                name=name,
                meaning=chosen.stage.score.meaning if chosen.stage.score else "",
                settings=chosen.settings.model_dump(mode="json"),
                came=steps[name].came if name in steps else len(coming),
                left=steps[name].left if name in steps else len(coming) - len(dropped),
                failed=_most_common(why for clip, why in dropped.items() if has_numbers and clip not in of_coming),
                rows=len(times),
                seconds=sum(times),
                histogram=_histogram(chosen, of_coming, left_out) if has_numbers else None,
                left_out=_examples(_spread_over(left_out or dropped), of_coming, dropped),
                borderline=_examples(_borderline(of_coming, left_out), of_coming, dropped),
                across=() if dropped else _examples(_spread_over(of_coming), of_coming, dropped),
            )
        )
        coming = [clip for clip in coming if clip not in dropped]
    decoding = sum(seconds for _, _, seconds in journal.outcomes(DECODING, ""))
    captions = _captions(journal, recipe, kept)
    return Report(
        videos=str(videos),
        files=selection.files,
        files_left_out=_most_common(f"{why.stage}: {why.reason}" for why in selection.dropped_files.values()),
        clips=len(selection.clips),
        kept=len(kept),
        hours_kept=len(kept) * recipe.head.clip.milliseconds / 3.6e6,
        stages=tuple(stages),
        other_seconds={DECODING: decoding},
        examples=_examples([kept[place].id for place in spread(len(kept), SHOWN_KEPT)], {}, {}),
        recipe=recipe.to_yaml(),
        all_clips=tuple(_clip_report(clip, selection, scores, captions) for clip in selection.clips.values()),
    )


def draw_pictures(
    clips: Sequence[Clip], videos: Path, clip_settings: ClipSettings, on_picture: Callable[[], None]
) -> dict[str, str]:
    """The first, middle and last part of each clip beside each other, as ``data:`` URLs of JPEG, by id.

    A clip that cannot be decoded, as where its file is no longer there, has none.
    """
    request = FrameRequest(spread(clip_settings.frames, THUMBNAIL_FRAMES), THUMBNAIL_SIDE)
    pictures = {}
    for path, of_file in groupby(sorted(clips, key=lambda clip: (clip.path, clip.span)), key=lambda clip: clip.path):
        with VideoReader(videos / path, clip_settings) as reader:
            for clip in of_file:
                try:
                    (frames,) = reader.read(clip.span, [request])
                    pictures[clip.id] = _data_url(np.concatenate(list(frames), axis=1))
                except (FFmpegError, OSError, ValueError):
                    pass
                on_picture()
    return pictures


def _has_finished(journal: Journal, recipe: Recipe) -> bool:
    """Whether anything was made for kept clips; before that, its lack is no reason to leave them out."""
    return any(
        next(journal.outcomes(chosen.stage.name, chosen.digest), None) is not None
        for chosen in recipe.of_clips(survivors=True)
    )


def _why(selection: Selection, clip: str, stage: str | None = None) -> str | None:
    """Why a clip was left out, by this stage if one is named; other clips are named by their files."""
    dropped = selection.dropped.get(clip)
    if dropped is None or stage not in (None, dropped.stage):
        return None

    def place(found: re.Match[str]) -> str:
        other = selection.clips.get(found[0])
        return f"{other.path} from {other.span.start / 1000:.1f} s" if other else found[0]

    return CLIP_ID.sub(place, dropped.reason)


def _scores(journal: Journal, chosen: Chosen, clips: Mapping[str, Clip]) -> dict[str, float]:
    """Scores of a stage that are numbers, by clip."""
    if chosen.stage.score is None:
        return {}
    key = chosen.stage.score.key
    found = {
        row: outcome.values[key]
        for row, outcome, _ in journal.outcomes(chosen.stage.name, chosen.digest)
        if isinstance(outcome, Done) and isinstance(outcome.values[key], int | float)
    }
    rows = {clip.id: clip.key(chosen) for clip in clips.values()}
    return {clip: float(found[row]) for clip, row in rows.items() if row in found}


def _captions(journal: Journal, recipe: Recipe, clips: Iterable[Clip]) -> dict[str, str]:
    if "caption" not in recipe.stages:
        return {}
    chosen = recipe.stages["caption"]
    found = ((clip.id, journal.outcome("caption", chosen.digest, clip.key(chosen))) for clip in clips)
    return {clip: outcome.values["caption"] for clip, outcome in found if isinstance(outcome, Done)}


def _clip_report(
    clip: Clip, selection: Selection, scores: Mapping[str, Mapping[str, float]], captions: Mapping[str, str]
) -> ClipReport:
    dropped = selection.dropped.get(clip.id)
    return ClipReport(
        id=clip.id,
        file=clip.path,
        start=clip.span.start,
        end=clip.span.end,
        kept=dropped is None,
        stage=dropped.stage if dropped else None,
        reason=_why(selection, clip.id),
        scores={stage: of_stage[clip.id] for stage, of_stage in scores.items() if clip.id in of_stage},
        caption=captions.get(clip.id),
    )


def _histogram(chosen: Chosen, scores: Mapping[str, float], left_out: Mapping[str, float]) -> Histogram:
    values = np.array([score for clip, score in scores.items() if clip not in left_out])
    others = np.array(list(left_out.values()))
    limits = {}
    if isinstance(chosen.settings, Limits):
        named = {"at least": chosen.settings.min, "at most": chosen.settings.max}
        limits = {words: limit for words, limit in named.items() if limit is not None}
        if chosen.settings.keep is not None and len(values):
            worst = values.max() if chosen.settings.LOW_IS_GOOD else values.min()
            limits[f"the best {chosen.settings.keep:.0%}"] = float(worst)
    edges, logarithmic = _edges(np.concatenate([values, others]), list(limits.values()))
    kept, out = (np.histogram(np.clip(part, edges[0], edges[-1]), edges)[0] for part in (values, others))
    return Histogram(
        edges=tuple(edges.tolist()),
        kept=tuple(kept.tolist()),
        left_out=tuple(out.tolist()),
        logarithmic=logarithmic,
        limits=limits,
    )


def _edges(values: NDArray[np.float64], limits: Sequence[float]) -> tuple[NDArray[np.float64], bool]:
    """Edges of bars, and whether they are equally wide in the logarithm.

    A few scores far beyond all others do not squeeze these into one bar: the outer bars take what lies beyond. Limits
    lie within the edges.
    """
    low, high = np.percentile(values, [0.5, 99.5])
    low, high = min([low, *limits]), max([high, *limits])
    positive = values[values > 0]
    if low >= 0 and len(positive):
        least = min([float(np.percentile(positive, 2)), *(limit for limit in limits if limit > 0)])
        if high > WIDE_RANGE * least:
            return np.geomspace(least, high, BINS + 1), True
    if low == high:
        low, high = low - 0.5, high + 0.5
    return np.linspace(low, high, BINS + 1), False


def _spread_over(scores: Mapping[str, Any]) -> list[str]:
    """A few clips, from the lowest score to the highest."""
    ranked = sorted(scores, key=lambda clip: (scores[clip], clip))
    if len(ranked) <= SHOWN:
        return ranked
    return [ranked[round(place)] for place in np.linspace(0, len(ranked) - 1, SHOWN)]


def _borderline(scores: Mapping[str, float], left_out: Mapping[str, float]) -> list[str]:
    """Neighbours in order of score, of which one is kept and the other is not, and their neighbours."""
    ranked = sorted(scores, key=lambda clip: (scores[clip], clip))
    turns = [
        place for place, (one, other) in enumerate(pairwise(ranked), 1) if (one in left_out) != (other in left_out)
    ]
    near = {
        place for turn in turns for place in range(turn - SHOWN // 2, turn + SHOWN // 2) if 0 <= place < len(ranked)
    }
    return [ranked[place] for place in sorted(near)][: 2 * SHOWN]


def _examples(clips: Iterable[str], scores: Mapping[str, float], dropped: Mapping[str, str]) -> tuple[Example, ...]:
    return tuple(
        Example(
            clip=clip,
            score=scores.get(clip),
            verdict="left out" if clip in dropped else "kept",
            reason=dropped.get(clip, ""),
        )
        for clip in clips
    )


def _all_examples(report: Report) -> Iterable[Example]:
    yield from report.examples
    for stage in report.stages:
        yield from stage.left_out
        yield from stage.borderline
        yield from stage.across


def _most_common(reasons: Iterable[str]) -> dict[str, int]:
    counted = Counter(reasons)
    shown = dict(sorted(counted.items(), key=lambda each: (-each[1], each[0]))[:SHOWN_REASONS])
    if len(counted) > len(shown):
        shown[f"{len(counted) - len(shown)} other reasons"] = sum(counted.values()) - sum(shown.values())
    return shown


def _data_url(picture: NDArray[np.uint8]) -> str:
    import cv2

    written, jpeg = cv2.imencode(".jpg", picture[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, THUMBNAIL_QUALITY])
    assert written
    return f"data:image/jpeg;base64,{base64.b64encode(jpeg.tobytes()).decode()}"
