"""What real clips score on each measure, and what the controls score: the tables of docs/measures.md.

    .venv/bin/python benchmarks/measure_controls.py

Writes benchmarks/results/measure-controls.json, and prints the tables.
"""

import json
import time
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from avd_trainer.data.moving_shapes import MovingShapes
from avd_trainer.data.sources import HELD_OUT
from avd_trainer.evaluation.controls import CONTROLS, Encoded, controls_of_shapes
from avd_trainer.evaluation.measure_table import Row, markdown_table
from avd_trainer.evaluation.measures import MEASURES
from avd_trainer.evaluation.reference import Reference, Spread, caught, reference_of_shapes, score
from avd_trainer.models.codecs.block_dct import BlockDCTCodec
from avd_trainer.runtime.environment import environment

RESULTS = Path(__file__).parent / "results" / "measure-controls.json"


def main(
    captions: Annotated[int, typer.Option(help="Held-out captions.")] = 256,
    results: Annotated[Path, typer.Option(help="File to write.")] = RESULTS,
) -> None:
    shapes, codec = MovingShapes(captions, HELD_OUT, held_out=True), BlockDCTCodec()
    started = time.process_time()
    reference = reference_of_shapes(shapes, codec)
    seconds = time.process_time() - started
    words = [shapes[index].caption for index in range(captions)]
    controls = {name: score(each, words, reference) for name, each in controls_of_shapes(shapes, codec).items()}
    report = {
        "command": f"python benchmarks/measure_controls.py --captions {captions}",
        **environment(),
        "cpu_seconds_of_the_reference": round(seconds, 1),
        "sets": reference.sets,
        "clips": reference.clips,
        "real": {name: asdict(spread) for name, spread in reference.spreads.items()},
        "controls": controls,
        "caught": {name: caught(values, reference) for name, values in controls.items()},
    }
    results.write_text(json.dumps(report, indent=2) + "\n")
    print("\n".join(tables(report)))


def tables(report: dict[str, Any]) -> list[str]:
    """The headline measures, and the others, in Markdown."""
    spreads = {name: Spread(**spread) for name, spread in report["real"].items()}
    reference = Reference(spreads, report["sets"], report["clips"], Encoded(torch.empty(0), torch.empty(0)))
    rows = [Row(CONTROLS[name].title, values) for name, values in report["controls"].items()]
    others = [name for name, each in MEASURES.items() if not each.headline]
    return [markdown_table([], reference, rows), markdown_table([], reference, rows, names=others)]


if __name__ == "__main__":
    typer.run(main)
