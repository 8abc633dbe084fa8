import numpy as np
import pytest

from avd_trainer.data.preparation.stage import ClipSettings, Done, Row
from avd_trainer.data.preparation.stages.still import Still


def test_movement_is_the_deviation_over_time_as_a_share_of_the_range(row: Row) -> None:
    stage = Still(Still.Settings(), ClipSettings(frames=5))
    frames = np.zeros((5, 4, 4, 3), np.uint8)
    frames[:, :2] = np.array([0, 100, 0, 100, 50])[:, None, None, None]  # half of the picture moves
    outcome = stage.run(row, frames)
    assert isinstance(outcome, Done)
    assert outcome.values["movement"] == pytest.approx(0.5 * np.std([0, 100, 0, 100, 50]) / 255)


def test_what_only_the_compression_changes_stands_still(row: Row) -> None:
    stage = Still(Still.Settings(), ClipSettings())
    noisy = 100 + np.random.default_rng(0).integers(0, 2, (9, 32, 32, 3)) * (np.arange(32) == 0)[:, None]
    outcome = stage.run(row, noisy.astype(np.uint8))
    assert isinstance(outcome, Done)
    assert list(stage.settings.reject({"clip": outcome.values["movement"]})) == ["clip"]


def test_it_looks_at_a_few_frames_of_the_size_that_training_sees(row: Row) -> None:
    row = row._replace(results={"framing": {"height": 32, "width": 48}})
    request = Still(Still.Settings(), ClipSettings()).frames(row)
    assert request.indices == tuple(range(0, 81, 10))
    assert request.cover == (32, 48)
