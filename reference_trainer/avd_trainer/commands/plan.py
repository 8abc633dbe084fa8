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
    set_: Overrides = None,
) -> None:
    """Say what a run needs on each GPU, part by part, and what to change if it does not fit. Loads no weights."""
    with readable_errors():
        from avd_trainer.config.loading import load_config
        from avd_trainer.training.config import TrainConfig

        # A preset can be planned before there is data: clips are then of Wan2.1's size.
        replace = {} if data is None else shards_of(data)
        config = load_config(
            TrainConfig, preset, overrides_of(set_, None), replace, shards_of(Path("none")), method=method
        )
        from avd_trainer.planning.memory import (
            find_architecture,
            find_latent_shape,
            find_text_length,
            render,
            wan_latent_shape,
        )
        from avd_trainer.planning.memory import plan as make_plan

        result = make_plan(
            config,
            find_architecture(config.teacher),
            find_latent_shape(config) if size is None else wan_latent_shape(size),
            gpus=gpus,
            gpu_memory=gpu_memory,
            text_length=find_text_length(config),
        )
        Console().print(render(result))
