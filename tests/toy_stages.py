"""Stages and a reader of clips that need neither videos nor weights. In a file that other processes can import.

What the name of a file says becomes of it: ``decoding-SIGSEGV.mp4``, ``brightness-hangs.mp4``, ``contrast-eats.mp4``.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, ClassVar, Self

import numpy as np
from pydantic import Field

from avd_trainer.data.preparation.stage import (
    SPAN,
    ClipSettings,
    ClipStage,
    Done,
    FileStage,
    FrameRequest,
    Frames,
    Limits,
    Outcome,
    Row,
    Score,
    Span,
    Stage,
    StageSettings,
)

RUNS = "TOY_RUNS"
"""Variable of the environment that names a file, to which each stage that runs adds a line."""


def befall(doing: str, path: Path, row: Row | None = None) -> None:
    """Do what the file's name says, and note that this was begun."""
    if (runs := os.environ.get(RUNS)) is not None:
        with open(runs, "a") as file:
            file.write(f"{doing} {path.name} {'' if row is None or row.span is None else row.span.start}\n")
    where, _, what = path.stem.partition("-")
    if where != doing or (row is not None and row.span is not None and row.span.start != 500):
        return
    if what == "hangs":
        time.sleep(60)
    elif what == "eats":
        eaten = []
        while True:
            eaten.append(np.ones(2**22))
    elif what == "raises":
        raise ValueError("it is odd")
    elif what.startswith("SIG"):
        os.kill(os.getpid(), signal.Signals[what])


class ToyReader:
    """Frames of 4 x 4 pixels, as bright as the file is large and the clip is late."""

    def __init__(self, path: Path, clip: ClipSettings, on_frame: Callable[[], None]) -> None:
        self._path = path

    def read(self, span: Span, requests: Sequence[FrameRequest]) -> list[Frames]:
        befall("decoding", self._path, Row("", self._path, "", span, {}))
        bright = (self._path.stat().st_size + span.start // 100) % 256
        return [np.full((len(request.indices), 4, 4, 3), bright, dtype=np.uint8) for request in requests]

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        pass


class ToySpanSettings(StageSettings):
    clips: int = Field(default=3, ge=0)


class ToySpan(FileStage[ToySpanSettings]):
    """A few clips of half a second each, whatever the file holds."""

    name = SPAN
    Settings = ToySpanSettings

    def run(self, row: Row) -> Outcome:
        befall(SPAN, row.path)
        return Done({"clips": [[500 * number, 500 * number + 500] for number in range(self.settings.clips)]})


class BrightnessSettings(Limits):
    at: tuple[int, ...] = (0, 2)


class Brightness(ClipStage[BrightnessSettings]):
    """Mean of all values of some frames, in 0 to 255."""

    name = "brightness"
    Settings = BrightnessSettings
    score: ClassVar = Score("mean", "mean of all values, 0 to 255")

    def frames(self, row: Row) -> FrameRequest:
        return FrameRequest(self.settings.at, short_side=16)

    def run(self, row: Row, frames: Frames) -> Outcome:
        befall(self.name, row.path, row)
        return Done({"mean": float(np.mean(frames))})


class ContrastSettings(Limits):
    gain: float = 1.0


class Contrast(ClipStage[ContrastSettings]):
    """A stage that reads another one and no frames."""

    name = "contrast"
    Settings = ContrastSettings
    reads = (Brightness.name,)
    score: ClassVar = Score("value", "gain times distance of the brightness from grey")

    def run(self, row: Row, frames: Frames) -> Outcome:
        assert not frames.size
        befall(self.name, row.path, row)
        return Done({"value": self.settings.gain * abs(row.results[Brightness.name]["mean"] - 127.5)})


class Sketch(ClipStage[StageSettings]):
    """A stage of survivors that makes arrays."""

    name = "sketch"
    Settings = StageSettings
    reads = (Brightness.name,)
    of_survivors = True

    def frames(self, row: Row) -> FrameRequest:
        return FrameRequest((0,), cover=(4, 4))

    def run(self, row: Row, frames: Frames) -> Outcome:
        befall(self.name, row.path, row)
        return Done({"shape": list(frames.shape)}, {"pixels": frames})


TOYS: dict[str, type[Stage[Any]]] = {stage.name: stage for stage in (ToySpan, Brightness, Contrast, Sketch)}
"""By name, in the order of a recipe."""
