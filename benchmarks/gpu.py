"""All that wants a GPU, in order of value, within a number of minutes.

    python -m benchmarks.gpu --output benchmarks/results --minutes 25
    python -m benchmarks.gpu --output DIR --rehearse

Each part is a process with a time limit of its own and writes its figures when it has them, so that one that fails or
hangs costs nothing but its own time. ``gpu-day.json`` says after each part what became of all. Logs and the study, with
its ``results.json``, are in the folder ``runs`` beside it, which git ignores; a study that was stopped goes on by the
same command. ``--rehearse`` runs the same commands on the CPU, with options added that make all small: figures mean
nothing, but what would fail for a typing error fails here. Weights are random, and nothing is downloaded.
"""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import torch
import typer

from avd_trainer.runtime.environment import environment
from avd_trainer.runtime.files import write_json

ROOT = Path(__file__).parent.parent
REPORT = "gpu-day.json"
RUNS = "runs"
"""Folder of what is no result to keep. ``.gitignore`` has this name."""
LOGS = "gpu-day-logs"
TAIL = 2000
"""Characters of a part's output that the report holds."""
LEAST_SECONDS = 20.0
"""A part is not begun with less time than this: importing alone takes so long."""


class Part(NamedTuple):
    """One thing to measure.

    Attributes:
        name: Of its log and its entry in the report.
        minutes: It is stopped after so many.
        arguments: What Python is given, with the folder for results.
        rehearsal: Options to add for a size that a CPU can do; of one that is given twice the last counts.
    """

    name: str
    minutes: float
    arguments: Callable[[Path], Sequence[str]]
    rehearsal: Sequence[str] = ()


def _script(name: str, result: str, *options: str) -> Callable[[Path], Sequence[str]]:
    return lambda output: [f"benchmarks/{name}.py", *options, "--results", str(output / f"{result}.json")]


def _study(result: str, *options: str) -> Callable[[Path], Sequence[str]]:
    return lambda output: ["-m", "avd_trainer", "study", "table2", "--output", str(output / RUNS / result), *options]


_SMALL = ("--small", "--size", "64x64x9")
PARTS = (
    Part(
        "tests",
        3,
        lambda _: ["-m", "pytest", "-q", "-m", "gpu", "tests"],
        [f"--ignore-glob=tests/{other}" for other in ("test_*", "avd_[it]*", "hosts")],  # to collect less
    ),
    Part(
        "update of 1.3B, LoRA",
        5,
        _script("train_step", "train-step-gpu-wan2.1-1.3b-lora", "--preset", "wan2.1-1.3b", "--lora", "--updates", "3"),
        [*_SMALL, "--updates", "1"],
    ),
    Part(
        "half rate of 1.3B",
        3,
        _script("sampling", "sampling-speed-gpu", "--part", "speed", "--device", "cuda", "--preset", "wan2.1-1.3b"),
        [*_SMALL, "--device", "cpu", "--repetitions", "1"],
    ),
    Part(
        "update of 1.3B, full",
        6,
        _script("train_step", "train-step-gpu-wan2.1-1.3b-full", "--preset", "wan2.1-1.3b", "--updates", "3"),
        [*_SMALL, "--updates", "1"],
    ),
    Part(
        "losses",
        2,
        lambda output: [
            *("-m", "pytest", "-q", "--benchmark-only", "benchmarks/test_losses.py"),
            f"--losses-results={output / 'losses-gpu.json'}",
        ],
    ),
    Part(
        "interpolation",
        2,
        _script("sampling", "sampling-interpolation-gpu", "--part", "interpolation", "--device", "cuda"),
        ["--device", "cpu", "--repetitions", "1"],
    ),
    Part(
        "decoding",
        3,
        _script("decoding", "decoding-gpu", "--device", "cuda"),
        [*_SMALL, "--device", "cpu"],
    ),
    Part(
        "study",
        8,
        _study("study-table2-gpu", "--variants", "dmd-tuned,avd-absolute", "--seeds", "1,2", "--jobs", "4"),
        [
            *("--variants", "dmd-tuned", "--seeds", "1", "--jobs", "1", "--set", "max_steps=1"),
            *("--set", "data.clips=16", "--set", "evaluation.captions=8", "--set", "evaluation.noises=1"),
            *("--set", "evaluation.renderings=3"),
        ],
    ),
)


def main(
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for results.")],
    minutes: Annotated[float, typer.Option(min=0.5, help="How long all parts may take.")] = 25.0,
    rehearse: Annotated[bool, typer.Option("--rehearse", help="Every part on the CPU, at tiny sizes.")] = False,
) -> None:
    """Measure on a GPU what wants one, the most valuable first."""
    if not rehearse and not torch.cuda.is_available():
        raise typer.BadParameter("There is no GPU here. Add --rehearse to try the parts at tiny sizes on the CPU.")
    entries = run_parts(PARTS, output.resolve(), seconds=60 * minutes, rehearse=rehearse)
    raise typer.Exit(int(any(entry["outcome"] not in ("done", "no time left") for entry in entries)))


def run_parts(parts: Sequence[Part], output: Path, *, seconds: float, rehearse: bool) -> list[dict[str, Any]]:
    """Run parts one after the other and keep the report up to date.

    Args:
        parts: In order of value.
        output: Folder for results.
        seconds: For all of them; one that could only start with less than :data:`LEAST_SECONDS` left is left out.
        rehearse: On the CPU, at tiny sizes.

    Returns:
        The report's entry of each part; its ``outcome`` is ``done``, ``failed``, ``stopped`` or ``no time left``.
    """
    (output / RUNS / LOGS).mkdir(parents=True, exist_ok=True)
    deadline = time.monotonic() + seconds
    entries: list[dict[str, Any]] = []
    for part in parts:
        left = deadline - time.monotonic()
        if left < LEAST_SECONDS:
            entry: dict[str, Any] = {"part": part.name, "outcome": "no time left"}
        else:
            entry = run_part(part, output, min(left, 60 * part.minutes), rehearse=rehearse)
        entries.append(entry)
        typer.echo(f"{part.name}: {entry['outcome']}" + (f", {entry['seconds']} s" if "seconds" in entry else ""))
        write_json(output / REPORT, {**environment(), "rehearsal": rehearse, "parts": entries})
    return entries


def run_part(part: Part, output: Path, seconds: float, *, rehearse: bool) -> dict[str, Any]:
    """Run a part, and end it with all that it has started when its time is over."""
    arguments = [*part.arguments(output), *(part.rehearsal if rehearse else ())]
    command = [sys.executable, *arguments]
    own = os.environ | ({"CUDA_VISIBLE_DEVICES": ""} if rehearse else {})
    log = output / RUNS / LOGS / f"{part.name.replace(' ', '-').replace(',', '')}.txt"
    started = time.monotonic()
    with (
        log.open("w") as file,
        subprocess.Popen(
            command, cwd=ROOT, env=own, stdout=file, stderr=subprocess.STDOUT, start_new_session=True
        ) as process,
    ):
        try:
            outcome = "failed" if process.wait(seconds) else "done"
        except subprocess.TimeoutExpired:
            outcome = "stopped"
        finally:
            _end_group(process.pid)
    text = log.read_text(errors="replace")
    return {
        "part": part.name,
        "outcome": outcome,
        "seconds": round(time.monotonic() - started, 1),
        "limit_seconds": round(seconds, 1),
        "command": shlex.join(["python", *arguments]),
        **({} if outcome == "done" else {"output": text[-TAIL:]}),
    }


def _end_group(leader: int) -> None:
    """Also what the process has started: it would hold the GPU's memory."""
    with suppress(ProcessLookupError):
        os.killpg(leader, signal.SIGKILL)


if __name__ == "__main__":
    typer.run(main)
