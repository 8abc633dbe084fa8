"""Framing: which size a file's clips get, so that all clips of a data set have one."""

from __future__ import annotations

from collections.abc import Sequence

from pydantic import Field

from avd_trainer.data.preparation.stage import Done, FileStage, Limits, Row, Score


class FramingSettings(Limits):
    """Sizes of clips. Clips of several sizes become several data sets, since training reads one size at a time."""

    LOW_IS_GOOD = True

    sizes: tuple[tuple[int, int], ...] = Field(default=((480, 832),), min_length=1)
    """Heights and widths in pixels; a file's clips get the one whose shape is the nearest. Multiples of 16, or of 8 for
    the tiny preset's codec. Paper: 480 x 832 alone."""
    max: float | None = 0.35
    """Files of which more is cut off are left out: upright ones where there is no upright size."""


def cut_off(width: int, height: int, size: tuple[int, int]) -> float:
    """Share of a picture that is lost where it covers ``size``, height and width, and its centre is cut out."""
    aspect, target = width / height, size[1] / size[0]
    return 1 - min(aspect / target, target / aspect)


def nearest(width: int, height: int, sizes: Sequence[tuple[int, int]]) -> tuple[int, int]:
    """The size of which the least is cut off; of equal ones the first."""
    return min(sizes, key=lambda size: cut_off(width, height, size))


class Framing(FileStage[FramingSettings]):
    """The size of a file's clips: ``{"height": ..., "width": ...}``."""

    name = "framing"
    Settings = FramingSettings
    reads = ("probe",)
    score = Score("cut_off", "share of the picture that is cut off")

    def run(self, row: Row) -> Done:
        width, height = row.results["probe"]["width"], row.results["probe"]["height"]
        size = nearest(width, height, self.settings.sizes)
        return Done({"height": size[0], "width": size[1], "cut_off": cut_off(width, height, size)})


STAGE = Framing
