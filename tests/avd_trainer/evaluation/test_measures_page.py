"""docs/measures.md shows what the saved results say, and its example runs."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from avd_trainer.config.sections import ShapeCaptions
from avd_trainer.data.moving_shapes import MovingShapes
from avd_trainer.evaluation.measures import ALL_MEASURES, IMAGE_MEASURES, MEASURES, OPEN_MEASURES, Measure
from avd_trainer.evaluation.video_measures import VIDEO_MEASURES
from avd_trainer.models.codecs.block_dct import BlockDCTCodec
from measure_controls import RESULTS, tables

PAGE = (Path(__file__).parents[3] / "docs" / "measures.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("sort", RESULTS)
def test_the_tables_are_those_of_the_saved_results(sort: ShapeCaptions) -> None:
    for table in tables(json.loads(RESULTS[sort].read_text())):
        assert table.strip() in PAGE


def test_every_measure_has_its_row() -> None:
    explained, _, _ = PAGE.partition("## What the controls score")
    first_cells = re.findall(r"^\| ([a-zA-Z *]+) \|", explained, re.MULTILINE)
    captioned = [_cell(name) for name, each in MEASURES.items() if each.needs_captions]
    others = [_cell(name) for name, each in MEASURES.items() if not each.needs_captions]
    of_images = [_cell(name) for name in IMAGE_MEASURES]
    of_open_captions = [_cell(name) for name in OPEN_MEASURES]
    headed = [["measure", *rows] for rows in (captioned, others, of_images, of_open_captions)]
    assert first_cells == [cell for rows in headed for cell in rows]


def test_every_measure_of_videos_has_its_row() -> None:
    page = (Path(__file__).parents[3] / "docs" / "evaluate.md").read_text(encoding="utf-8")
    first_cells = re.findall(r"^\| ([a-z *]+) \|", page, re.MULTILINE)
    assert first_cells == ["measure", *(_shown(each) for each in VIDEO_MEASURES.values())]


def _cell(name: str) -> str:
    return _shown(ALL_MEASURES[name])


def _shown(measure: Measure) -> str:
    words = measure.name.replace("_", " ")
    return f"**{words}**" if measure.headline else words


def test_the_example_runs() -> None:
    (code,) = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    clips = MovingShapes(6, seed=1, held_out=True)
    latents = BlockDCTCodec().encode(torch.stack([clips.render(index, 50).video for index in range(6)]))
    scope: dict[str, Any] = {"latents": latents}
    exec(code.replace("MovingShapes(64", "MovingShapes(6"), scope)
    assert list(scope["values"]) == list(MEASURES)
