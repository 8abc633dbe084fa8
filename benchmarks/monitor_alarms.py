"""Does CollapseMonitor say something of real clips, shown to it as a run of the study `methods` shows its samples?

    .venv/bin/python benchmarks/monitor_alarms.py

Every finding here is false. Writes to benchmarks/results/monitor-alarms.json of how many of 20 runs each kind is said,
for the ways in which methods show samples: in each step, and every tenth one. Takes a minute of a core.
"""

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import torch
import typer
from torch import Tensor

from avd_core import CollapseMonitor
from avd_core.callbacks.collapse import LatentStatistics
from avd_trainer.config.loading import load_config
from avd_trainer.data.sources import load_data
from avd_trainer.runtime.environment import environment
from avd_trainer.runtime.files import write_json
from avd_trainer.training.config import TrainConfig

PRESETS = ("tiny", "tiny-open")
SHOWN = {"each of 200 steps": (1, 200), "every 10th of 1083 steps": (10, 1083), "every 10th of 2166 steps": (10, 2166)}
RUNS, BATCH = 20, 8
RESULTS = Path(__file__).parent / "results" / "monitor-alarms.json"


def main(output: Annotated[Path, typer.Option(help="Where the results go.")] = RESULTS) -> None:
    """Show real clips to the monitor, with the limits and the patience of each preset."""
    torch.set_num_threads(1)
    said = {preset: {way: dict(count) for way, count in of_preset(preset)} for preset in PRESETS}
    write_json(output, {"runs": RUNS, "batch": BATCH, "runs_in_which_said": said, "environment": environment()})


def of_preset(preset: str) -> Iterator[tuple[str, Counter[str]]]:
    """By way of showing, in how many runs each kind of finding is said."""
    config = load_config(TrainConfig, preset, method="regression")
    architecture = config.method.transformer_config(config.teacher)
    clips = load_data(config.data, None, teacher=config.teacher, architecture=architecture).clips
    latents = torch.stack([latent for n in range(len(clips)) if (latent := clips[n].latent) is not None])
    for way, (every, steps) in SHOWN.items():
        yield way, Counter(kind for seed in range(RUNS) for kind in kinds_said(config, latents, every, steps, seed))


def kinds_said(config: TrainConfig, latents: Tensor, every: int, steps: int, seed: int) -> set[str]:
    """What the monitor says of batches of clips that are drawn anew for each look."""
    monitor = CollapseMonitor(LatentStatistics.measure(latents), grace=config.grace, patience=config.patience)
    draws = torch.Generator().manual_seed(seed)
    for step in range(1, steps + 1):
        shown = latents[torch.randint(len(latents), (BATCH,), generator=draws)]
        monitor.after_step(step, {"x_0": shown} if step % every == 0 else {})
    assert monitor.samples_judged
    return {finding.kind for finding in monitor.findings}


if __name__ == "__main__":
    typer.run(main)
