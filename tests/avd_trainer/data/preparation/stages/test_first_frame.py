import numpy as np
import pytest

from avd_trainer.data.preparation.stage import ClipSettings, Done, Failed, Row
from avd_trainer.data.preparation.stages.first_frame import FirstFrame

CLIP = ClipSettings(frames=17)


@pytest.fixture
def stage() -> FirstFrame:
    return FirstFrame(FirstFrame.Settings(model="tiny"), CLIP)


def test_it_looks_at_the_first_frame_at_the_size_that_training_sees(row: Row, stage: FirstFrame) -> None:
    request = stage.frames(row._replace(results={"framing": {"height": 32, "width": 48}}))
    assert request.indices == (0,)
    assert request.cover == (32, 48)
    assert stage.missing() is None


def test_the_latents_are_of_the_frame_followed_by_grey(row: Row, stage: FirstFrame) -> None:
    pictures = np.random.default_rng(0).integers(0, 256, (2, 1, 32, 48, 3), dtype=np.uint8)
    one, other = (stage.run(row, frames) for frames in pictures)
    assert isinstance(one, Done)
    assert isinstance(other, Done)
    assert one.values == {"tokens": 0, "dim": 0}  # the tiny preset has no image encoder
    assert set(one.arrays) == {"image_latent"}
    latents = one.arrays["image_latent"], other.arrays["image_latent"]
    assert latents[0].dtype == np.float16
    assert latents[0].shape == (16, 5, 8, 12)
    assert not np.array_equal(latents[0][:, 0], latents[1][:, 0])
    np.testing.assert_array_equal(latents[0][:, 1:], latents[1][:, 1:])


def test_what_is_not_finite_is_a_failure(row: Row, stage: FirstFrame, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    stage.load()
    monkeypatch.setattr(stage._codec, "encode", lambda video: torch.full((1, 16, 5, 8, 8), torch.nan))
    outcome = stage.run(row, np.zeros((1, 32, 32, 3), np.uint8))
    assert isinstance(outcome, Failed)
    assert "NaN or infinity" in outcome.reason
