"""What real clips score on each measure, and what the controls score: the tables of docs/measures.md.

    .venv/bin/python benchmarks/measure_controls.py

Writes benchmarks/results/measure-controls.json, of full captions, and measure-controls-open.json, of captions that name
the two shapes alone. Prints the tables.
"""

import json
import time
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from avd_trainer.config.sections import ShapeCaptions
from avd_trainer.data.moving_shapes import MovingShapes
from avd_trainer.data.sources import HELD_OUT
from avd_trainer.evaluation.controls import CONTROLS, Encoded, controls_of_shapes
from avd_trainer.evaluation.measure_table import Row, markdown_table
from avd_trainer.evaluation.measures import ALL_MEASURES
from avd_trainer.evaluation.reference import Reference, Spread, caught, reference_of_shapes, score
from avd_trainer.models.codecs.block_dct import BlockDCTCodec
from avd_trainer.runtime.environment import environment

FOLDER = Path(__file__).parent / "results"
RESULTS: dict[ShapeCaptions, Path] = {
    "full": FOLDER / "measure-controls.json",
    "subjects": FOLDER / "measure-controls-open.json",
}


def main(captions: Annotated[int, typer.Option(help="Held-out clips.")] = 256) -> None:
    for sort, results in RESULTS.items():
        report = measure_controls(sort, captions)
        results.write_text(json.dumps(report, indent=2) + "\n")
        print("\n".join(tables(report)))


def measure_controls(sort: ShapeCaptions, captions: int) -> dict[str, Any]:
    """What real and spoiled clips score whose captions are of one sort."""
    shapes, codec = MovingShapes(captions, HELD_OUT, held_out=True, captions=sort), BlockDCTCodec()
    started = time.process_time()
    reference = reference_of_shapes(shapes, codec)
    seconds = time.process_time() - started
    words = [shapes[index].caption for index in range(captions)]
    controls = {name: score(each, words, reference) for name, each in controls_of_shapes(shapes, codec).items()}
    return {
        "command": f"python benchmarks/measure_controls.py --captions {captions}",
        **environment(),
        "cpu_seconds_of_the_reference": round(seconds, 1),
        "sets": reference.sets,
        "clips": reference.clips,
        "real": {name: asdict(spread) for name, spread in reference.spreads.items()},
        "controls": controls,
        "caught": {name: caught(values, reference) for name, values in controls.items()},
    }


def tables(report: dict[str, Any]) -> list[str]:
    """The headline measures, and the others, in Markdown."""
    spreads = {name: Spread(**spread) for name, spread in report["real"].items()}
    reference = Reference(spreads, report["sets"], report["clips"], Encoded(torch.empty(0), torch.empty(0)))
    rows = [Row(CONTROLS[name].title, values) for name, values in report["controls"].items()]
    others = [name for name in spreads if not ALL_MEASURES[name].headline]
    return [markdown_table([], reference, rows), markdown_table([], reference, rows, names=others)]


if __name__ == "__main__":
    typer.run(main)
