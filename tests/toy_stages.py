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
    Failed,
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
            gpu = os.environ.get("CUDA_VISIBLE_DEVICES")
            start = "" if row is None or row.span is None else row.span.start
            file.write(f"{doing} {path.name} {start}{f' on GPU {gpu}' if gpu else ''}\n")
    where, _, what = path.stem.partition("-")
    if what == "slow":
        time.sleep(0.1)
    if where != doing or (row is not None and row.span is not None and row.span.start != 500):
        return
    if what == "hangs":
        time.sleep(60)
    elif what == "eats":
        eaten = []
        while True:
            eaten.append(np.ones(2**22))
    elif what == "changes" and not path.with_suffix(".done").exists():
        path.with_suffix(".done").touch()
        path.write_bytes(path.read_bytes() + b"more")
    elif what == "lingers":
        time.sleep(2.5)
    elif what == "borrows":
        borrowed = np.ones(2**26)  # half a gigabyte
        time.sleep(2.5)
        del borrowed
    elif what == "orphans":
        os.kill(os.getppid(), signal.SIGKILL)
        time.sleep(60)
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
    weights: Path | None = None
    """A file with the number of megabytes to load."""


class Brightness(ClipStage[BrightnessSettings]):
    """Mean of all values of some frames, in 0 to 255."""

    name = "brightness"
    Settings = BrightnessSettings
    score: ClassVar = Score("mean", "mean of all values, 0 to 255")

    def frames(self, row: Row) -> FrameRequest:
        return FrameRequest(self.settings.at, short_side=16)

    def load(self) -> None:
        if self.settings.weights is not None:
            self.weights = np.ones(int(self.settings.weights.read_text()) * 2**17)

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


class FramingSettings(StageSettings):
    sizes: tuple[tuple[int, int], ...] = ((8, 8), (8, 16))


class Framing(FileStage[FramingSettings]):
    """Files whose name says so are wide."""

    name = "framing"
    Settings = FramingSettings

    def run(self, row: Row) -> Outcome:
        height, width = self.settings.sizes["wide" in row.path.name]
        return Done({"height": height, "width": width})


class Caption(ClipStage[StageSettings]):
    """What the text file beside the file says, or else its name."""

    name = "caption"
    Settings = StageSettings
    of_survivors = True

    @classmethod
    def reads_caption(cls, settings: StageSettings) -> bool:
        return True

    def run(self, row: Row, frames: Frames) -> Outcome:
        befall(self.name, row.path, row)
        if "silent" in row.path.name and not Path(row.path.parent, "speak").exists():
            return Failed("the server does not answer", again=True)
        return Done({"caption": row.caption})


class ModelSettings(StageSettings):
    model: str = "tiny"
    negative_prompt: str | None = None


class Latents(ClipStage[ModelSettings]):
    """Arrays that say how bright a clip is."""

    name = "latents"
    Settings = ModelSettings
    reads = (Framing.name,)
    of_survivors = True
    makes_arrays = True

    def frames(self, row: Row) -> FrameRequest:
        size = row.results[Framing.name]
        return FrameRequest((0, 1), cover=(size["height"], size["width"]))

    def run(self, row: Row, frames: Frames) -> Outcome:
        befall(self.name, row.path, row)
        size = row.results[Framing.name]
        latent = np.full((16, 2, size["height"] // 4, size["width"] // 4), frames.mean(), dtype=np.float16)
        return Done(
            {"latent_space": "block-dct-4", "codec": None, "size": [size["height"], size["width"]]}, {"latent": latent}
        )


class Text(ClipStage[ModelSettings]):
    """One token."""

    name = "text"
    Settings = ModelSettings
    reads = (Caption.name,)
    of_survivors = True
    makes_arrays = True

    def run(self, row: Row, frames: Frames) -> Outcome:
        befall(self.name, row.path, row)
        length = len(row.results[Caption.name]["caption"])
        return Done({"length": 24, "dim": 32}, {"embedding": np.full((1, 32), length, dtype=np.float32)})


TOYS: dict[str, type[Stage[Any]]] = {
    stage.name: stage for stage in (ToySpan, Framing, Brightness, Contrast, Caption, Latents, Text)
}
"""By name, in the order of a recipe."""
