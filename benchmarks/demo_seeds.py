"""The demo over several seeds: what its four measures say of AVD and of DMD alone.

    .venv/bin/python benchmarks/demo_seeds.py --output runs/seeds

Writes benchmarks/results/demo-seeds.json. ``avd_closer`` in it compares with one draw of the real clips;
docs/tiny-preset.md says what these measures cannot see.
"""

import json
import resource
import time
from pathlib import Path
from typing import Annotated, Any

import typer

from avd_trainer.config.loading import load_config
from avd_trainer.evaluation.clip_metrics import ClipMetrics
from avd_trainer.runtime.environment import environment
from avd_trainer.runtime.ranks import join_ranks
from avd_trainer.studies.demo import DemoConfig, run_demo

RESULTS = Path(__file__).parent / "results" / "demo-seeds.json"


def main(
    output: Annotated[Path, typer.Option(help="Folder for the runs.")],
    seeds: Annotated[str, typer.Option(help="Comma-separated.")] = "0,1,2",
    results: Annotated[Path, typer.Option(help="File to write.")] = RESULTS,
) -> None:
    runs: dict[str, Any] = {}
    for seed in map(int, seeds.split(",")):
        started = time.monotonic()
        config = load_config(DemoConfig, "tiny", [f"seed={seed}"])
        with join_ranks() as ranks:
            metrics = run_demo(config, output / str(seed), ranks)
        closer = {}
        for name in ("saturation", "temporal_loss", "distance"):
            dmd, avd = (distance_to_real(metrics, run, name) for run in ("dmd", "avd"))
            closer[name] = avd < dmd
        runs[str(seed)] = {
            "seconds": round(time.monotonic() - started, 1),
            "metrics": {name: row.model_dump() for name, row in metrics.items()},
            "avd_closer": closer,
        }
        report = {
            "command": f"python benchmarks/demo_seeds.py --seeds {seeds}",
            **environment(),
            "peak_memory_gb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024**2, 2),
            "seeds": runs,
        }
        results.parent.mkdir(exist_ok=True)
        results.write_text(json.dumps(report, indent=2) + "\n")


def distance_to_real(metrics: dict[str, ClipMetrics], run: str, name: str) -> float:
    """The energy distance is one already; the others are compared with the real clips' value."""
    value = float(getattr(metrics[run], name))
    return value if name == "distance" else abs(value - float(getattr(metrics["real"], name)))


if __name__ == "__main__":
    typer.run(main)
