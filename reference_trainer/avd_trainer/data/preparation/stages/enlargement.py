"""Enlargement: finds files whose pictures are much smaller than the clips that are made of them."""

from __future__ import annotations

from avd_trainer.data.preparation.stage import Done, FileStage, Limits, Row, Score


def enlargement(size: tuple[int, int], clip: tuple[int, int]) -> float:
    """How many times as high and as wide a picture becomes where it is resized to cover a clip; below 1, it shrinks.

    Args:
        size: The picture's height and width.
        clip: The clip's.
    """
    return max(clip[0] / size[0], clip[1] / size[1])


class Enlargement(FileStage[Limits]):
    """How much a file's pictures are enlarged. What was enlarged before the file was written is not seen here, but by
    the stage ``detail``."""

    name = "enlargement"
    Settings = Limits
    reads = ("probe", "framing")
    score = Score("factor", "how many times as high and wide pictures are made")

    def run(self, row: Row) -> Done:
        probed, clip = row.results["probe"], row.results["framing"]
        return Done({"factor": enlargement((probed["height"], probed["width"]), (clip["height"], clip["width"]))})


STAGE = Enlargement
