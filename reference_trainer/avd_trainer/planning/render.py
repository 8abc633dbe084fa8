"""A plan for the terminal."""

from __future__ import annotations

from collections.abc import Iterator

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from avd_trainer.planning.disk import DiskPlan
from avd_trainer.planning.duration import TimePlan
from avd_trainer.planning.memory import GB, PARTS
from avd_trainer.planning.plan import Plan

SHORT_UPDATE = 1.0
"""Seconds of an update below which operations say little about its time."""


def render(plan: Plan) -> RenderableType:
    """Memory by part and phase with the verdict, what to change, time, and disk."""
    lines = [Text(line) for line in (*_verdict(plan), "")]
    return Group(
        _memory(plan),
        *lines,
        _sheet(f"Time on {plan.run.gpus} x {plan.time.speed.gpu}", _time(plan.time)),
        _sheet("Disk", _disk(plan.disk, plan.run.main)),
        *plan.notes,
    )


def _memory(plan: Plan) -> Table:
    table = Table(
        title=f"GB on each of {plan.run.gpus} GPU(s) of {plan.gpu_memory:g} GB",
        show_footer=True,
    )
    table.add_column("", footer="together")
    for phase in plan.memory:
        style = "bold" if phase is plan.worst else ""
        table.add_column(phase.name, footer=_gb(phase.needed), justify="right", style=style)
    for part in PARTS:
        table.add_row(part.replace("_", " "), *(_gb(getattr(phase, part)) for phase in plan.memory))
    return table


def _verdict(plan: Plan) -> Iterator[str]:
    verdict = "It fits" if plan.fits else "It does not fit"
    yield (
        f"{verdict}: the worst moment is {plan.worst.name}, with {_gb(plan.worst.needed)} GB of {plan.gpu_memory:g} "
        f"({_gb(plan.worst.allocated)} in tensors)."
    )
    if plan.changes:
        yield "What would change that:"
    for change in plan.changes:
        settings = " ".join(f"--set {setting}" for setting in change.settings)
        enough = "fits" if change.fits(plan.gpu_memory) else "too much"
        words = ", ".join(change.words)
        yield f"  {words}: {_gb(change.needed)} GB, {enough}" + (f" ({settings})" if settings else "")


def _sheet(title: str, rows: Iterator[tuple[str, str]]) -> Table:
    table = Table(title=title, title_justify="left", show_header=False, box=None, pad_edge=False)
    for row in rows:
        table.add_row(*row)
    return table


def _time(time: TimePlan) -> Iterator[tuple[str, str]]:
    forward, training = time.operations
    yield "an update", _duration(time.seconds_per_update)
    yield f"{time.updates:,} updates", f"{_duration(3600 * time.hours)}, {time.gpus * time.hours:,.3g} GPU hours"
    yield (
        "operations of a GPU in an update",
        f"{(forward + training) / 1e12:,.3g} TFLOP, of which {training / 1e12:,.3g} in passes with a backward pass",
    )
    yield "where from", time.speed.source
    yield "not in it", "sample clips, checkpoints, start"
    if time.seconds_per_update < SHORT_UPDATE:
        yield "", "an update this short waits for kernels to start rather than for arithmetic: expect many times that"


def _disk(disk: DiskPlan, main: str) -> Iterator[tuple[str, str]]:
    if disk.clips == 0:
        yield "clips", "none on disk: they are made when the run starts"
    elif disk.stored is not None:
        yield "clips, as they are", _bytes(disk.stored)
    else:
        yield (
            f"{disk.clips:,} clips, at most",
            f"{_bytes(disk.data)}: {_bytes(disk.latent)} a latent, "
            + (f"{_bytes(disk.image)} its first frame, " if disk.image else "")
            + f"up to {_bytes(disk.text)} a caption or prompt",
        )
    yield (
        f"{disk.checkpoints} checkpoint(s), at most",
        f"{_bytes(disk.checkpoints * disk.checkpoint)}: {_bytes(disk.checkpoint)} each",
    )
    yield f"the {main}", _bytes(disk.product)
    yield "together, at most", _bytes(disk.together)
    if disk.encoding is not None:
        yield (
            "encoding the clips",
            f"{disk.encoding / 1e12:,.3g} TFLOP a clip by the VAE, in float32",
        )
        yield "", "no time is given, as none was measured: encode 20 videos first, `avd data encode` shows its rate"


def _gb(size: int) -> str:
    return f"{size / GB:.1f}"


def _bytes(size: int) -> str:
    """In powers of ten, as disks are sold."""
    for unit, scale in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6)):
        if size >= scale:
            return f"{size / scale:,.1f} {unit}"
    return f"{size / 1e3:,.1f} kB"


def _duration(seconds: float) -> str:
    """In the unit that leaves a number between 2 and some hundred."""
    for unit, scale in (("days", 86400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * scale:
            return f"{seconds / scale:.3g} {unit}"
    return f"{seconds:.3g} s"
