"""What the students of a study make, as a picture: ``clips.png``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from avd_trainer.runtime.errors import UserError
from avd_trainer.runtime.files import read_json
from avd_trainer.runtime.progress import ProgressBar
from avd_trainer.runtime.ranks import join_ranks
from avd_trainer.runtime.signals import StopSignals
from avd_trainer.studies.definition import SECONDS, Study, Unit
from avd_trainer.studies.pictures import save_sheet
from avd_trainer.studies.runner import UNITS, result_file
from avd_trainer.studies.units import StoppedError, Workplace

CLIPS = "clips.png"
FRAMES = 6


def check_count(study: Study, count: int) -> None:
    """Refuse more clips than are held out.

    Raises:
        UserError: If there are fewer.
    """
    if count > (captions := study.config.evaluation.captions):
        raise UserError(f"--clips {count} is more than the {captions} that are held out. Ask for {captions} at most.")


def save_clips(study: Study, folder: Path, seeds: Sequence[int], count: int) -> bool:
    """Write ``clips.png``: real clips, and below them what each variant makes of the same captions and noise.

    The first held-out captions, so that nobody has chosen them, and the first seed. Of variants that share a budget,
    those of the first one. What diverged, or is not done, has no row.

    Args:
        study: What is shown.
        folder: The study's, done or not.
        seeds: Of which the first is shown.
        count: Clips of each variant, at least 1.

    Returns:
        Whether there was something to show, and nobody asked to stop.

    Raises:
        UserError: If a student that is done is not there any more.
    """
    shown = [name for name in study.order if name in study.worked_on and not name.endswith(SECONDS)]
    units = [
        unit
        for unit in (Unit(name, seeds[0]) for name in shown if study.is_measured(name))
        if result_file(folder, unit).exists() and "failed" not in read_json(result_file(folder, unit))
    ]
    if not units:
        return False
    with StopSignals() as signals, join_ranks() as ranks, ProgressBar("clips", len(units)) as bar:
        place = Workplace(study, folder / UNITS, ranks, lambda: signals.received is not None)
        real, captions = place.show_real(count)
        videos = {"real clips": real}
        try:
            for unit in units:
                videos[unit.variant] = place.show(unit, count)
                bar.advance()
        except StoppedError:
            return False
    title = f"{study.name}, seed {seeds[0]}: the first held-out captions, one noise for all rows; time to the right"
    save_sheet(videos, captions, title, folder / CLIPS, FRAMES)
    return True
