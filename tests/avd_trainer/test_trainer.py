import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from avd_core import NonFiniteError
from avd_trainer.config import TrainConfig, load_config
from avd_trainer.data.codec import BlockDCTCodec
from avd_trainer.data.latents import CaptionedLatents
from avd_trainer.data.sources import load_clips
from avd_trainer.models import build_text_embedding, load_transformer
from avd_trainer.trainer import Trainer

MakeTrainer = Callable[..., Trainer]

DMD_ALONE = {"regression": None, "motion": None}


def weights(model: torch.nn.Module) -> Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])


def count_forwards(trainer: Trainer) -> Counter[tuple[str, bool]]:
    """Counts forwards by model and by whether they keep a graph."""
    counts: Counter[tuple[str, bool]] = Counter()
    for name in ("student", "teacher", "online"):

        def count(module: torch.nn.Module, inputs: Any, output: Any, name: str = name) -> None:
            counts[name, output[0].requires_grad] += 1

        getattr(trainer, name).register_forward_hook(count)
    return counts


def test_student_and_online_model_learn_and_the_teacher_does_not(make_trainer: MakeTrainer) -> None:
    trainer = make_trainer()
    before = {name: weights(getattr(trainer, name)).clone() for name in ("student", "teacher", "online")}
    trainer.train_step()
    assert torch.equal(weights(trainer.teacher), before["teacher"])
    assert not torch.equal(weights(trainer.student), before["student"])
    assert not torch.equal(weights(trainer.online), before["online"])


def test_all_models_start_from_the_teacher(make_trainer: MakeTrainer) -> None:
    trainer = make_trainer()
    assert torch.equal(weights(trainer.student), weights(trainer.teacher))
    assert torch.equal(weights(trainer.online), weights(trainer.teacher))


@pytest.mark.parametrize("online_updates", [1, 3])
def test_no_forward_is_run_whose_output_nobody_uses(make_trainer: MakeTrainer, online_updates: int) -> None:
    trainer = make_trainer(online_updates=online_updates, objective={"timesteps": [1000]})
    counts = count_forwards(trainer)
    trainer.train_step()
    # One few-step grid entry: each rollout is one forward. The generator's own sample serves the first online update.
    assert counts["student", True] == 1 + 1  # generated sample, real clips
    assert counts["student", False] == online_updates - 1
    assert counts["teacher", False] == 1  # both sides of the guidance in one batch
    assert counts["online", False] == 1
    assert counts["online", True] == online_updates
    assert counts["teacher", True] == 0


def test_without_regression_no_real_clip_is_run(make_trainer: MakeTrainer) -> None:
    trainer = make_trainer(objective={"timesteps": [1000], **DMD_ALONE})
    counts = count_forwards(trainer)
    metrics = trainer.train_step()
    assert counts["student", True] == 1
    assert not any(name.startswith(("regression", "motion", "balance")) for name in metrics)


def test_runs_with_and_without_our_terms_see_the_same_prompts_and_noise(make_trainer: MakeTrainer) -> None:
    first = {
        name: make_trainer(objective=objective).train_step() for name, objective in (("avd", {}), ("dmd", DMD_ALONE))
    }
    assert torch.equal(first["avd"]["matching/loss"], first["dmd"]["matching/loss"])
    assert not torch.equal(first["avd"]["gradient_norm"], first["dmd"]["gradient_norm"])


def test_a_seed_makes_a_run_reproducible(make_trainer: MakeTrainer) -> None:
    losses = {
        name: [metrics["loss"].item() for metrics in make_trainer(seed=seed).run()]
        for name, seed in (("first", 1), ("again", 1), ("other", 2))
    }
    assert losses["first"] == losses["again"]
    assert losses["first"] != losses["other"]


def test_a_held_gradient_ratio_reaches_the_update(make_trainer: MakeTrainer) -> None:
    """The held run's first gradient is that of a run whose constant weight is scaled by hand."""
    held = make_trainer(objective={"motion": None, "gradient_ratio": 0.5}, max_gradient_norm=1e6)
    scale = held.train_step()["balance/scale"].item()
    assert scale != pytest.approx(1.0, rel=0.05)
    by_hand = make_trainer(objective={"motion": None, "regression": {"weight": 2.0 * scale}}, max_gradient_norm=1e6)
    by_hand.train_step()
    for mine, other in zip(held.student.parameters(), by_hand.student.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, other.grad, rtol=1e-3, atol=1e-6)


def test_the_monitor_names_a_student_that_jitters(make_trainer: MakeTrainer, clips: CaptionedLatents) -> None:
    clips.latents.mul_(0.1)  # beside these, the samples of an untrained student are wild
    trainer = make_trainer(max_steps=120, online_updates=1, objective=DMD_ALONE)
    list(trainer.run())
    assert {"jitter", "oversaturated"} <= {finding.kind for finding in trainer.monitor.findings}


def test_a_cache_that_waits_for_its_update_gets_one_per_step(make_trainer: MakeTrainer) -> None:
    trainer = make_trainer(objective={"regression": {"auto_update": False}})
    trainer.train_step()
    assert trainer.objective is not None
    assert trainer.objective.regression is not None
    assert trainer.objective.regression.cache.seen.any()


def test_a_step_with_a_bad_clip_is_skipped_and_nothing_is_poisoned(make_trainer: MakeTrainer) -> None:
    trainer = make_trainer(max_steps=10)
    trainer.clips = CaptionedLatents(torch.full_like(trainer.clips.latents, torch.nan), trainer.clips.captions)
    before = weights(trainer.student).clone()
    trainer.train_step()
    assert torch.equal(weights(trainer.student), before)
    assert trainer.objective is not None
    assert trainer.objective.regression is not None
    assert not trainer.objective.regression.cache.seen.any()
    with trainer.ema.average_parameters():
        assert weights(trainer.student).isfinite().all()


def test_a_run_that_stays_non_finite_stops(make_trainer: MakeTrainer) -> None:
    trainer = make_trainer(max_steps=10, max_skipped_steps=3)
    trainer.clips = CaptionedLatents(torch.full_like(trainer.clips.latents, torch.nan), trainer.clips.captions)
    with pytest.raises(NonFiniteError, match=r"of the student is not finite.*3 in a row"):
        list(trainer.run())
    assert trainer.step == 3


def test_gradients_are_clipped(make_trainer: MakeTrainer) -> None:
    clipped, free = make_trainer(max_gradient_norm=1e-3), make_trainer(max_gradient_norm=1e6)
    assert clipped.train_step()["gradient_norm"] == free.train_step()["gradient_norm"] > 1e-3
    norms = [
        torch.cat([p.grad.flatten() for p in trainer.student.parameters() if p.grad is not None]).norm()
        for trainer in (clipped, free)
    ]
    assert norms[0] <= 1.01e-3 < norms[1]


def test_the_first_steps_of_the_tiny_preset_follow_the_golden_curve() -> None:
    """If these numbers change, so has the method: understand why, then rewrite the file from what is printed."""
    config = load_config(TrainConfig, "tiny", ["max_steps=4", "data.clips=16", "data.held_out=2"])
    teacher = load_transformer(config.teacher)
    clips = load_clips(config.data, BlockDCTCodec()).train
    trainer = Trainer(config, teacher, clips, build_text_embedding(teacher))
    names = ("loss", "matching/loss", "regression/loss", "motion/loss", "online/loss", "gradient_norm")
    curve = [{name: metrics[name].item() for name in names} for metrics in trainer.run()]
    print(json.dumps(curve, indent=1))
    golden = json.loads((Path(__file__).parents[1] / "assets" / "golden_tiny_first_steps.json").read_text())
    assert len(curve) == len(golden)
    for step, expected in zip(curve, golden, strict=True):
        assert step == pytest.approx(expected, rel=2e-3, abs=1e-5)
