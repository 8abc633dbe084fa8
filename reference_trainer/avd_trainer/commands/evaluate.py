"""``avd evaluate``: the measures of the studies, of any student of the tiny preset."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from avd_trainer.commands.compare import titles_of
from avd_trainer.commands.sample import Device
from avd_trainer.runtime.errors import UserError
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

        _check_folders(students, output)
        opened = dict(zip(titles_of(students), map(open_student_or_run, students), strict=True))
        where = choose_device(device)
        claim_folder(output)
        options = StudyEvaluationConfig(captions=captions, noises=noises)
        evaluated = evaluate_students(opened, options, seed=seed, device=where)
        save_evaluation(evaluated, output)
        Console().print(rich_table(evaluated.rows, evaluated.reference))
        say(f"Table, figure and values are in {output}.")


def _check_folders(students: Sequence[Path], output: Path) -> None:
    """See that each student is given once, and that ``output`` is no student itself.

    Raises:
        UserError: If it is not so.
    """
    from avd_trainer.training.export import ABOUT
    from avd_trainer.training.folder import method_of_run

    for place, student in enumerate(students):
        if student.resolve() in {other.resolve() for other in students[:place]}:
            raise UserError(f"{student} is given twice. Pass each student once.")
    if (output / ABOUT).is_file() or method_of_run(output) is not None:
        raise UserError(
            f"--output {output} holds an export or a run, which this would mix with its table. Choose another folder."
        )
