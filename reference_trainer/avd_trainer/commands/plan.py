"""``avd plan``: what a run needs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from avd_trainer.commands.options import Data, Method, Overrides, Preset, overrides_of, shards_of
from avd_trainer.runtime.terminal import readable_errors


def plan(
    preset: Preset,
    method: Method = None,
    gpus: Annotated[int, typer.Option(min=1, help="Number of GPUs.")] = 1,
    gpu_memory: Annotated[float, typer.Option(min=1, help="Memory of each, in GB.")] = 80.0,
    data: Data = None,
    size: Annotated[
        str | None, typer.Option(metavar="WxHxF", help="Size of a clip, where there is no --data: 832x480x81.")
    ] = None,
    clips: Annotated[int, typer.Option(min=1, help="Number of clips, where there is no --data.")] = 10_000,
    peak_tflops: Annotated[
        float | None,
        typer.Option(
            min=0.001,
            help="Peak of a GPU in TFLOP/s, dense, in the run's precision. Default: an H100 SXM's by its data sheet, "
            "989.5 in bfloat16, 67 in float32.",
        ),
    ] = None,
    utilisation: Annotated[
        float | None,
        typer.Option(min=0.001, max=1, help="Share of that peak that is reached. Default: 0.4, an assumption."),
    ] = None,
    measure: Annotated[
        bool, typer.Option("--measure", help="Time a few blocks on this machine's GPU in place of assuming its speed.")
    ] = False,
    set_: Overrides = None,
) -> None:
    """Say what a run needs: memory on each GPU and what to change if it does not fit, time, and disk.

    Loads no weights.
    """
    with readable_errors():
        from avd_trainer.config.loading import load_config
        from avd_trainer.training.config import TrainConfig

        # A preset can be planned before there is data: clips are then of Wan2.1's size.
        replace = shards_of(data) if data else {}
        config = load_config(
            TrainConfig, preset, overrides_of(set_, None), replace, shards_of([Path("none")]), method=method
        )
        from avd_trainer.planning.plan import make_plan
        from avd_trainer.planning.render import render

        made = make_plan(
            config,
            gpus=gpus,
            gpu_memory=gpu_memory,
            size=size,
            clips=clips,
            peak_tflops=peak_tflops,
            utilisation=utilisation,
            measure=measure,
        )
        Console().print(render(made), highlight=False)
