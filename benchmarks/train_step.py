"""A whole AVD update, one of the student and those of the online model: time, memory, FLOPs; and a soak test.

    .venv/bin/python benchmarks/train_step.py
    .venv/bin/python benchmarks/train_step.py --preset wan2.1-1.3b --lora
    .venv/bin/python benchmarks/train_step.py --soak 2000

Weights and clips of wan2.1-1.3b are random: nothing is downloaded. Writes benchmarks/results/train-step-cpu.json, or
soak-cpu.json; on a GPU gpu in place of cpu, with the preset and the mode.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Annotated, Any, NamedTuple
from unittest import mock

import psutil
import torch
import typer
from torch import Tensor

from avd_trainer.config.loading import load_config
from avd_trainer.data.examples import Example
from avd_trainer.data.sources import TrainingData, load_data
from avd_trainer.models.codecs.latent_space import SIZES, latent_shape_of
from avd_trainer.models.condition import Condition
from avd_trainer.models.roles import Model
from avd_trainer.models.transformer import empty_transformer
from avd_trainer.planning.description import Run, describe, find_architecture
from avd_trainer.planning.duration import PEAK_TFLOPS
from avd_trainer.planning.memory import plan_memory, worst
from avd_trainer.planning.meta_models import meta_models
from avd_trainer.planning.operations import forward_operations, training_operations
from avd_trainer.runtime.environment import environment
from avd_trainer.runtime.files import write_json
from avd_trainer.runtime.progress import peak_memory
from avd_trainer.runtime.ranks import Ranks, join_ranks
from avd_trainer.training import run as runs
from avd_trainer.training.config import TrainConfig
from avd_trainer.training.optimizers import Metrics
from avd_trainer.training.trainer import Trainer
from small_wan import shrink

RESULTS = Path(__file__).parent / "results"
SOAK_EVERY = 50
TEXT_LENGTH = 512

Calls = Counter[tuple[str, bool]]


class RandomClips:
    """Captioned clips of noise, for models that are random themselves.

    Args:
        latent_shape: ``(C, F, H, W)``.
        text_shape: Tokens of a prompt, and their width.
    """

    def __init__(self, latent_shape: tuple[int, ...], text_shape: tuple[int, int]) -> None:
        self.text_shape = text_shape
        self._sample = Example(torch.randn(latent_shape), torch.randn(text_shape), caption="", source="")

    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> Example:
        return self._sample

    def unconditional(self) -> Tensor:
        return torch.zeros(self.text_shape)


class Counted:
    """A model that counts the samples it is run on, by role and by whether a backward pass follows."""

    def __init__(self, model: Model, role: str, calls: Calls) -> None:
        self._model, self._role, self._calls = model, role, calls

    def __call__(self, x_t: Tensor, timesteps: Tensor, condition: Condition) -> Tensor:
        velocity = self._model(x_t, timesteps, condition)
        self._calls[self._role, velocity.requires_grad] += len(x_t)
        return velocity


def main(
    preset: Annotated[str, typer.Option(help="tiny or wan2.1-1.3b.")] = "tiny",
    lora: Annotated[bool, typer.Option("--lora", help="Adapters of both models on one base.")] = False,
    size: Annotated[str, typer.Option(help="Of wan2.1's clips.")] = SIZES["wan"],
    small: Annotated[bool, typer.Option("--small", help="Narrow and short models of wan2.1, to try this.")] = False,
    updates: Annotated[int, typer.Option(help="How many to measure.")] = 8,
    soak: Annotated[int, typer.Option(help="Instead, watch memory over so many tiny steps.")] = 0,
    results: Annotated[Path | None, typer.Option(help="File to write.")] = None,
) -> None:
    device = "gpu" if torch.cuda.is_available() else "cpu"
    if soak:
        reports, name = iter([watch_memory(soak)]), f"soak-{device}"
    else:
        reports = measure_update(preset, lora=lora, size=size, small=small, updates=updates)
        name = f"train-step-{device}"
        if preset != "tiny":
            name += f"-{preset}-{'lora' if lora else 'full'}"
    command = " ".join(["python benchmarks/train_step.py", *sys.argv[1:]])
    path = results or RESULTS / f"{name}.json"
    for report in reports:  # each in place of the one before: whoever is stopped has measured something
        write_json(path, {"command": command, **environment(), **report})
        typer.echo(f"{path}: " + ", ".join(f"{k} {v}" for k, v in report.items() if isinstance(v, int | float)))


def measure_update(preset: str, *, lora: bool, size: str, small: bool, updates: int) -> Iterator[dict[str, Any]]:
    """Time, memory and FLOPs of an update.

    Yields:
        After each update a report of all so far. The one that warms up is reported only until there is another:
        ``updates`` is 0 then.
    """
    with tempfile.TemporaryDirectory() as folder, join_ranks() as ranks:
        config, data, architecture = prepare(
            preset, Path(folder), lora=lora, size=size, small=small, max_steps=updates + 1
        )
        text_length = len(data.prompts[0].text)
        run = describe(config, architecture, data.latent_shape, gpus=1, text_length=text_length)
        costs = example_operations(run)
        planned = worst(plan_memory(run)).allocated
        trainer = Trainer(config, data, ranks)
        calls: Calls = Counter()
        for role, model in trainer.models.items():
            setattr(trainer.method, role, Counted(model, role, calls))
        steps = trainer.run()
        seconds: list[float] = []
        for update in range(updates + 1):
            if update == 1:  # the one before warmed up
                calls.clear()
                seconds.clear()
                if ranks.device.type == "cuda":
                    torch.cuda.reset_peak_memory_stats()
            seconds.append(_timed(steps, ranks))
            flops = sum(count * costs[role, gradient] for (role, gradient), count in calls.items())
            yield {
                "preset": preset,
                "mode": "adapters of both models" if lora else "full",
                "latent_shape": list(data.latent_shape),
                "precision": config.precision,
                "batch_size": config.batch_size,
                "online_updates": config.method.online_updates,
                "updates": update,
                "seconds_per_update": round(statistics.median(seconds), 3),
                "seconds_each": [round(value, 3) for value in seconds],
                "samples_per_second": round(config.batch_size * len(seconds) / sum(seconds), 3),
                "peak_memory_gib": round(peak_memory() / 2**30, 2),
                "peak_memory_of": "tensors on the GPU" if ranks.device.type == "cuda" else "the whole process",
                "planned_tensors_gib": round(planned / 2**30, 2),
                "samples_run": {
                    f"{role}{', with backward' if grad else ''}": n for (role, grad), n in sorted(calls.items())
                },
                "model_tflop_per_update": round(flops / len(seconds) / 1e12, 3),
                "tflops": round(flops / sum(seconds) / 1e12, 4),
                **_utilisation(flops / sum(seconds), config, ranks.device),
            }


class Prepared(NamedTuple):
    """A run that needs no download."""

    config: TrainConfig
    data: TrainingData
    architecture: dict[str, Any]


def prepare(preset: str, folder: Path, *, lora: bool, size: str, small: bool, max_steps: int) -> Prepared:
    """The tiny preset as it is, or another one on random clips with random weights, which go to ``folder``."""
    overrides = [f"max_steps={max_steps}"]
    if lora:
        overrides += ["method.student.lora.rank=64", "method.online.lora.rank=64"]
    if preset == "tiny":
        config = load_config(TrainConfig, preset, [*overrides, "data.clips=32"])
        architecture = find_architecture(config.teacher)
        data = load_data(
            config.data,
            config.prompts,
            teacher=config.teacher,
            architecture=architecture,
        )
        return Prepared(config, data, architecture)
    replace = {"data": {"kind": "shards", "path": "random"}}
    config = load_config(TrainConfig, preset, [*overrides, "batch_size=1", "micro_batch_size=1"], replace)
    architecture = find_architecture(config.teacher)
    if small:
        architecture = shrink(architecture)
    save_random_weights(architecture, folder)
    clips = RandomClips(latent_shape_of(size, "wan"), (TEXT_LENGTH, architecture["text_dim"]))
    return Prepared(config.model_copy(update={"teacher": str(folder)}), TrainingData(clips, clips), architecture)


def save_random_weights(architecture: dict[str, Any], folder: Path) -> None:
    """A diffusers folder in bfloat16."""
    model = empty_transformer(architecture, torch.device("cpu"))
    draws = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.data = torch.empty_like(parameter, dtype=torch.bfloat16).normal_(std=0.02, generator=draws)
    model.save_pretrained(folder)


def example_operations(run: Run) -> dict[tuple[str, bool], int]:
    """Operations of one example by role, without and with backward; nothing that is computed twice counts twice."""
    size = (run.latent_shape, run.text_length)
    costs = {}
    for role, model in meta_models(run).items():
        costs[role, False] = forward_operations(model, role, *size)
        if role != "teacher":
            costs[role, True] = training_operations(model, role, *size, recomputation=False)
    return costs


def watch_memory(steps: int) -> dict[str, Any]:
    """Memory over a run of the tiny preset with everything that belongs to it: checkpoints, logs, monitor."""
    series: list[dict[str, float]] = []
    process = psutil.Process()

    class Watched(Trainer):
        def run(self) -> Iterator[Metrics]:
            for metrics in super().run():
                yield metrics
                if self.step % SOAK_EVERY == 0:
                    row = {"step": self.step, "resident_mb": process.memory_info().rss / 1e6}
                    if self.ranks.device.type == "cuda":
                        row["allocated_mb"] = torch.cuda.memory_allocated() / 1e6
                    series.append({key: round(value, 1) for key, value in row.items()})

    # Memory that grows does so at any batch size; a small one is done sooner.
    overrides = [f"max_steps={steps}", "batch_size=2", "data.clips=64"]
    config = load_config(TrainConfig, "tiny", overrides)
    with tempfile.TemporaryDirectory() as folder, join_ranks() as ranks, mock.patch.object(runs, "Trainer", Watched):
        started = time.monotonic()
        runs.train(config, Path(folder) / "run", ranks)
        seconds = time.monotonic() - started
    # Pools and caches fill in the beginning; a leak goes on.
    settled = series[len(series) // 4 :]
    growth = settled[-1]["resident_mb"] - settled[0]["resident_mb"] if settled else 0.0
    return {
        "preset": "tiny",
        "overrides": overrides,
        "steps": steps,
        "seconds": round(seconds, 1),
        "growth_after_a_quarter_mb": round(growth, 1),
        "series": series,
    }


def _timed(steps: Iterator[Metrics], ranks: Ranks) -> float:
    started = time.perf_counter()
    next(steps)
    if ranks.device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started


def _utilisation(flops_per_second: float, config: TrainConfig, device: torch.device) -> dict[str, Any]:
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        known = max((key for key in PEAK_TFLOPS if name.startswith(key)), key=len, default=None)
        if known is None or config.precision != "bfloat16":
            return {"model_flops_utilisation": None, "peak_tflops_of": f"not known: {name}, {config.precision}"}
        share = round(flops_per_second / (PEAK_TFLOPS[known] * 1e12), 4)
        return {"model_flops_utilisation": share, "peak_tflops": PEAK_TFLOPS[known], "peak_tflops_of": known}
    peak = _matmul_flops_per_second(getattr(torch, config.precision))
    return {
        "measured_matmul_tflops": round(peak / 1e12, 4),
        "share_of_measured_matmul_peak": round(flops_per_second / peak, 4),
    }


@cache
def _matmul_flops_per_second(dtype: torch.dtype, size: int = 2048, rounds: int = 5) -> float:
    a, b = torch.randn(2, size, size).to(dtype)
    best = float("inf")
    for _ in range(rounds + 1):
        started = time.perf_counter()
        a @ b
        best = min(best, time.perf_counter() - started)
    return 2 * size**3 / best


if __name__ == "__main__":
    typer.run(main)
