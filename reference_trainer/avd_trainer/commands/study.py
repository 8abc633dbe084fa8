"""``avd study``: an experiment of many runs, and what it found."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from avd_trainer.commands.options import Overrides
from avd_trainer.runtime.errors import UserError
from avd_trainer.runtime.terminal import readable_errors, say
from avd_trainer.studies.catalog import list_studies

NAME_HELP = f"A study ({', '.join(list_studies())}) or a folder with a study.yaml."


def study(
    name: Annotated[str, typer.Argument(help=NAME_HELP)],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for everything that the study writes.")],
    seeds: Annotated[
        str | None,
        typer.Option(help="Seeds of training: a range or a list, such as 1,3,7. Without it, those of the study."),
    ] = None,
    jobs: Annotated[
        int,
        typer.Option(min=0, help="Processes, each with one thread. 0 only makes the tables again of what is there."),
    ] = 1,
    variants: Annotated[str | None, typer.Option(help="Which variants, such as dmd,teacher; all without it.")] = None,
    baseline: Annotated[
        str | None, typer.Option(help="The variant that all others are compared with; without it, as the study does.")
    ] = None,
    reuse: Annotated[
        list[Path] | None,
        typer.Option(help="Folder of another study: students of the same values are copied, and measures. Repeatable."),
    ] = None,
    clips: Annotated[
        int | None,
        typer.Option(min=1, help="Also draw so many clips of each variant, of the first seed, into clips.png."),
    ] = None,
    set_: Overrides = None,
) -> None:
    """Train the variants of a study with several seeds, measure their students, and compare them.

    One that was stopped goes on by the same command, also from several machines at once that share a folder.
    """
    with readable_errors():
        # Before PyTorch loads: as many processes as cores do more than one process with as many threads, and the number
        # of threads changes results in the last digit.
        os.environ["OMP_NUM_THREADS"] = "1"
        from avd_trainer.runtime.processes import FailedProcessError
        from avd_trainer.studies.definition import load_study, parse_seeds
        from avd_trainer.studies.reuse import measures_as
        from avd_trainer.studies.reuse import reuse as reuse_study
        from avd_trainer.studies.runner import SAVED, FailedUnitsError, run_study
        from avd_trainer.studies.sheet import CLIPS, check_count, save_clips
        from avd_trainer.studies.summary import FIGURE, RESULTS, TABLE, write_summary
        from avd_trainer.studies.units import StoppedError

        found = load_study(name, set_ or [], None if variants is None else variants.split(","), baseline)
        chosen = parse_seeds(found.config.seeds if seeds is None else seeds)
        if jobs == 0 and not (output / SAVED).exists():
            raise UserError(f"{output} holds no study whose tables could be made again. Leave --jobs 0 out.")
        if clips is not None:
            check_count(found, clips)
        try:
            for other in reuse or []:
                copied = reuse_study(found, output, other, chosen)
                say(f"Of {other}: {', '.join(map(str, copied)) or 'nothing that is not here already'}.")
                if copied and not measures_as(found, other):
                    say("It measures otherwise: what it has trained is measured anew.")
            stopped = jobs > 0 and not run_study(found, output, chosen, jobs=jobs)
        except StoppedError:  # before anything could be copied
            stopped = True
        except (FailedProcessError, FailedUnitsError):
            write_summary(found, output, chosen)
            raise
        write_summary(found, output, chosen)
        shown = clips is not None and not stopped and save_clips(found, output, chosen, clips)
        if stopped:
            say(f"Stopped on request, saved in {output}. Run the same command again to go on.")
        say(f"Table: {output / TABLE}. Figure: {output / FIGURE}. Numbers: {output / RESULTS}.")
        if shown:
            say(f"Clips: {output / CLIPS}.")
