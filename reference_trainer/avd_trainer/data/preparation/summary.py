"""What a run came to, in a few lines: what was found, what was written, and what was left out, by reason."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from avd_trainer.data.decoding import UTF_8, FoundCaption, find_caption, name_as_caption
from avd_trainer.data.preparation.journal import Journal
from avd_trainer.data.preparation.recipe import Recipe
from avd_trainer.data.preparation.selection import Clip, Dropped, Selection
from avd_trainer.data.preparation.stage import SPAN, Done, Span
from avd_trainer.runtime.errors import UserError

LEFT_OUT = "left_out.json"
"""Beside encoded shards: every file and clip that was left out, with its reason."""
MOST_NAMES = 3
"""Names that stand beside a reason; the rest is counted."""
_PARTICULARS = re.compile(r"\s*\([^()]*\)")
_NUMBER = re.compile(r"(?<![\w.])-?\d+(?:\.\d+)?(?:e[+-]?\d+)?(?!\w)")


class LeftOut(NamedTuple):
    """Files or clips that were left out for one reason.

    Attributes:
        stage: That decided, or failed.
        reason: In words, without what differs among them in brackets; numbers that do are given as a range.
        names: Of all of them, in order.
    """

    stage: str
    reason: str
    names: tuple[str, ...]

    def __str__(self) -> str:
        return f"{len(self.names)} x {self.stage}: {self.reason}: {list_names(self.names)}"


class ShorterLength(NamedTuple):
    """A length of clips that fits files which are too short for the one that was asked for.

    Attributes:
        frames: Of a clip, ``1 + 4 n``.
        fits: Number of the files that it fits.
        short: Number of files that are too short.
    """

    frames: int
    fits: int
    short: int


class Advice(NamedTuple):
    """What to do about it, which depends on the command.

    Attributes:
        frames: How to choose the length of clips, with a place for the number.
        limits: How to leave out less.
    """

    frames: str
    limits: str


class Summary(NamedTuple):
    """What a run came to.

    Attributes:
        files: That were found.
        clips: That they have.
        kept: That were kept.
        without_clips: Files that gave no clip.
        dropped: Clips that were left out.
        shorter: For files that are too short; None if there are none, or no length fits.
        captions: What text files beside the videos said to this run, by the path of each video that gave a clip; None
            if captions are not from such files.
    """

    files: int
    clips: int
    kept: int
    without_clips: tuple[LeftOut, ...]
    dropped: tuple[LeftOut, ...]
    shorter: ShorterLength | None
    captions: Mapping[str, FoundCaption] | None

    def lines(self, advice: Advice) -> Iterator[str]:
        """The summary in words."""
        yield f"{self.files} files gave {self.clips} clips; {_total(self.without_clips)} files gave none."
        yield from self._reasons(advice)
        if self.dropped:
            yield f"{_total(self.dropped)} of {self.clips} clips were left out."
            yield from (f"  {each}" for each in self.dropped)
        if self.captions is not None:
            yield from _caption_lines(self.captions)
        yield f"{self.kept} of {self.clips} clips are kept."

    def expect_clips(self, advice: Advice) -> None:
        """See that something is kept.

        Raises:
            UserError: If not, with the reasons.
        """
        if self.kept:
            return
        listed = "\n".join([*self._reasons(advice), *(f"  {each}" for each in self.dropped)])
        raise UserError(f"No clip is left of {self.files} files and {self.clips} clips:\n{listed}\n{advice.limits}")

    def _reasons(self, advice: Advice) -> Iterator[str]:
        """Why files gave no clip."""
        yield from (f"  {each}" for each in self.without_clips)
        if self.shorter is not None:
            frames, fits, short = self.shorter
            yield f"  {advice.frames.format(frames)} would fit {fits} of the {short} files that are too short."


def summarise(journal: Journal, recipe: Recipe, selection: Selection, videos: Path) -> Summary:
    """Sum up what a journal and a selection say.

    Args:
        journal: Open.
        recipe: With which it was filled.
        selection: Made of them.
        videos: Folder of the files; how a text file was read is seen there, if it says what it said to the run.
    """
    meanings = {name: chosen.stage.score.meaning for name, chosen in recipe.stages.items() if chosen.stage.score}
    dropped = [(place_of(selection.clips[id_]), why) for id_, why in selection.dropped.items()]
    return Summary(
        files=selection.files,
        clips=len(selection.clips),
        kept=len(selection.kept),
        without_clips=_group(selection.dropped_files.items(), meanings),
        dropped=_group(dropped, meanings),
        shorter=_shorter(journal, recipe, [path for path, why in selection.dropped_files.items() if why.stage == SPAN]),
        captions=_captions(recipe, selection, videos),
    )


def list_names(names: tuple[str, ...]) -> str:
    """A few of some names, and how many more there are."""
    more = len(names) - MOST_NAMES
    return ", ".join(names[:MOST_NAMES]) + (f" and {more} more" if more > 0 else "")


def all_left_out(selection: Selection) -> dict[str, dict[str, str]]:
    """Everything that was left out, each with its own reason; JSON-able."""
    dropped = {place_of(selection.clips[id_]): why for id_, why in sorted(selection.dropped.items())}
    kinds = {"files": dict(sorted(selection.dropped_files.items())), "clips": dropped}
    return {
        kind: {name: f"{why.stage}: {why.reason}" for name, why in left_out.items()} for kind, left_out in kinds.items()
    }


def _total(groups: Iterable[LeftOut]) -> int:
    return sum(len(group.names) for group in groups)


def place_of(clip: Clip) -> str:
    """A clip's file and start, in words."""
    return f"{clip.path} at {clip.span.start / 1000:g} s"


def _group(left_out: Iterable[tuple[str, Dropped]], meanings: Mapping[str, str]) -> tuple[LeftOut, ...]:
    """By reason, the most frequent first. Reasons that differ in numbers, or in what stands in brackets, are one.
    Beside the numbers of a score stands its meaning, by stage."""
    groups: dict[tuple[str, bool, str], list[tuple[str, str]]] = {}
    for name, (stage, reason, scored) in left_out:
        kind = _NUMBER.sub("#", _PARTICULARS.sub("", reason))
        groups.setdefault((stage, scored, kind), []).append((name, reason))
    found = []
    for (stage, scored, _), members in groups.items():
        meaning = f" ({meanings[stage]})" if scored else ""
        reason = _common([reason for _, reason in members]) + meaning
        found.append(LeftOut(stage, reason, tuple(sorted(name for name, _ in members))))
    return tuple(sorted(found, key=lambda group: (-len(group.names), group.stage, group.reason)))


def _common(reasons: list[str]) -> str:
    """One sentence for several that differ in numbers, or in what stands in brackets, alone."""
    if len(set(reasons)) == 1:
        return reasons[0]
    reasons = [_PARTICULARS.sub("", reason) for reason in reasons]
    columns = zip(*(_NUMBER.findall(reason) for reason in reasons), strict=True)
    ranges = iter([(min(column, key=float), max(column, key=float)) for column in columns])

    def fill(_: re.Match[str]) -> str:
        low, high = next(ranges)
        return low if float(low) == float(high) else f"{low} to {high}"

    return _NUMBER.sub(fill, reasons[0])


def _shorter(journal: Journal, recipe: Recipe, short: list[str]) -> ShorterLength | None:
    if not short or "cut" not in recipe.stages:
        return None
    from avd_trainer.data.preparation.stages.span import SpanSettings, fitting_length, longest_scene

    settings: Any = recipe.stages[SPAN].settings
    assert isinstance(settings, SpanSettings)
    lengths = []
    for path in short:
        file = journal.file(path)
        assert file is not None
        assert file.sha256 is not None
        outcome = journal.outcome("cut", recipe.stages["cut"].digest, file.sha256)
        if isinstance(outcome, Done):
            scenes = [Span(*scene) for scene in outcome.values["scenes"]]
            lengths.append(longest_scene(scenes, recipe.head.clip, settings))
    frames = fitting_length(lengths) if lengths else None
    return None if frames is None else ShorterLength(frames, sum(held >= frames for held in lengths), len(lengths))


def _captions(recipe: Recipe, selection: Selection, videos: Path) -> dict[str, FoundCaption] | None:
    caption = recipe.stages.get("caption")
    if caption is None or getattr(caption.settings, "by", None) != "file":
        return None
    said = {clip.path: clip.caption for clip in selection.clips.values()}
    return {path: _found_caption(videos / path, said[path]) for path in sorted(said)}


def _found_caption(path: Path, said: str) -> FoundCaption:
    """What a video's caption was to the run: text files may have changed since, or be gone."""
    try:
        now = find_caption(path)
    except OSError:
        now = None
    if now is not None and now.text == said:
        return now
    return FoundCaption(said, None if said == name_as_caption(path) else path.with_suffix(".txt").name)


def _caption_lines(captions: Mapping[str, FoundCaption]) -> Iterator[str]:
    written = {path: found for path, found in captions.items() if found.file is not None}
    empty = tuple(path for path, found in written.items() if not found.text)
    named = len(captions) - len(written)
    yield f"Captions: {len(written) - len(empty)} of {len(captions)} files have a text, {named} only their names."
    if empty:
        yield f"  {len(empty)} with an empty text file, and so an empty caption: {list_names(empty)}"
    foreign: dict[str, list[str]] = {}
    for path, found in written.items():
        if found.encoding != UTF_8:
            foreign.setdefault(found.encoding, []).append(str(Path(path).with_suffix(".txt")))
    for encoding, files in sorted(foreign.items()):
        yield f"  {len(files)} text files are not in UTF-8, and were read as {encoding}: {list_names(tuple(files))}"
