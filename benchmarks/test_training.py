"""A whole update of the tiny preset, AVD beside DMD alone; and of Wan2.1-1.3B at full size where there is a GPU.

Run with ``make bench``. The tests on a GPU are skipped without one; benchmarks/train_step.py says more and writes its
figures down.
"""

from collections.abc import Iterator

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from avd_trainer.config.loading import load_config
from avd_trainer.data.sources import TrainingData, load_data
from avd_trainer.runtime.ranks import Ranks, join_ranks
from avd_trainer.training.config import TrainConfig
from avd_trainer.training.trainer import Trainer
from train_step import measure_update

UPDATES = {"update, DMD alone": "dmd", "update, AVD": "avd"}


@pytest.fixture
def ranks() -> Iterator[Ranks]:
    with join_ranks() as ranks:
        yield ranks


@pytest.fixture(scope="module")
def data() -> TrainingData:
    config = load_config(TrainConfig, "tiny", ["data.clips=32"])
    return load_data(config.data, None, teacher=config.teacher, architecture={"text_dim": 32, "in_channels": 16})


@pytest.mark.parametrize("name", UPDATES)
def test_tiny_update(benchmark: BenchmarkFixture, ranks: Ranks, data: TrainingData, name: str) -> None:
    benchmark.group = "one update of the tiny preset"
    # The same seed, so that both roll out equally far in each of their updates.
    config = load_config(TrainConfig, "tiny", ["max_steps=12"], method=UPDATES[name])
    steps = Trainer(config, data, ranks).run()
    benchmark.pedantic(lambda: next(steps), rounds=10, warmup_rounds=1)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.timeout(3600)
@pytest.mark.parametrize(("name", "lora", "card"), [("update of 1.3B, LoRA", True, 24), ("update of 1.3B", False, 80)])
def test_wan_update(benchmark: BenchmarkFixture, name: str, lora: bool, card: int) -> None:
    """The goals: within a card of that many GB, and 45% of the GPU's peak."""
    benchmark.group = "Wan2.1-1.3B, 832x480x81: loading and five updates"
    options = {"lora": lora, "size": "832x480x81", "small": False, "updates": 4}
    *_, report = benchmark.pedantic(lambda: list(measure_update("wan2.1-1.3b", **options)), rounds=1)
    benchmark.extra_info.update(report)
    assert report["peak_memory_gib"] <= card
    assert report["model_flops_utilisation"] >= 0.45
