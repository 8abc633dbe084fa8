"""Decoding of latents by Wan2.1's VAE, with random weights: time and memory, whole and in tiles.

    .venv/bin/python benchmarks/decoding.py --device cuda

Writes benchmarks/results/decoding-cpu.json (gpu in place of cpu on one).
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import typer
from diffusers import AutoencoderKLWan

from avd_trainer.models.codecs.latent_space import SIZES, latent_shape_of
from avd_trainer.models.codecs.wan import WanCodec
from avd_trainer.runtime.environment import environment
from avd_trainer.runtime.progress import peak_memory

RESULTS = Path(__file__).parent / "results"


def main(
    device: Annotated[Literal["cpu", "cuda"], typer.Option(help="Where to decode.")] = "cpu",
    size: Annotated[str, typer.Option(help="Of the clip, WxHxF.")] = SIZES["wan"],
    repetitions: Annotated[int, typer.Option(min=1, help="After one to warm up.")] = 3,
    small: Annotated[bool, typer.Option("--small", help="A narrow network, to try this on a CPU.")] = False,
    results: Annotated[Path | None, typer.Option(help="File to write.")] = None,
) -> None:
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    vae = AutoencoderKLWan(base_dim=12) if small else AutoencoderKLWan()
    vae = vae.to(device, dtype)
    report: dict[str, Any] = {"size": size, "precision": str(dtype).removeprefix("torch."), "repetitions": repetitions}
    for name, tiling in (("whole", False), ("tiles", True)):
        report[name] = measure_decoding(WanCodec(vae, tiling=tiling), size, torch.device(device), repetitions)
    path = results or RESULTS / f"decoding-{'gpu' if device == 'cuda' else 'cpu'}.json"
    path.parent.mkdir(exist_ok=True)
    command = " ".join(["python benchmarks/decoding.py", *sys.argv[1:]])
    path.write_text(json.dumps({"command": command, **environment(), **report}, indent=2) + "\n")
    typer.echo(f"{path}:\n{json.dumps(report, indent=2)}")


def measure_decoding(codec: WanCodec, size: str, device: torch.device, repetitions: int) -> dict[str, Any]:
    """Seconds of a clip, and the peak of memory meanwhile."""
    latents = torch.randn(1, *latent_shape_of(size, "wan"), device=device)
    codec.decode(latents)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    seconds = []
    for _ in range(repetitions):
        started = time.perf_counter()
        codec.decode(latents)
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - started)
    return {
        "seconds": round(statistics.median(seconds), 3),
        "seconds_each": [round(value, 3) for value in seconds],
        "peak_memory_gib": round(peak_memory() / 2**30, 2),
        "peak_memory_of": "tensors on the GPU" if device.type == "cuda" else "the whole process",
    }


if __name__ == "__main__":
    typer.run(main)
