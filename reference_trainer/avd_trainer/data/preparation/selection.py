"""Which clips are kept, by the recorded scores alone: thresholds can change and nothing is decoded again."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from avd_trainer.data.preparation.journal import Journal, KnownFile
from avd_trainer.data.preparation.recipe import Chosen, Recipe
from avd_trainer.data.preparation.schedule import clip_id
from avd_trainer.data.preparation.stage import SPAN, ClipStage, Done, Outcome, Span
from avd_trainer.data.preparation.worker import HASHING

NOT_RUN = "has not run yet; the same `avd data prepare` goes on"


class Clip(NamedTuple):
    """A clip that a file has.

    Attributes:
        id: Its key in the journal.
        path: Of the file, relative to the folder of videos.
        sha256: Of the file.
        span: Which part of it.
        caption: Of the file, as ``Row.caption``.
        licence: Of the file.
    """

    id: str
    path: str
    sha256: str
    span: Span
    caption: str
    licence: str | None

    def key(self, chosen: Chosen) -> str:
        """Under which a stage's results for it are recorded."""
        return chosen.key(self.id if issubclass(chosen.stage, ClipStage) else self.sha256, self.caption)


class Dropped(NamedTuple):
    """Why a clip or a file is left out.

    Attributes:
        stage: That decided, or failed.
        reason: In words.
        scored: Whether its score decided; if not, it failed.
    """

    stage: str
    reason: str
    scored: bool = False


class Step(NamedTuple):
    """What a stage decided.

    Attributes:
        stage: Its name.
        came: Clips that earlier stages left.
        left: Clips that it left.
    """

    stage: str
    came: int
    left: int


class Selection(NamedTuple):
    """What is kept of all files.

    Attributes:
        clips: All clips by id, in order of id.
        dropped: Why clips are left out.
        files: Number of files.
        dropped_files: Why files have no clips, by path.
        steps: What each stage decided, in the recipe's order.
    """

    clips: Mapping[str, Clip]
    dropped: Mapping[str, Dropped]
    files: int
    dropped_files: Mapping[str, Dropped]
    steps: tuple[Step, ...]

    @property
    def kept(self) -> list[Clip]:
        """The clips that are kept, in order of id."""
        return [clip for clip in self.clips.values() if clip.id not in self.dropped]


def select(journal: Journal, recipe: Recipe, *, finished: bool) -> Selection:
    """Decide on all clips.

    Args:
        journal: With what stages found.
        recipe: With what decides.
        finished: Whether captions and latents count too: a clip for which they failed is left out.
    """
    dropped_files: dict[str, Dropped] = {}
    clips = {clip.id: clip for clip in sorted(_clips(journal, recipe, dropped_files))}
    files = sum(1 for _ in journal.files())
    scored = _go_on(Selection(clips, {}, files, dropped_files, ()), journal, recipe, survivors=False)
    return finish(scored, journal, recipe) if finished else scored


def finish(selection: Selection, journal: Journal, recipe: Recipe) -> Selection:
    """Count captions and latents, too, in a selection that was made without them."""
    return _go_on(selection, journal, recipe, survivors=True)


def _go_on(selection: Selection, journal: Journal, recipe: Recipe, *, survivors: bool) -> Selection:
    """What those stages leave that work on all clips, or on the kept ones alone."""
    dropped, steps = dict(selection.dropped), list(selection.steps)
    for chosen in recipe.stages.values():
        if chosen.stage.of_survivors == survivors:
            left = {id_: clip for id_, clip in selection.clips.items() if id_ not in dropped}
            dropped |= _decide(journal, chosen, left)
            steps.append(Step(chosen.stage.name, len(left), len(selection.clips) - len(dropped)))
    return selection._replace(dropped=dropped, steps=tuple(steps))


def _clips(journal: Journal, recipe: Recipe, dropped: dict[str, Dropped]) -> Iterator[Clip]:
    """The clips of all files; files without any go to ``dropped``."""
    of_files = list(recipe.of_files())
    found = {chosen.stage.name: dict(_outcomes(journal, chosen)) for chosen in of_files}
    first: dict[str, KnownFile] = {}
    # Of files with the same bytes, one whose licence is known is the first.
    for file in sorted(journal.files(), key=lambda file: (file.licence is None, file.path)):
        if file.sha256 is None:
            dropped[file.path] = Dropped(HASHING, file.failed or "")
            continue
        same = first.setdefault(file.sha256, file)
        if same.path != file.path:
            other = "" if same.licence == file.licence else f", whose licence is {same.licence}"
            dropped[file.path] = Dropped(HASHING, f"it has the same bytes as another file ({same.path}){other}")
            continue
        outcomes = {
            chosen.stage.name: found[chosen.stage.name].get(chosen.key(file.sha256, file.caption))
            for chosen in of_files
        }
        spans = outcomes[SPAN]
        if not isinstance(spans, Done):
            dropped[file.path] = _why_not(outcomes)
            continue
        for start, end in spans.values["clips"]:
            span = Span(start, end)
            yield Clip(clip_id(file.sha256, span), file.path, file.sha256, span, file.caption, file.licence)
        if not spans.values["clips"]:
            dropped[file.path] = Dropped(SPAN, "it has no clips")


def _why_not(outcomes: Mapping[str, Outcome | None]) -> Dropped:
    """The first stage of a file that did not end well."""
    for name, outcome in outcomes.items():
        if outcome is None:
            return Dropped(name, NOT_RUN)
        if not isinstance(outcome, Done):
            return Dropped(name, outcome.reason)
    raise AssertionError("a file whose clips are known")


def _decide(journal: Journal, chosen: Chosen, clips: Mapping[str, Clip]) -> dict[str, Dropped]:
    """The clips that a stage leaves out, of those that came to it."""
    name, score = chosen.stage.name, chosen.stage.score
    found = dict(_outcomes(journal, chosen))
    dropped: dict[str, Dropped] = {}
    scores: dict[str, Any] = {}
    for clip in clips.values():
        outcome = found.get(clip.key(chosen))
        if outcome is None:
            dropped[clip.id] = Dropped(name, NOT_RUN)
        elif not isinstance(outcome, Done):
            dropped[clip.id] = Dropped(name, outcome.reason)
        elif score is not None:
            scores[clip.id] = outcome.values[score.key]
    rejected = chosen.settings.reject(scores) if score is not None else {}
    return dropped | {clip: Dropped(name, reason, scored=True) for clip, reason in rejected.items()}


def _outcomes(journal: Journal, chosen: Chosen) -> Iterator[tuple[str, Outcome]]:
    return ((row, outcome) for row, outcome, _ in journal.outcomes(chosen.stage.name, chosen.digest))
