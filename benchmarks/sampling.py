"""Half-rate sampling: time, the interpolator's speed, quality on the tiny model, and where frames are told to be.

    .venv/bin/python benchmarks/sampling.py --part speed
    .venv/bin/python benchmarks/sampling.py --part speed --device cuda --preset wan2.1-1.3b
    .venv/bin/python benchmarks/sampling.py --part interpolation
    .venv/bin/python benchmarks/sampling.py --part quality --student runs/demo/avd/student --interpolator DIR
    .venv/bin/python benchmarks/sampling.py --part positions --student runs/demo/avd/student

Weights of the part speed are random: nothing is downloaded. What is compared is measured in turns, in one process.
Writes benchmarks/results/sampling-PART-cpu.json (gpu in place of cpu on one).
"""

from __future__ import annotations

import copy
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import typer
from diffusers import WanTransformer3DModel
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from avd_core import (
    FlowMatchingSchedule,
    HalfRateInterpolationSampler,
    LatentFrameInterpolator,
    interpolate_linearly,
    kept_frames,
    repeat_frames,
)
from avd_core.sampling import Denoiser, Interpolator
from avd_integrations.diffusers import frame_positions
from avd_trainer.config.loading import load_config
from avd_trainer.config.sections import ShapesData
from avd_trainer.data.in_memory import CaptionedLatents, encode_shapes
from avd_trainer.data.moving_shapes import MovingShapes
from avd_trainer.data.sources import HELD_OUT
from avd_trainer.evaluation.measures import measure
from avd_trainer.models.codecs.block_dct import BlockDCTCodec
from avd_trainer.models.codecs.latent_space import SIZES, latent_shape_of
from avd_trainer.models.text_encoders.hashed import TEXT_LENGTH, HashTextEmbedding
from avd_trainer.models.transformer import empty_transformer, load_transformer
from avd_trainer.planning.description import find_architecture
from avd_trainer.runtime.environment import environment
from avd_trainer.studies.demo import DemoConfig
from avd_trainer.studies.real_side import RealSide
from avd_trainer.training.config import TrainConfig
from small_wan import shrink

RESULTS = Path(__file__).parent / "results"
TIMESTEPS = (1000.0, 900.0, 757.0, 522.0)
HALF_RATE_STEPS = 2
# Of the noise of parts quality and positions; the first is the demo's.
SEEDS = (2026, 1, 2, 3)
TEXT_LENGTH_WAN = 512
# Narrow and long, so that attention over its 6,720 tokens takes 70% of a step's operations, as it does in Wan2.1-1.3B
# over 32,760.
CPU_ARCHITECTURE: dict[str, Any] = {
    "patch_size": (1, 2, 2),
    "num_attention_heads": 4,
    "attention_head_dim": 64,
    "in_channels": 16,
    "out_channels": 16,
    "text_dim": 128,
    "freq_dim": 64,
    "ffn_dim": 1536,
    "num_layers": 10,
    "rope_max_seq_len": 64,
}
CPU_SIZE = "320x256x81"
INTERPOLATED = ((1, 16, 11, 60, 104), (1, 16, 11, 16, 26))

schedule = FlowMatchingSchedule()


def main(
    part: Annotated[Literal["speed", "interpolation", "quality", "positions"], typer.Option(help="What to measure.")],
    device: Annotated[Literal["cpu", "cuda"], typer.Option(help="Of parts speed and interpolation.")] = "cpu",
    preset: Annotated[
        str | None,
        typer.Option(help="Of part speed: wan2.1-1.3b or wan2.1-14b, in bfloat16; a small model without it."),
    ] = None,
    size: Annotated[str | None, typer.Option(help="Of part speed: WxHxF.")] = None,
    small: Annotated[bool, typer.Option("--small", help="A preset's model narrow and short, to try this.")] = False,
    repetitions: Annotated[int, typer.Option(min=1, help="Of parts speed and interpolation.")] = 5,
    student: Annotated[Path | None, typer.Option(help="A tiny student, a transformer folder.")] = None,
    interpolator: Annotated[Path | None, typer.Option(help="An interpolator folder of the tiny latents.")] = None,
    results: Annotated[Path | None, typer.Option(help="File to write.")] = None,
) -> None:
    if part == "speed":
        report = measure_speed(torch.device(device), preset, size, repetitions, small=small)
    elif part == "interpolation":
        report = measure_interpolation(torch.device(device), repetitions)
    elif part == "quality":
        if student is None or interpolator is None:
            raise typer.BadParameter("--part quality needs --student and --interpolator.")
        report = measure_quality(student, interpolator)
    else:
        report = measure_positions({"teacher": "bundled:tiny"} | ({"student": str(student)} if student else {}))
    name = f"sampling-{part}-{'gpu' if device == 'cuda' else 'cpu'}" + (f"-{preset}" if preset else "")
    path = results or RESULTS / f"{name}.json"
    path.parent.mkdir(exist_ok=True)
    command = " ".join(["python benchmarks/sampling.py", *sys.argv[1:]])
    path.write_text(json.dumps({"command": command, **environment(), **report}, indent=2) + "\n")
    typer.echo(f"{path}:\n{json.dumps(report, indent=2)}")


@torch.no_grad()
def measure_speed(
    device: torch.device, preset: str | None, size: str | None, repetitions: int, *, small: bool
) -> dict[str, Any]:
    """Four steps with two at half rate against four at full rate, and against what the operations promise."""
    dtype = torch.float32 if preset is None else torch.bfloat16
    architecture = CPU_ARCHITECTURE if preset is None else _architecture(preset, small=small)
    shape = latent_shape_of(size or (CPU_SIZE if preset is None else SIZES["wan"]), "wan")
    model = random_transformer(architecture, device, dtype)
    interpolator = LatentFrameInterpolator(shape[0]).to(device).eval()
    text = torch.randn(1, TEXT_LENGTH_WAN, architecture["text_dim"], device=device, dtype=dtype)
    noise = torch.randn(1, *shape, device=device)
    inserting: list[float] = []

    def denoise(x_t: Tensor, timesteps: Tensor) -> Tensor:
        velocity = model(x_t.to(dtype), timesteps, text, return_dict=False)[0]
        return schedule.velocity_to_x_0(velocity.float(), x_t, timesteps)

    def insert(x_0: Tensor) -> Tensor:
        seconds, inserted = _timed(lambda: interpolator(x_0), device)
        inserting.append(seconds)
        return inserted

    samplers = {
        name: HalfRateInterpolationSampler(denoise, insert, TIMESTEPS, half_rate_steps)
        for name, half_rate_steps in (("full", 0), ("half", HALF_RATE_STEPS))
    }
    rounds: dict[str, list[float]] = {name: [] for name in samplers}
    # One of each to warm up: kernels are chosen and memory is taken.
    for sampler in samplers.values():
        sampler(noise)
    inserting.clear()
    for number in range(repetitions):
        # In turns, and the order turns too, so that a machine that slows down slows both.
        for name in ("full", "half") if number % 2 == 0 else ("half", "full"):
            rounds[name].append(_timed(lambda name=name: samplers[name](noise), device)[0])
    ratios = [half / full for half, full in zip(rounds["half"], rounds["full"], strict=True)]
    counted = {
        frames: count_flops(architecture, (shape[0], frames, *shape[2:]), TEXT_LENGTH_WAN)
        for frames in (shape[1], len(kept_frames(shape[1], 2)))
    }
    full, half = counted.values()
    steps = len(TIMESTEPS)
    promised = (HALF_RATE_STEPS * half + (steps - HALF_RATE_STEPS) * full) / (steps * full)
    ratio = statistics.median(ratios)
    return {
        "device": device.type,
        "model": {key: list(value) if isinstance(value, tuple) else value for key, value in architecture.items()},
        "precision": str(dtype).removeprefix("torch."),
        "latent_shape": list(shape),
        "tokens": {"full": _tokens(architecture, shape), "half": _tokens(architecture, shape, 2)},
        "steps": steps,
        "half_rate_steps": HALF_RATE_STEPS,
        "repetitions": repetitions,
        "seconds_full": round(statistics.median(rounds["full"]), 4),
        "seconds_half": round(statistics.median(rounds["half"]), 4),
        "seconds_each": {name: [round(value, 4) for value in values] for name, values in rounds.items()},
        "ratio": round(ratio, 4),
        "ratios": [round(value, 4) for value in ratios],
        "ratio_without_interpolation": round(
            statistics.median(
                (half - inserted) / full
                for half, full, inserted in zip(rounds["half"], rounds["full"], inserting, strict=True)
            ),
            4,
        ),
        "interpolation_ms": round(1000 * statistics.median(inserting), 3),
        "tflop_full_step": round(full / 1e12, 4),
        "tflop_half_step": round(half / 1e12, 4),
        "formula_agrees_with_count": {
            str(frames): round(step_flops(architecture, (shape[0], frames, *shape[2:]), TEXT_LENGTH_WAN) / count, 4)
            for frames, count in counted.items()
        },
        "ratio_by_operations": round(promised, 4),
        "ratio_over_ratio_by_operations": round(ratio / promised, 4),
    }


@torch.no_grad()
def measure_interpolation(device: torch.device, repetitions: int) -> dict[str, Any]:
    """All pairs of a clip in one call against a loop over pairs: of the same network, and of one in PyTorch's default
    memory layout, which is how such a loop is written without further thought."""
    network = LatentFrameInterpolator().to(device).eval()
    # Away from zero, so that what is compared is not the mean alone.
    torch.nn.init.normal_(network.output.weight, std=0.1)
    plain = copy.deepcopy(network)
    plain.encoder_outer.register_forward_pre_hook(lambda _, inputs: inputs[0].contiguous())
    sizes = []
    for shape in INTERPOLATED:
        latents = torch.randn(shape, device=device)

        ways: dict[str, Callable[[], Tensor]] = {
            "together": partial(network, latents),
            "loop": partial(_loop_over_pairs, network, latents),
            "plain_loop": partial(_loop_over_pairs, plain, latents),
        }
        outputs = [way() for way in ways.values()]
        seconds: dict[str, list[float]] = {name: [] for name in ways}
        for _ in range(repetitions):
            for name, way in ways.items():
                seconds[name].append(_timed(way, device)[0])
        ratios = {
            f"{name}_over_together": [
                loop / together for loop, together in zip(seconds[name], seconds["together"], strict=True)
            ]
            for name in ("loop", "plain_loop")
        }
        sizes.append(
            {
                "latents": list(shape),
                **{f"{name}_ms": round(1000 * statistics.median(values), 3) for name, values in seconds.items()},
                **{name: round(statistics.median(values), 3) for name, values in ratios.items()},
                "largest_difference": max(float((outputs[0] - output).abs().max()) for output in outputs[1:]),
            }
        )
    return {"device": device.type, "repetitions": repetitions, "sizes": sizes}


def _loop_over_pairs(network: LatentFrameInterpolator, latents: Tensor) -> Tensor:
    pairs = [network(latents[:, :, first : first + 2]) for first in range(latents.shape[2] - 1)]
    return torch.cat([pairs[0], *(pair[:, :, 1:] for pair in pairs[1:])], dim=2)


@torch.no_grad()
def measure_quality(student: Path, interpolator: Path) -> dict[str, Any]:
    """The demo's measures of a tiny student at full and at half rate: the same captions and noise for all."""
    network = LatentFrameInterpolator.from_pretrained(interpolator)
    config = load_config(DemoConfig, "tiny")
    assert isinstance(config.data, ShapesData)
    codec = BlockDCTCodec()
    samples = config.evaluation.samples
    real = RealSide.load(config.data, samples, codec)
    reference = real.reference(codec)
    denoise = _denoiser(load_transformer(str(student)), _embed(real.held_out.captions))
    ways: dict[str, tuple[Interpolator, int]] = {
        "full rate": (interpolate_linearly, 0),
        "half rate, network": (network, HALF_RATE_STEPS),
        "half rate, linear": (interpolate_linearly, HALF_RATE_STEPS),
        "half rate, repeated frames": (repeat_frames, HALF_RATE_STEPS),
        "one step at half rate, network": (network, 1),
        "three steps at half rate, network": (network, 3),
    }
    rows: dict[str, list[dict[str, float]]] = {name: [] for name in ways}
    for seed in SEEDS:
        for name, (insert, half_rate_steps) in ways.items():
            draws = torch.Generator().manual_seed(seed)
            noise = torch.randn(real.held_out.latents.shape, generator=draws)
            latents = HalfRateInterpolationSampler(denoise, insert, TIMESTEPS, half_rate_steps)(noise, draws)
            rows[name].append(measure(latents, codec.decode(latents), real.held_out.captions, reference.real))
    return {
        "samples": samples,
        "noise_seeds": list(SEEDS),
        "real": {name: {"mean": spread.mean, "std": spread.std} for name, spread in reference.spreads.items()},
        "measures": {name: _mean_and_spread(values) for name, values in rows.items()},
    }


@torch.no_grad()
def measure_positions(models: Mapping[str, str]) -> dict[str, Any]:
    """How well a prediction at half rate agrees with the one at full rate on the frames that it has.

    The mean squared difference of the clean predictions over the mean square of the full-rate one, both frames being
    given the same x_t: of real held-out clips, noised, and of the model's own trajectory at full rate.
    """
    clips = encode_shapes(MovingShapes(96, HELD_OUT, held_out=True), BlockDCTCodec())
    rows: dict[str, Any] = {}
    for name, source in models.items():
        model = load_transformer(source)
        rows[name] = {}
        for origin in ("real clips", "own trajectory"):
            differences: dict[str, dict[float, list[float]]] = {
                way: {timestep: [] for timestep in TIMESTEPS} for way in ("consecutive", "strided")
            }
            for seed in SEEDS:
                for timestep, x_t in _noisy(origin, model, clips, seed):
                    for way, value in _disagreement(model, x_t, timestep, _embed(clips.captions)).items():
                        differences[way][timestep].append(value)
            rows[name][origin] = {
                f"{timestep:g}": {way: _spread(values[timestep]) for way, values in differences.items()}
                | {"better": min(differences, key=lambda way, t=timestep: statistics.mean(differences[way][t]))}  # type: ignore[misc]
                for timestep in TIMESTEPS
            }
    return {"clips": len(clips), "noise_seeds": list(SEEDS), "relative_mean_squared_difference": rows}


def random_transformer(
    architecture: Mapping[str, Any], device: torch.device, dtype: torch.dtype
) -> WanTransformer3DModel:
    """A transformer with random weights."""
    model = empty_transformer(dict(architecture), torch.device("cpu"))
    draws = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.data = torch.empty_like(parameter).normal_(std=0.02, generator=draws)
    # As in diffusers: what Wan keeps in float32 stays there.
    kept = set(WanTransformer3DModel._keep_in_fp32_modules)
    for name, parameter in model.named_parameters():
        parameter.data = parameter.data.to(dtype if kept.isdisjoint(name.split(".")) else torch.float32)
    return model.to(device).eval().requires_grad_(False)


def count_flops(architecture: Mapping[str, Any], shape: Sequence[int], text_length: int) -> int:
    """FLOPs of one forward of one clip by PyTorch's counter, without memory for it."""
    model = empty_transformer(dict(architecture), torch.device("meta"))
    inputs = [
        torch.empty(size, device="meta") for size in ((1, *shape), (1,), (1, text_length, architecture["text_dim"]))
    ]
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(*inputs, return_dict=False)
    return counter.get_total_flops()


def step_flops(architecture: Mapping[str, Any], shape: Sequence[int], text_length: int) -> int:
    """The same by a formula: the matrix products of the blocks, which are nearly all of it."""
    tokens, text = _tokens(architecture, shape), text_length
    width = architecture["num_attention_heads"] * architecture["attention_head_dim"]
    own = 8 * tokens * width**2 + 4 * tokens**2 * width
    cross = 4 * (tokens + text) * width**2 + 4 * tokens * text * width
    feed_forward = 4 * tokens * width * architecture["ffn_dim"]
    return int(architecture["num_layers"] * (own + cross + feed_forward))


def _architecture(preset: str, *, small: bool) -> dict[str, Any]:
    config = load_config(TrainConfig, preset, [], {"data": {"kind": "shards", "path": "random"}})
    architecture = {"out_channels": 16, "rope_max_seq_len": 1024, **find_architecture(config.teacher)}
    return shrink(architecture) if small else architecture


def _tokens(architecture: Mapping[str, Any], shape: Sequence[int], rate: int = 1) -> int:
    frames, height, width = architecture["patch_size"]
    return len(kept_frames(shape[1], rate)) // frames * (shape[2] // height) * (shape[3] // width)


def _timed(run: Callable[[], Tensor], device: torch.device) -> tuple[float, Tensor]:
    """Seconds until the result is there, and the result."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    started = time.perf_counter()
    result = run()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started, result


def _embed(captions: Sequence[str]) -> Tensor:
    return HashTextEmbedding(TEXT_LENGTH, find_architecture("bundled:tiny")["text_dim"])(captions)


def _denoiser(model: WanTransformer3DModel, text: Tensor) -> Denoiser:
    def denoise(x_t: Tensor, timesteps: Tensor) -> Tensor:
        return schedule.velocity_to_x_0(model(x_t, timesteps, text, return_dict=False)[0], x_t, timesteps)

    return denoise


def _noisy(
    origin: str, model: WanTransformer3DModel, clips: CaptionedLatents, seed: int
) -> Iterator[tuple[float, Tensor]]:
    """Each timestep of the grid with an ``x_t`` at full rate."""
    draws = torch.Generator().manual_seed(seed)
    noise = torch.randn(clips.latents.shape, generator=draws)
    if origin == "real clips":
        for timestep in TIMESTEPS:
            yield timestep, schedule.add_noise(clips.latents, noise, torch.full((len(clips),), timestep))
        return
    seen: list[tuple[float, Tensor]] = []
    denoise = _denoiser(model, _embed(clips.captions))

    def watched(x_t: Tensor, timesteps: Tensor) -> Tensor:
        seen.append((float(timesteps[0]), x_t))
        return denoise(x_t, timesteps)

    HalfRateInterpolationSampler(watched, interpolate_linearly, TIMESTEPS, 0)(noise, draws)
    yield from seen


def _disagreement(model: WanTransformer3DModel, x_t: Tensor, timestep: float, text: Tensor) -> dict[str, float]:
    """By the way that frames are placed."""
    denoise, timesteps = _denoiser(model, text), torch.full((len(x_t),), timestep)
    kept = kept_frames(x_t.shape[2], 2)
    full = denoise(x_t, timesteps)[:, :, kept]
    halves = {"consecutive": denoise(x_t[:, :, kept], timesteps)}
    with frame_positions(model, kept):
        halves["strided"] = denoise(x_t[:, :, kept], timesteps)
    return {way: float((half - full).square().mean() / full.square().mean()) for way, half in halves.items()}


def _mean_and_spread(rows: Sequence[Mapping[str, float]]) -> dict[str, dict[str, float]]:
    return {name: _spread([row[name] for row in rows]) for name in rows[0]}


def _spread(values: Sequence[float]) -> dict[str, float]:
    """Mean and standard deviation over noise seeds."""
    return {"mean": round(statistics.mean(values), 5), "std": round(statistics.stdev(values), 5)}


if __name__ == "__main__":
    typer.run(main)
