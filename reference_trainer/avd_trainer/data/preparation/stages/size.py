"""Size: leaves out files whose pictures are small."""

from __future__ import annotations

from avd_trainer.data.preparation.stage import Done, FileStage, Limits, Row, Score


def lines(width: int, height: int) -> float:
    """Short side of the largest 16:9 picture that fits into one of this size, upright or not.

    At least 720 is the paper's "1280 x 720" of Sec. 6.2, for upright videos too.
    """
    return min(min(width, height), max(width, height) * 9 / 16)


class Size(FileStage[Limits]):
    """How large a file's pictures are."""

    name = "size"
    Settings = Limits
    reads = ("probe",)
    score = Score("lines", "short side of the largest 16:9 picture that fits into a frame, in pixels")

    def run(self, row: Row) -> Done:
        probed = row.results["probe"]
        return Done({"lines": lines(probed["width"], probed["height"])})


STAGE = Size
