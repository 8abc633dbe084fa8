"""``avd evaluate``: the measures of the studies, of any student of the tiny preset."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from avd_trainer.commands.compare import titles_of
from avd_trainer.commands.sample import Device
from avd_trainer.runtime.terminal import readable_errors, say


def evaluate(
    students: Annotated[
        list[Path], typer.Argument(help="One or more: --output folders of avd export, or finished runs.")
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for table, figure and values.")],
    captions: Annotated[int, typer.Option(min=2, help="Held-out captions, of which clips are made.")] = 64,
    noises: Annotated[int, typer.Option(min=1, help="Clips of each caption.")] = 2,
    seed: Annotated[int, typer.Option(min=0, help="Of their noise, which all students share.")] = 0,
    device: Device = None,
) -> None:
    """Measure students on captions of moving shapes that none was trained on, beside real and spoiled clips.

    Leaves measures.md, measures.png and measures.json. For students of the tiny preset.
    """
    with readable_errors():
        from avd_trainer.evaluation.measure_table import rich_table
        from avd_trainer.inference.choices import choose_device
        from avd_trainer.inference.students import open_student_or_run
        from avd_trainer.runtime.files import claim_folder
        from avd_trainer.studies.definition import StudyEvaluationConfig
        from avd_trainer.studies.students import evaluate_students, save_evaluation

        opened = dict(zip(titles_of(students), map(open_student_or_run, students), strict=True))
        where = choose_device(device)
        claim_folder(output)
        options = StudyEvaluationConfig(captions=captions, noises=noises)
        evaluated = evaluate_students(opened, options, seed=seed, device=where)
        save_evaluation(evaluated, output)
        Console().print(rich_table(evaluated.rows, evaluated.reference, evaluated.controls))
        say(f"Table, figure and values are in {output}.")
