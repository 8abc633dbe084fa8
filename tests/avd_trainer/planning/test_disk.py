"""Bytes, against formulas and against what a trainer saves."""

from pathlib import Path
from typing import Any

import pytest
import torch

from avd_trainer.data.shard_writing import ShardWriter
from avd_trainer.planning.description import describe, find_architecture
from avd_trainer.planning.disk import most_checkpoints, plan_disk, vae_operations
from avd_trainer.runtime.ranks import Ranks
from avd_trainer.training.checkpoint import Checkpoints, list_checkpoints
from planned_runs import ADAPTERS, SMALL_SHAPE, SMALL_TEXT, config, described, nbytes, trainer_of


@pytest.mark.parametrize("changes", [{}, ADAPTERS], ids=["full", "adapters"])
def test_a_checkpoint_is_what_a_trainer_saves(small_teacher: str, ranks: Ranks, changes: dict[str, Any]) -> None:
    own = config(teacher=small_teacher, **changes)
    saved = trainer_of(own, ranks, SMALL_SHAPE, SMALL_TEXT).state_tensors()
    run = describe(own, find_architecture(small_teacher), SMALL_SHAPE, gpus=1, text_length=SMALL_TEXT[0])
    disk = plan_disk(run, 1)
    caches = nbytes(saved.pop("method").values())
    assert caches < 1000
    assert disk.checkpoint == sum(nbytes(tensors.values()) for tensors in saved.values())
    assert disk.product == nbytes(saved["ema"].values())


@pytest.mark.parametrize(
    ("steps", "checkpoint"),
    [
        (10, {"every": 2, "keep_latest": 2}),
        (10, {"every": 2, "keep_latest": 1, "keep_every": 4}),
        (9, {"every": 2, "keep_latest": 3, "keep_every": 3}),
        (3, {"every": 5, "keep_latest": 2}),
    ],
)
def test_there_are_never_more_checkpoints_than_planned(
    tmp_path: Path, ranks: Ranks, steps: int, checkpoint: dict[str, Any]
) -> None:
    every = checkpoint.pop("every")
    most = 0
    folder = Checkpoints(tmp_path, ranks, **checkpoint)
    for step in range(1, steps + 1):
        if step % every == 0 or step == steps:
            before = len(list_checkpoints(tmp_path))
            folder.save(step, {"student": {"weight": torch.zeros(1)}}, {})
            folder.wait()
            most = max(most, before + 1)
    run = described(max_steps=steps, checkpoint={"every": every, **checkpoint})
    assert most_checkpoints(run) == most


def test_clips_take_what_is_stored(tmp_path: Path) -> None:
    assert plan_disk(described(), 100).data == 0  # made when the run starts
    data = {"kind": "shards", "path": str(tmp_path / "clips")}
    planned = plan_disk(described(data=data, text_length=512), 100)
    assert (planned.latent, planned.text) == (2 * 16 * 3 * 32 * 32, 2 * 512 * 4096)
    assert planned.data == 100 * (planned.latent + planned.text)
    with ShardWriter(tmp_path / "clips", text_length=512, text_dim=4096) as writer:
        writer.set_unconditional(torch.zeros(1, 4096), "")
        for number in range(2):
            latent = torch.randn(16, 3, 32, 32).half()
            writer.add(latent, torch.randn(512, 4096).bfloat16(), f"clip {number}", "made")
    stored = plan_disk(described(data=data), 100)
    assert stored.encoding is None
    assert stored.data == pytest.approx(2 * (planned.latent + planned.text), rel=0.01)


def test_encoding_is_counted_group_by_group() -> None:
    one, two, three, five = (vae_operations((16, frames, 4, 6)) for frames in (1, 2, 3, 5))
    assert one < two < three
    assert five == three + 2 * (three - two)
    # The first layer alone: 3 x 3 x 3 taps from 3 channels to 96, at 9 frames of 32 x 48 pixels.
    assert three > 2 * 27 * 3 * 96 * 9 * 32 * 48
