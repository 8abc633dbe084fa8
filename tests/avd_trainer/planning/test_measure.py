import pytest
import torch

from avd_trainer.models.transformer import build_transformer
from avd_trainer.planning.description import describe
from avd_trainer.planning.measure import measure_speed
from planned_runs import ADAPTERS, SMALL, SMALL_SHAPE, SMALL_TEXT, config


@pytest.mark.parametrize("changes", [{}, ADAPTERS], ids=["full", "adapters"])
def test_a_device_is_timed_at_the_runs_own_size(changes: dict[str, object]) -> None:
    own = config(batch_size=2, **changes)
    run = describe(own, dict(build_transformer(SMALL).config), SMALL_SHAPE, gpus=1, text_length=SMALL_TEXT[0])
    speed = measure_speed(run, torch.device("cpu"))
    # No CPU is slower than a million or faster than a thousand trillion operations a second.
    assert 1e6 < speed.forward < 1e15
    assert 1e6 < speed.training < 1e15
    assert speed.gpu == "cpu"
    assert speed.source.startswith("measured: 4 blocks")
