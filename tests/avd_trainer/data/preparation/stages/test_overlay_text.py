import cv2
import numpy as np
import pytest

from avd_trainer.data.preparation.stage import ClipSettings, Done, Row
from avd_trainer.data.preparation.stages.overlay_text import OverlayText, OverlayTextSettings, text_share


def square(left: int, top: int, side: int) -> list[list[int]]:
    right, bottom = left + side - 1, top + side - 1
    return [[left, top], [right, top], [right, bottom], [left, bottom]]


@pytest.mark.parametrize(
    ("boxes", "pixels"),
    [
        ([], 0),
        ([square(2, 3, 10)], 100),
        ([square(2, 3, 10), square(20, 20, 5)], 125),
        ([square(2, 3, 10), square(2, 3, 10)], 100),  # one over another
        ([square(-5, 0, 10)], 50),  # beyond the edge
    ],
)
def test_boxes_count_by_what_they_cover(boxes: list[list[list[int]]], pixels: int) -> None:
    assert text_share(np.array(boxes, np.float32).reshape(-1, 4, 2), 40, 50) == pytest.approx(pixels / 2000)


def test_text_is_found_and_read(row: Row) -> None:
    """By the reader's own weights, which come with it."""
    stage = OverlayText(OverlayTextSettings(frames=2, short_side=96), ClipSettings())
    assert stage.missing() is None
    frames = np.full((2, 96, 170, 3), (40, 90, 60), np.uint8)
    cv2.putText(frames[1], "Subscribe", (10, 80), cv2.FONT_HERSHEY_SIMPLEX, 0.9, (255, 255, 255), 2)
    outcome = stage.run(row, frames)
    assert isinstance(outcome, Done)
    without, with_text = outcome.values["frames"]
    assert without == 0.0
    assert 0.1 < with_text < 0.5
    assert outcome.values["area"] == pytest.approx(with_text / 2)
    assert outcome.values["text"] == [[], ["Subscribe"]]
