import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from avd_trainer.data.preparation.stage import ClipSettings, Done, Row
from avd_trainer.data.preparation.stages.consistency import Consistency, ConsistencySettings, temporal_consistency
from tiny_image_models import SIDE


def by_hand(vectors: torch.Tensor) -> float:
    frames = [[float(x) for x in vector] for vector in vectors]

    def cosine(one: list[float], other: list[float]) -> float:
        product = sum(x * y for x, y in zip(one, other, strict=True))
        return max(0.0, product / math.sqrt(sum(x * x for x in one) * sum(y * y for y in other)))

    return sum((cosine(frames[i], frames[i - 1]) + cosine(frames[i], frames[0])) / 2 for i in range(1, len(frames))) / (
        len(frames) - 1
    )


def test_it_is_the_mean_cosine_to_the_frame_before_and_to_the_first() -> None:
    vectors = F.normalize(torch.randn(9, 5, generator=torch.Generator().manual_seed(0)), dim=-1)
    assert temporal_consistency(vectors) == pytest.approx(by_hand(vectors), abs=1e-6)


def test_known_answers() -> None:
    one, other = torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0])
    assert temporal_consistency(torch.stack([one, one, one])) == 1.0
    assert temporal_consistency(torch.stack([one, -one])) == 0.0  # no less than nothing
    assert temporal_consistency(torch.stack([one, other, other])) == 0.25  # once of four: the third to the second


def test_the_score_is_the_mean_of_both_models(clip_folder: Path, dino_folder: Path, row: Row) -> None:
    settings = ConsistencySettings(clip=str(clip_folder), dino=str(dino_folder), side=SIDE)
    stage = Consistency(settings, ClipSettings(frames=5))
    assert stage.missing() is None
    assert stage.frames(row) == ((0, 1, 2, 3, 4), None, (SIDE, SIDE))
    rng = np.random.default_rng(0)
    frames = rng.integers(0, 256, (5, SIDE, SIDE, 3), dtype=np.uint8)
    outcome = stage.run(row, frames)
    assert isinstance(outcome, Done)
    values = outcome.values
    assert 0 < values["clip"] < 1
    assert values["clip"] != values["dino"]
    assert values["consistency"] == pytest.approx((values["clip"] + values["dino"]) / 2)
    still = stage.run(row, frames[:1].repeat(5, axis=0))
    assert still.values["consistency"] == pytest.approx(1, abs=1e-5)


def test_weights_that_are_not_there_are_named(clip_folder: Path, tmp_path: Path) -> None:
    settings = ConsistencySettings(clip=str(clip_folder), dino=str(tmp_path))
    said = Consistency(settings, ClipSettings()).missing()
    assert said is not None
    assert "consistency.dino" in said
