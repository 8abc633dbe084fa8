"""What a stage of data preparation is: one input row to one output row, and nothing about the engine that runs it.

A row is a file, or a clip of one. A stage measures or makes something for one row and returns it as a value; so does it
return what went wrong. It decides nothing: scores are recorded first, and ``StageSettings.reject`` decides on the
recorded scores of all clips later, which decodes nothing again.

A stage is one file in ``stages/``, which ends in ``STAGE = TheClass``. Importing it has to be quick: numpy and pydantic
at the top, everything heavier inside the functions that need it.
"""

from __future__ import annotations

import hashlib
import json
import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Generic, NamedTuple, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from avd_trainer.config.sections import Section

if TYPE_CHECKING:
    from avd_trainer.data.preparation.open_video import OpenVideo

SPAN = "span"
"""Name of the file stage that says which clips a file has: ``{"clips": [[start, end], ...]}`` in milliseconds."""

Values = Mapping[str, Any]
"""Results of a stage for one row: what JSON can hold, all numbers finite. No clock: two runs record the same."""
Array = NDArray[Any]
Frames = NDArray[np.uint8]
"""``[F, H, W, 3]``, RGB."""


class ClipSettings(Section):
    """The clips that training sees."""

    frames: int = Field(default=81, ge=2)
    """Frames of a clip. Wan2.1 and the paper: 81, which is ``1 + 4 n`` as its VAE needs it."""
    fps: float = Field(default=16.0, gt=0)
    """Frames per second. Wan2.1 and the paper: 16, so a clip is 81 / 16 = 5.06 s long."""

    @property
    def milliseconds(self) -> int:
        """How long a clip is on screen."""
        return round(1000 * self.frames / self.fps)


class Span(NamedTuple):
    """A part of a file.

    Attributes:
        start: In milliseconds from the first frame.
        end: The first millisecond behind it.
    """

    start: int
    end: int


class Row(NamedTuple):
    """What a stage works on.

    Attributes:
        id: Key of everything that is recorded about it: SHA-256 of the file; for a clip, its start, and its span.
        path: The file.
        sha256: Of the file's bytes, in hex.
        span: Which part of the file; None for the whole file.
        results: What the stages recorded that this one ``reads``, by name.
        caption: What the text file beside the file says, or else the file's name.
    """

    id: str
    path: Path
    sha256: str
    span: Span | None
    results: Mapping[str, Values]
    caption: str = ""


class FrameRequest(NamedTuple):
    """Frames of a clip that a stage wants to see. A clip is decoded once for all stages together.

    Attributes:
        indices: Which of the clip's frames, from 0, at ``ClipSettings.fps``; ascending.
        short_side: Resize to this height or width, whichever is less, in pixels; the aspect ratio stays.
        cover: Resize to cover this height and width, and cut out the centre. With neither, frames keep their size.
    """

    indices: tuple[int, ...]
    short_side: int | None = None
    cover: tuple[int, int] | None = None


class Done(NamedTuple):
    """What a stage found.

    Attributes:
        values: Goes into the journal.
        arrays: What is too large for it, such as a latent; kept in a file. Of stages that ``makes_arrays`` alone.
    """

    values: Values
    arrays: Mapping[str, Array] = {}


class Failed(NamedTuple):
    """Why there is no result; a row without a result of a stage is never selected.

    Attributes:
        reason: What was expected, what came; one sentence or more.
        again: Whether the same command is to try again, as where a server did not answer.
        limit: Setting that ended it, and its value then: ``("time_limit", 120.0)``. It is tried again where that is
            higher now.
    """

    reason: str
    again: bool = False
    limit: tuple[str, float] | None = None


Outcome = Done | Failed


class StageSettings(Section):
    """Settings of a stage, and how its recorded scores decide.

    A subclass adds fields. Those that only decide, and change no result, are named in ``DECIDES``: a change of them
    runs nothing again.
    """

    DECIDES: ClassVar[frozenset[str]] = frozenset({"time_limit"})

    time_limit: float = Field(default=120.0, gt=0)
    """Seconds for one row; what takes longer is ended, recorded as failed, and does not stop the rest."""

    def reject(self, scores: Mapping[str, Any]) -> dict[str, str]:
        """Decide on all clips that earlier stages left.

        Args:
            scores: ``Values[Stage.score.key]`` by clip id. The answer may depend on all of them, not on their order.

        Returns:
            Ids of the clips to leave out, each with the reason in words.
        """
        return {}


class Limits(StageSettings):
    """Settings of a stage whose score is a number: fixed limits first, then a share of what they leave."""

    DECIDES = StageSettings.DECIDES | {"min", "max", "keep"}
    LOW_IS_GOOD: ClassVar[bool] = False
    """Whether ``keep`` keeps the lowest scores, as where a score says how much is wrong."""

    min: float | None = None
    """Clips below it are left out."""
    max: float | None = None
    """Clips above it are left out."""
    keep: float | None = Field(default=None, gt=0, le=1)
    """Share to keep of the clips that earlier stages and these limits left, those with the best scores: 0.5 is the
    better half. Of equal scores the lesser id wins."""

    def reject(self, scores: Mapping[str, float]) -> dict[str, str]:
        rejected = {}
        for clip, score in scores.items():
            if self.min is not None and score < self.min:
                rejected[clip] = f"{score:.4g} is below {self.min:g}"
            elif self.max is not None and score > self.max:
                rejected[clip] = f"{score:.4g} is above {self.max:g}"
        if self.keep is not None:
            sign = 1 if self.LOW_IS_GOOD else -1
            ranked = sorted(scores.keys() - rejected.keys(), key=lambda clip: (sign * scores[clip], clip))
            kept = math.ceil(round(self.keep * len(ranked), 6))  # 0.1 of 30 is 3, whatever a float makes of it
            for place, clip in enumerate(ranked[kept:], kept + 1):
                rejected[clip] = (
                    f"{scores[clip]:.4g} is number {place} of {len(ranked)}, the best {self.keep:.0%} are kept"
                )
        return rejected


class Score(NamedTuple):
    """The number, or other value, that a stage's settings decide on.

    Attributes:
        key: Of ``Values``.
        meaning: What it is, with its unit, for the report.
    """

    key: str
    meaning: str


S_co = TypeVar("S_co", bound=StageSettings, covariant=True)


class Stage(ABC, Generic[S_co]):
    """One step of the preparation. Build :class:`FileStage`, :class:`ScanStage` or :class:`ClipStage`.

    One object serves many rows, one after another, in one process. :meth:`load` is called before the first.

    Attributes:
        name: That of its file, and of its section in a recipe.
        version: Raise it when the same settings give other results: everything is then run again.
        Settings: Class of its section.
        reads: Names of the stages whose results it needs.
        score: What ``Settings.reject`` decides on, if it does.
        of_survivors: Run it only for clips that the selection keeps, as captions and latents are.
        makes_arrays: Whether its outcomes have arrays; where their file is gone, it runs again.
        gpu: Whether it wants a GPU where there is one, whatever its settings; see :meth:`wants_gpu`.
        reads_clip: Whether its results depend on :class:`ClipSettings`.
    """

    name: ClassVar[str]
    version: ClassVar[int] = 1
    Settings: ClassVar[type[StageSettings]]
    reads: ClassVar[tuple[str, ...]] = ()
    score: ClassVar[Score | None] = None
    of_survivors: ClassVar[bool] = False
    makes_arrays: ClassVar[bool] = False
    gpu: ClassVar[bool] = False
    reads_clip: ClassVar[bool]

    def __init__(self, settings: S_co, clip: ClipSettings) -> None:
        self.settings, self.clip = settings, clip

    @classmethod
    def wants_gpu(cls, settings: StageSettings) -> bool:
        """Whether it wants a GPU where there is one, with these settings."""
        return cls.gpu

    @classmethod
    def reads_caption(cls, settings: StageSettings) -> bool:
        """Whether its results depend on ``Row.caption``, with these settings."""
        return False

    def load(self) -> None:
        """Load weights. Their memory does not count as that of a row, and what is raised here is no row's fault: it
        stops the run, which goes on where it was once the cause is mended."""
        return

    def missing(self) -> str | None:
        """What is not at hand, such as weights or a package, and how to get it; None if all is there.

        Asked once before anything runs, so it has to be quick: it looks for files and loads none.
        """
        return None


class FileStage(Stage[S_co]):
    """A stage of whole files that needs no look into them: what other stages found is enough."""

    reads_clip = False

    @abstractmethod
    def run(self, row: Row) -> Outcome:
        """Work on one file. An error that it raises is recorded as :class:`Failed`, in the error's words."""

    def clips_ahead(self, start: int, first: bool) -> Iterator[Span]:
        """Of the stage :data:`SPAN`: which clips a scene would give if it never ended, in order of time.

        They are known before the stage runs, so that frames of theirs are kept while the file is decoded for a
        :class:`ScanStage`. What is not known, or turns out otherwise, is decoded again; that is right, and slower.

        Args:
            start: Of the scene, in milliseconds.
            first: Whether the file begins with it.
        """
        return iter(())


class Scan(Protocol):
    """A file, opened once for all :class:`ScanStage`, and decoded once for them and the clips that its scenes give."""

    def open(self) -> OpenVideo:
        """The file and its first frame, for what it says about itself; :meth:`frames` goes on from there."""

    def frames(self, short_side: int) -> Iterator[tuple[int, NDArray[np.uint8]]]:
        """Times in milliseconds from the first frame and ``[H, W, 3]`` RGB of all frames, in order.

        Args:
            short_side: Height or width that they get, whichever is less, in pixels; roughly resized.
        """

    def begin_scene(self, start: int) -> None:
        """Tell that a scene was found to begin, in milliseconds from the first frame; the first one does by itself."""


class ScanStage(Stage[S_co]):
    """A stage of whole files that looks into them: at their first frame, or at all."""

    reads_clip = False

    @abstractmethod
    def run(self, row: Row, scan: Scan) -> Outcome:
        """Work on one file. An error that it raises is recorded as :class:`Failed`, in the error's words."""


class ClipStage(Stage[S_co]):
    """A stage of clips; it reads results of stages of both kinds."""

    reads_clip = True

    def frames(self, row: Row) -> FrameRequest | None:
        """Which frames of a clip it needs; None for none."""
        return None

    @abstractmethod
    def run(self, row: Row, frames: Frames) -> Outcome:
        """Work on one clip.

        Args:
            row: The clip.
            frames: Those asked for, ``[F, H, W, 3]`` RGB uint8; ``[0, 0, 0, 3]`` if none were. Not to be written to:
                stages that ask for the same share them.

        Returns:
            Values, or why there are none. An error that it raises is recorded as :class:`Failed`, in the error's words.
        """


def digest(
    stage: type[Stage[StageSettings]], settings: StageSettings, clip: ClipSettings, read: Mapping[str, str]
) -> str:
    """Key of results: changes with all that they depend on, and with nothing else.

    Args:
        stage: Whose results.
        settings: Its settings; those that only decide do not count.
        clip: Counts if the stage ``reads_clip``.
        read: Digests of the stages that it reads, by name.

    Returns:
        16 hex digits.
    """
    of = {
        "stage": stage.name,
        "version": stage.version,
        "settings": settings.model_dump(mode="json", exclude=set(settings.DECIDES)),
        "clip": clip.model_dump(mode="json") if stage.reads_clip else None,
        "reads": {name: read[name] for name in sorted(stage.reads)},
    }
    return hashlib.sha256(json.dumps(of, sort_keys=True).encode()).hexdigest()[:16]
