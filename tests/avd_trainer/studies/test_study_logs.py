"""The benchmark that reads studies' logs: it knows which clips have a wrong caption, and what they are to a loss."""

import json
from pathlib import Path
from typing import Any

import pytest

import study_logs as benchmark
from avd_trainer.config.loading import load_config
from avd_trainer.models.transformer import load_transformer
from avd_trainer.runtime.files import write_json
from avd_trainer.runtime.ranks import Ranks
from avd_trainer.training.config import TrainConfig
from avd_trainer.training.run import train
from runs import MakeConfig, both, in_memory, order_of, ten_clips

MISFITS = 4
SEED = next(
    seed for seed in range(100) if [place < MISFITS for place in order_of("clips", seed=seed).batch(0, 2)] == [0, 1]
)
"""Of a run whose first batch is a clip with its own caption and one with another's."""


@pytest.fixture
def study(tmp_path: Path, make_config: MakeConfig, ranks: Ranks) -> Path:
    """A step of a run with right captions, and of one with wrong ones."""
    for variant, share in (("plain-right", None), ("plain", MISFITS / 10)):
        data = {"kind": "shapes", "clips": 10, "wrong_captions": share}
        config = make_config("avd", data=data, max_steps=1, seed=SEED)
        clips = both(in_memory(ten_clips().with_misfits(config.data.misfits)))
        train(config, benchmark.run_of(tmp_path, variant, SEED), ranks, data=clips)
    return tmp_path


def test_captions_are_wrong_where_a_run_has_read_wrong_ones(study: Path) -> None:
    config = benchmark.config_of(benchmark.run_of(study, "plain", SEED))
    assert benchmark.has_wrong_caption(config).tolist() == [[False, True]]
    benchmark.check_captions(study, SEED)


def test_a_run_of_other_captions_is_refused(study: Path) -> None:
    metrics = [benchmark.run_of(study, variant, SEED) / "metrics.jsonl" for variant in ("plain-right", "plain")]
    metrics[1].write_bytes(metrics[0].read_bytes())
    with pytest.raises(ValueError, match=r"wrong captions are expected at \[1\]"):
        benchmark.check_captions(study, SEED)


def test_shares_are_of_the_second_half(tmp_path: Path) -> None:
    data = "{clips: 4, wrong_captions: 0.5}"
    (tmp_path / "config.yaml").write_text(f"extends: tiny/avd\nmax_steps: 4\nbatch_size: 2\ndata: {data}\n")
    wrong = benchmark.has_wrong_caption(load_config(TrainConfig, str(tmp_path / "config.yaml"))).tolist()
    assert sum(map(sum, wrong[2:])) == 2  # an epoch
    steps: list[dict[str, Any]] = [
        {
            "step": step,
            "regression/weights": [0.5 if each else 2.0 for each in of_step],
            "regression/sample_losses": [3.0 if each else 0.25 for each in of_step] if step > 2 else [9.0, 9.0],
            "balance/gradient_ratio": 2.0,
            "balance/scale": step / 2,
        }
        for step, of_step in enumerate(wrong, 1)
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(step) + "\n" for step in steps))
    found = benchmark.wrong_captions(tmp_path)
    assert found.pop("spread_of_losses") == pytest.approx((4 / 3) ** 0.5 * 1.375)
    assert found == {
        "share_of_clips": 0.5,
        "share_of_weighted_loss": 0.75,
        "weight_over_that_of_others": 0.25,
        "loss": 3.0,
        "loss_of_others": 0.25,
    }
    assert benchmark.gradient_ratio(tmp_path) == {"mean_over_the_run": 2.5}


def test_clips_are_counted_in_which_a_shape_is_lost(tmp_path: Path) -> None:
    student = load_transformer("bundled:tiny")
    for variant in ("plain-right", "paper", "plain"):
        run = benchmark.run_of(tmp_path, variant, 1)
        run.mkdir(parents=True)
        (run / "config.yaml").write_text("extends: tiny/avd\n")
        if variant == "plain":  # draws nothing: its velocity is 0
            student.proj_out.weight.data.zero_()
            student.proj_out.bias.data.zero_()
        student.save_pretrained(run / "student")
    write_json(tmp_path / "study.json", {"evaluation": {"captions": 3, "batch_size": 2}})
    found = benchmark.clips_with_a_loss(tmp_path, seed=1)
    assert found["places"]["plain"] == [0, 1, 2]
    assert found["clips"]["plain-right"] < 3
