"""FastVideo's training entry point with the lines of docs/hosts/fastvideo.md, against a calculation by hand."""

import json
import math
import multiprocessing
import os
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor

from avd_integrations.fastvideo import avd_config, dmd2_class
from by_hand import shifted
from fastvideo_tiny import (
    BATCH,
    CHANNELS,
    FRAMES,
    MEAN,
    SIDE,
    STD,
    Clips,
    DMD2Method,
    History,
    TinyWan,
    run_training_from_config,
)
from page_lines import MOST_LINES, code_blocks
from references import ReferenceCache, mean, reference_motion, reference_sample_losses, reference_weights
from without_gpu import free_port

LINES = code_blocks("fastvideo.md", "yaml")[0]
assert len(LINES.splitlines()) <= MOST_LINES
SHIFT = 5.0


def configuration(
    folder: Path,
    steps: int = 4,
    world: int = 1,
    method: dict[str, Any] | None = None,
    accumulation: int = 1,
    lines: str | None = LINES,
    **checkpoint: Any,
) -> str:
    model = {"_target_": "fastvideo_tiny.TinyWan", "init_from": "Wan-AI/Wan2.1-T2V-1.3B-Diffusers", "flow_shift": SHIFT}
    own = {
        "_target_": "fastvideo.train.methods.distribution_matching.dmd2.DMD2Method",
        "rollout_mode": "data_latent",
        "generator_update_interval": 1,
        "real_score_guidance_scale": 3.0,
        "dmd_denoising_steps": [1000, 750, 500, 250],
        "cfg_uncond": {"text": "zero"},
        "fake_score_learning_rate": 1.0e-3,
        "fake_score_betas": [0.0, 0.999],
        "fake_score_lr_scheduler": "constant",
    }
    config = {
        "models": {
            "student": {**model, "trainable": True},
            "teacher": {**model, "trainable": False},
            "critic": {**model, "trainable": True},
        },
        "method": {**own, **(yaml.safe_load(lines)["method"] if lines else {}), **(method or {})},
        "training": {
            "distributed": {"num_gpus": world, "sp_size": 1, "tp_size": 1},
            "data": {"seed": 7, "num_latent_t": FRAMES, "num_height": 8 * SIDE, "num_width": 8 * SIDE},
            "optimizer": {"learning_rate": 1.0e-2, "betas": [0.0, 0.999], "lr_scheduler": "constant"},
            "loop": {"max_train_steps": steps, "gradient_accumulation_steps": accumulation},
            "checkpoint": {"output_dir": str(folder / "output"), **checkpoint},
            "tracker": {"trackers": ["none"]},
        },
        "callbacks": {"grad_clip": {"max_grad_norm": 10.0}, "history": {"_target_": "fastvideo_tiny.History"}},
        "pipeline": {"flow_shift": 8.0},  # of the score's times; the model's own is that of its scheduler
    }
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(config))
    return str(path)


def train(*args: Any, **options: Any) -> tuple[Any, list[dict[str, float]], list[list[tuple[str, Any]]]]:
    """One run; returns the method, each step's metrics, and each step's calls of the student."""
    for log in (TinyWan.log, History.metrics, History.methods):
        log.clear()
    run_training_from_config(configuration(*args, **options))
    steps = [[]]
    for call in TinyWan.log:
        if call[0] == "step":
            steps.append([])
        else:
            steps[-1].append(call)
    return History.methods[0], list(History.metrics), steps[:-1]


def sigma_by_hand(time: float) -> float:
    """The shifted time nearest to this one, as the scheduler is defined."""
    grid = [shifted(i / 1000, SHIFT) for i in range(1, 1001)]
    return min(grid, key=lambda sigma: abs(1000 * sigma - time))


def clips_by_hand(position: int) -> Tensor:
    x_BCFHW = Clips.batch(position)["vae_latent"].double()
    shape = (1, CHANNELS, 1, 1, 1)
    return ((x_BCFHW - torch.tensor(MEAN).view(shape)) / torch.tensor(STD).view(shape)).transpose(1, 2)


def regression_calls(calls: list[tuple[str, Any]]) -> list[tuple[Any, Any]]:
    """(noising, prediction) of the regressions: those with a time for every frame, and for every sample."""
    noising = [c for name, c in calls if name == "add_noise" and c.times.numel() == BATCH * FRAMES]
    predictions = [c for name, c in calls if name == "predict_noise" and c.times.numel() == BATCH]
    assert len(noising) == len(predictions)
    return list(zip(noising, predictions, strict=True))


def observations(
    calls: list[tuple[str, Any]], positions: Iterable[int]
) -> list[tuple[list[float], Tensor, Tensor, Tensor]]:
    """``(times, velocities, targets, gradient)`` of each regression, checked against the data and the scheduler."""
    found = []
    for (noising, prediction), position in zip(regression_calls(calls), positions, strict=True):
        clips, times = clips_by_hand(position), prediction.times.tolist()
        assert noising.times.tolist() == [t for t in times for _ in range(FRAMES)]
        assert prediction.options["attn_kind"] == "vsa"
        assert prediction.options["conditional"] is True
        sigma = torch.tensor([sigma_by_hand(t) for t in times]).double().view(-1, 1, 1, 1, 1)
        noise = noising.noise.double()
        torch.testing.assert_close(
            prediction.noisy.double(), (1 - sigma) * clips + sigma * noise, rtol=0.02, atol=0.02
        )  # bfloat16
        (gradient,) = prediction.gradients
        found.append((times, prediction.output.double(), noise - clips, gradient.double()))
    return found


def motions(calls: list[tuple[str, Any]]) -> list[float]:
    return [reference_motion(c.x_0.transpose(1, 2).tolist()) for name, c in calls if name == "predict_x0"]


def close(a: float, b: float, tolerance: float = 2e-3) -> None:
    assert abs(a - b) <= tolerance * max(1, abs(a), abs(b)), f"{a} is not {b}"


def check(
    metrics: list[dict[str, float]],
    steps: list[list[tuple[str, Any]]],
    cache: ReferenceCache,
    accumulation: int = 1,
    interval: int = 1,
    first: int = 0,
) -> int:
    """Every step's loss against Eq. 5-8 by hand; moves the cache by hand."""
    position, updates = first * accumulation, 0
    for step, (logged, calls) in enumerate(zip(metrics, steps, strict=True), first + 1):
        positions = range(position, position + accumulation)
        position += accumulation
        if step % interval:
            assert not regression_calls(calls)
            assert not [name for name in logged if name.startswith("avd/")]
            assert logged["generator_loss"] == 0
            continue
        updates += 1
        seen = observations(calls, positions)
        assert len(seen) == accumulation
        terms, losses = [], []
        for times, velocities, targets, gradient in seen:
            own = reference_sample_losses(velocities.tolist(), targets.tolist())
            means = [cache.read(t, loss) for t, loss in zip(times, own, strict=True)]
            weights = reference_weights(own, means, sharpness=3.0, weight=2.0)
            terms.append(mean([weight * loss for weight, loss in zip(weights, own, strict=True)]))
            losses += list(zip(times, own, strict=True))
            shape = (-1, 1, 1, 1, 1)
            by_hand = torch.tensor(weights).view(shape) * 2 * (velocities - targets) / targets.numel() / accumulation
            assert_close_gradient(gradient, by_hand)
        cache.iterate(losses)
        motion = motions(calls)
        close(logged["avd/regression/loss"], mean(terms))
        close(logged["avd/motion/loss"], mean(motion))
        close(logged["generator_loss"], logged["avd/matching_loss"] + mean(terms) + mean(motion))
        assert mean(terms) > 0.1
    return updates


def assert_close_gradient(gradient: Tensor, by_hand: Tensor) -> None:
    torch.testing.assert_close(gradient, by_hand, rtol=0.02, atol=0.01 * by_hand.abs().max().item())  # bfloat16


def check_motion_gradient(calls: list[tuple[str, Any]], plain_calls: list[tuple[str, Any]]) -> None:
    """Of a step with the terms and the same step without them: the sample has what is added."""
    (sample,), (plain_sample,) = ([c for name, c in step if name == "predict_x0"] for step in (calls, plain_calls))
    assert torch.equal(sample.x_0, plain_sample.x_0)
    (gradient,), (plain_gradient,) = sample.gradients, plain_sample.gradients
    x = sample.x_0.double().requires_grad_()
    temporal_loss = -((x - x.mean(dim=1, keepdim=True)).square().mean() + 1e-6).log()
    assert temporal_loss > 0.6, f"{temporal_loss.item()} is at the floor"
    (by_hand,) = torch.autograd.grad(0.05 * temporal_loss, x)
    assert_close_gradient((gradient - plain_gradient).double(), by_hand)


def check_cache(method: Any, cache: ReferenceCache) -> None:
    own = method.avd.objective.regression.cache
    for time, value, seen in zip(own.timesteps.tolist(), own.means.tolist(), own.seen.tolist(), strict=True):
        assert seen == any(math.isclose(time, t, rel_tol=1e-5) for t in cache.means)
        if seen:
            close(value, next(v for t, v in cache.means.items() if math.isclose(time, t, rel_tol=1e-5)))
    assert not own.pending.any()


def weights(method: Any) -> Tensor:
    return torch.cat([p.detach().flatten() for p in method.student.transformer.parameters()])


def data_latent(folder: Path) -> dict[str, Any]:
    """Values, and the same first step as FastVideo's own method but for the terms."""
    cache = ReferenceCache()
    method, metrics, steps = train(folder)
    assert check(metrics, steps, cache) == 4
    check_cache(method, cache)
    plain, plain_metrics, plain_steps = train(folder, lines=None)
    assert type(plain).__name__ == "DMD2Method"
    close(metrics[0]["avd/matching_loss"], plain_metrics[0]["generator_loss"], 1e-6)
    check_motion_gradient(steps[0], plain_steps[0])
    method, _, _ = train(folder, steps=1)
    plain, _, _ = train(folder, steps=1, lines=None)
    untouched, _, _ = train(folder, steps=0)
    for one, other in ((method, plain), (method, untouched)):
        assert (weights(one) - weights(other)).abs().max() > 1e-3
    return {"metrics": metrics[-1]}


def simulate(folder: Path) -> dict[str, Any]:
    """Generated rollouts, warped steps, the student every second step, two accumulation rounds."""
    options = {"rollout_mode": "simulate", "generator_update_interval": 2, "warp_denoising_step": True}
    cache = ReferenceCache()
    method, metrics, steps = train(folder, method=options, accumulation=2)
    warped = [1000 * shifted(s, SHIFT) for s in (1.0, 0.75, 0.5, 0.25)]
    torch.testing.assert_close(method.avd.objective.regression.cache.timesteps, torch.tensor(warped), rtol=1e-4, atol=0)
    assert check(metrics, steps, cache, accumulation=2, interval=2) == 2
    check_cache(method, cache)
    return {"timesteps": warped}


def resume(folder: Path) -> dict[str, Any]:
    """A run that goes on from a checkpoint is the run that was not interrupted."""
    whole, metrics, _ = train(folder, steps=4, training_state_checkpointing_steps=2)
    expected, state = weights(whole), whole.avd.state_dict()
    resumed, later, _ = train(folder, steps=4, resume_from_checkpoint=str(folder / "output" / "checkpoint-2"))
    assert len(later) == 2
    for one, other in zip(metrics[2:], later, strict=True):
        for name in one:
            assert name == "step_time_sec" or one[name] == other[name], name
    torch.testing.assert_close(weights(resumed), expected, rtol=0, atol=0)
    assert state["objective.regression.cache.seen"].any()
    for name, value in resumed.avd.state_dict().items():
        torch.testing.assert_close(value, state[name], rtol=0, atol=0)
    for other_steps, message in (
        ([1000, 760, 500, 250], "saved cache is for the grid"),
        ([1000, 500], "Size mismatch"),
    ):
        # A CheckpointException is no Exception.
        with pytest.raises(BaseException, match=message):
            train(
                folder,
                method={"dmd_denoising_steps": other_steps},
                resume_from_checkpoint=str(folder / "output" / "checkpoint-2"),
            )
    return {"means": state["objective.regression.cache.means"].tolist()}


def refusals(folder: Path) -> dict[str, Any]:
    """Options that FastVideo decides, and an adapter that no longer fits."""
    wrong = [
        ({"rollout_mode": "simulate"}, {"preprocessed_data_type": "text_only"}, "text_only"),
        ({"avd": {"regression": None, "motion": None}}, {}, "leaves out both"),
        ({"avd": {"timesteps": [1000, 500]}}, {}, "dmd_denoising_steps"),
        ({"avd": {"gradient_ratio": 0.5}}, {}, "an adapter does not see"),
    ]
    for method, data, message in wrong:
        path = configuration(folder, method=method)
        config = yaml.safe_load(Path(path).read_text())
        config["training"]["data"].update(data)
        Path(path).write_text(yaml.safe_dump(config))
        with pytest.raises(ValueError, match=message):
            run_training_from_config(path, dry_run=True)
    motion_only, metrics, _ = train(folder, steps=1, method={"rollout_mode": "simulate", "avd": {"regression": None}})
    assert motion_only.avd.objective.regression is None
    assert "avd/motion/loss" in metrics[0]
    dmd2_class.cache_clear()
    hook, DMD2Method._dmd_loss = DMD2Method._dmd_loss, lambda self, prediction: None
    with pytest.raises(RuntimeError, match=r"_dmd_loss takes no argument generator_pred_x0, batch.*proven on"):
        dmd2_class()
    DMD2Method._dmd_loss = hook
    assert avd_config(None, [1000, 500]).motion.floor == 0.6
    return {}


def two_ranks(folder: Path) -> dict[str, Any]:
    """Two processes with a sharded student: one cache, different draws, resumed from FastVideo's checkpoint."""
    port = free_port()
    context = multiprocessing.get_context("fork")  # the imports are done
    answers = context.Queue()
    processes = [context.Process(target=_rank, args=(r, port, folder, answers), daemon=True) for r in range(2)]
    for process in processes:
        process.start()
    found = dict(answers.get(timeout=240) for _ in processes)
    for process in processes:
        process.join(timeout=30)
    assert [p.exitcode for p in processes] == [0, 0]
    (losses, means, resumed), (other_losses, other_means, other_resumed) = found[0], found[1]
    assert means == other_means == resumed == other_resumed
    cache = ReferenceCache()
    for own, other in zip(losses, other_losses, strict=True):
        assert own != other
        cache.iterate([tuple(pair) for pair in own + other])
    assert len(losses) == 4
    for time, value in means.items():
        close(value, cache.means.get(time, 0.0))
    assert [t for pairs in losses for t, _ in pairs] != [t for pairs in other_losses for t, _ in pairs]
    return {"means": means}


def _rank(rank: int, port: int, folder: Path, answers: Any) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "MASTER_PORT": str(port)}
    folder = folder / str(rank)
    folder.mkdir()
    shared = str(folder.parent / "output")
    method, _, steps = train(folder, world=2, output_dir=shared, training_state_checkpointing_steps=2)
    losses = [
        list(zip(times, reference_sample_losses(velocities.tolist(), targets.tolist()), strict=True))
        for step, calls in enumerate(steps)
        for times, velocities, targets, _ in observations(calls, [step])
    ]
    again, _, _ = train(folder, world=2, output_dir=shared, resume_from_checkpoint=f"{shared}/checkpoint-2")
    answers.put((rank, (losses, _means(method), _means(again))))
    answers.close()
    answers.join_thread()
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def _means(method: Any) -> dict[float, float]:
    cache = method.avd.objective.regression.cache
    return dict(zip(cache.timesteps.tolist(), cache.means.tolist(), strict=True))


if __name__ == "__main__":
    scratch, names = Path(sys.argv[1]), sys.argv[2:]
    os.environ["MASTER_PORT"] = str(free_port())
    report = {}
    for name in names:
        (scratch / name).mkdir()
        report[name] = globals()[name](scratch / name)
    print(json.dumps(report))
