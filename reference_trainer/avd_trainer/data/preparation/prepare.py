"""From raw videos to a training set: score all clips, decide, make what the kept ones need, write shards."""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from avd_trainer.data.preparation.clip_reader import OpenReader, VideoReader
from avd_trainer.data.preparation.engine import Engine
from avd_trainer.data.preparation.journal import Journal
from avd_trainer.data.preparation.local_engine import LocalEngine
from avd_trainer.data.preparation.recipe import Chosen, Recipe, load_recipe
from avd_trainer.data.preparation.schedule import Schedule, list_videos, part_of, sample_of
from avd_trainer.data.preparation.selection import Selection, finish, select
from avd_trainer.data.preparation.summary import Advice, Summary, list_names, summarise
from avd_trainer.models.pipeline_parts import TINY
from avd_trainer.runtime.errors import UserError
from avd_trainer.runtime.files import read_json, write_json, write_text
from avd_trainer.runtime.progress import ProgressBar

logger = logging.getLogger(__name__)

RECIPE = "recipe.yaml"
SOURCE = "prepared.json"
DATA = "data"
"""Folder of the data set within that of the prepared videos."""
SELECTION = "selection.json"
ADVICE = Advice("--set clip.frames={}", "Choose other thresholds by --set, or leave a stage out by --set STAGE=off.")


class Forecast(NamedTuple):
    """What all files would take, judged by a sample.

    Attributes:
        files: Files of the sample, and all.
        bytes: Of the sample's files, and of all.
        core_hours: Of all files: time of decoding and stages, on one worker.
        gigabytes: 10^9 bytes for the latents and text embeddings of the kept clips, which shards need again.
    """

    files: tuple[int, int]
    bytes: tuple[int, int]
    core_hours: float
    gigabytes: float


class Prepared(NamedTuple):
    """What a run came to.

    Attributes:
        selection: What was kept, and why the rest was not.
        summary: The same in a few lines.
        data: Folders of shards with their clips; empty where none were to be written.
        unchanged: Whether the shards were there already.
        forecast: Of a sample.
    """

    selection: Selection
    summary: Summary
    data: Mapping[Path, int]
    unchanged: bool = False
    forecast: Forecast | None = None


class Workers(NamedTuple):
    """Who works.

    Attributes:
        processes: Number of processes.
        gpus: Number of GPUs; stages that want one get a pass of their own, with a process for each.
        open_reader: How clips are read.
        engine: Where the processes run.
    """

    processes: int
    gpus: int = 0
    open_reader: OpenReader = VideoReader
    engine: type[Engine[Any]] = LocalEngine


def prepare(
    videos: Path,
    output: Path,
    recipe: Recipe,
    workers: Workers,
    *,
    sample: float | None = None,
    part: tuple[int, int] | None = None,
    retry: bool = False,
    advice: Advice = ADVICE,
) -> Prepared:
    """Prepare a folder of videos; the same call goes on where an earlier one stopped.

    Args:
        videos: Searched recursively.
        output: Folder for everything that is made.
        recipe: What is done.
        workers: Who does it.
        sample: Share of the files to work on, for a forecast; no shards are written.
        part: ``(i, n)``: work on the i-th of n parts alone, and only score. A call without it merges them.
        retry: Try again what failed for good, such as where a decoder crashed that has been updated since.
        advice: What to do where no clip is left.

    Raises:
        UserError: If there are no videos, no clip is left, something that a stage needs is missing, another process
            works on the folder, or it cannot be written to.
        StoppedError: On Ctrl-C.
    """
    every = list_videos(videos)
    paths = every if part is None else part_of(every, *part)
    paths = paths if sample is None else sample_of(paths, sample)
    _expect_all_at_hand(recipe, survivors=part is None)
    with Journal(output, part) as journal:
        _expect_same_videos(videos, output)
        write_text(output / RECIPE, recipe.to_yaml())
        write_json(output / SOURCE, {"videos": str(videos.absolute())})
        if sample is None:
            _forget_others(journal, every, videos)
        work = _Work(journal, recipe, videos, paths, workers, look=True, retry=retry, tried=set())
        _score(work)
        selection = _finish(work) if part is None else select(journal, recipe, finished=False)
        done = Prepared(selection, summarise(journal, recipe, selection, videos), {})
        if part is not None:
            return done
        if sample is not None:
            return done._replace(forecast=_forecast(journal, recipe, videos, paths, every))
        if "latents" not in recipe.stages:
            return done
        done.summary.expect_clips(advice)
        return _write(journal, recipe, done, output / DATA, replace=True)


def select_again(prepared: Path, output: Path, overrides: Sequence[str], workers: Workers) -> Prepared:
    """Decide again with other values, and write the clips that are then kept.

    What a changed value needs is run: nothing for thresholds, but captions and latents of clips that were not kept
    before; for other settings the stage and those that read it.

    Args:
        prepared: Folder that :func:`prepare` made.
        output: Folder of the new data set.
        overrides: ``key=value`` on top of the recipe of ``prepared``.
        workers: Who works.

    Raises:
        UserError: As :func:`prepare`, or if ``output`` holds anything.
    """
    from avd_trainer.data.shard_writing import expect_no_shards

    for folder in (output, *(path for path in output.glob("*") if path.is_dir())):  # clips of each size have their own
        expect_no_shards(folder)
    if output.exists() and not (output.is_dir() and not any(output.iterdir())):
        raise UserError(f"--output {output} holds something else already. Choose a folder that is empty or not there.")
    with Journal(prepared, write=False):
        pass  # says what to do if there is none, and makes none
    recipe = load_recipe(prepared / RECIPE, overrides)
    if "latents" not in recipe.stages:
        raise UserError(
            "The recipe makes no latents, which shards are made of. Prepare the videos with a recipe that has caption, "
            "latents and text; what was scored is not scored again."
        )
    _expect_all_at_hand(recipe, survivors=True)
    videos = Path(read_json(prepared / SOURCE)["videos"])
    with Journal(prepared) as journal:
        paths = [file.path for file in journal.files()]
        work = _Work(journal, recipe, videos, paths, workers, look=False, retry=False, tried=set())
        _score(work)
        selection = _finish(work)
        done = Prepared(selection, summarise(journal, recipe, selection, videos), {})
        done.summary.expect_clips(ADVICE)
        return _write(journal, recipe, done, output, replace=False)


class _Work(NamedTuple):
    """What a run works on; ``look``, ``retry`` and ``tried`` as of :class:`Schedule`."""

    journal: Journal
    recipe: Recipe
    videos: Path
    paths: Sequence[str]
    workers: Workers
    look: bool
    retry: bool
    tried: set[tuple[str, str]]


def _score(work: _Work) -> None:
    """Run what all clips get."""
    _run(work, list(work.recipe.of_clips(survivors=False)), None)


def _finish(work: _Work) -> Selection:
    """Decide, and run what the kept clips get."""
    scored = select(work.journal, work.recipe, finished=False)
    kept = {clip.id: clip.path for clip in scored.kept}
    of_kept = sorted(set(kept.values()) & set(work.paths))
    _run(work._replace(paths=of_kept), list(work.recipe.of_clips(survivors=True)), kept.keys())
    return finish(scored, work.journal, work.recipe)


def _run(work: _Work, stages: Sequence[Chosen], clips: Collection[str] | None) -> None:
    """Run stages: those that want a GPU in a pass of their own where there is one."""
    gpus = work.workers.gpus
    on_gpu = [chosen.stage.name for chosen in stages if chosen.wants_gpu and gpus]
    elsewhere = [chosen.stage.name for chosen in stages if chosen.stage.name not in on_gpu]
    passes = [(elsewhere, work.workers.processes, 0)] if elsewhere or clips is None else []
    passes += [(on_gpu, gpus, gpus)] if on_gpu else []
    what = "scoring" if clips is None else "captions and latents"
    for names, processes, of_gpus in passes:
        with ProgressBar(f"{what}, files", len(work.paths)) as bar:
            schedule = Schedule(
                work.journal,
                work.recipe,
                work.videos,
                work.paths,
                names,
                clips,
                bar.advance,
                look=work.look,
                tried=work.tried,
                retry=work.retry,
            )
            engine = work.workers.engine(
                work.recipe,
                work.journal.folder,
                processes,
                gpus=of_gpus,
                open_reader=work.workers.open_reader,
            )
            engine.run(schedule)


def _write(journal: Journal, recipe: Recipe, done: Prepared, output: Path, *, replace: bool) -> Prepared:
    """Write the shards of the kept clips, of which there is one at least.

    They get their place when all are whole, those of each size at once: what a kill leaves of them is done again, and
    shards of another selection stay until then.
    """
    from avd_trainer.data.preparation.shards import fingerprint, write_shards
    from avd_trainer.data.schema import UNFINISHED
    from avd_trainer.data.shard_writing import writable

    clips = done.selection.kept
    key = fingerprint(recipe, clips)
    known = output / SELECTION
    if replace and known.is_file():
        before = read_json(known)
        if before["fingerprint"] == key:
            there = {output / name: rows for name, rows in before["data"].items()}
            return done._replace(data=there, unchanged=True)
    new = output.with_name(output.name + UNFINISHED)
    shutil.rmtree(new, ignore_errors=True)
    with ProgressBar("writing clips", len(clips)) as bar:
        written = write_shards(journal, recipe, clips, new, bar.advance)
    data = {str(folder.relative_to(new)): rows for folder, rows in written.items()}
    write_text(new / RECIPE, recipe.to_yaml())
    prepared = os.path.relpath(journal.folder, output) if replace else str(journal.folder.absolute())
    write_json(new / SELECTION, {"fingerprint": key, "data": data, "prepared": prepared})
    if replace:
        shutil.rmtree(output, ignore_errors=True)
    with writable(output):
        new.rename(output)
    return done._replace(data={output / name: rows for name, rows in data.items()})


def _expect_all_at_hand(recipe: Recipe, *, survivors: bool) -> None:
    """See that no stage lacks anything; a part of a run, which only scores, needs nothing for captions and latents."""
    missing = [
        lack
        for chosen in recipe.stages.values()
        if (survivors or not chosen.stage.of_survivors)
        and (lack := chosen.stage(chosen.settings, recipe.head.clip).missing()) is not None
    ]
    if missing:
        raise UserError("Something is missing:\n" + "\n".join(f"  {lack}" for lack in missing))
    if "latents" in recipe.stages:
        from avd_trainer.data.preparation.shards import expect_encodable

        expect_encodable(recipe)


def _expect_same_videos(videos: Path, output: Path) -> None:
    """See that a folder is not filled from other videos, which would replace what it holds."""
    if not (output / SOURCE).is_file():
        return
    before = Path(read_json(output / SOURCE)["videos"])
    if before.resolve() != videos.resolve():
        raise UserError(
            f"{output} was prepared from {before}, not from {videos}, whose clips would replace those that it holds. "
            f"Choose another --output; if the videos were moved, write their new folder into {output / SOURCE}."
        )


def _forget_others(journal: Journal, paths: Sequence[str], videos: Path) -> None:
    """Files that are no longer there; what was found in them stays, by their bytes."""
    there = set(paths)
    gone = [file.path for file in journal.files() if file.path not in there]
    for path in gone:
        journal.remove_file(path)
    if gone:
        logger.warning(
            "%d files that were prepared before are no longer in %s (%s): their clips are left out.",
            len(gone),
            videos,
            list_names(tuple(gone)),
        )


def _forecast(journal: Journal, recipe: Recipe, videos: Path, paths: Sequence[str], every: Sequence[str]) -> Forecast:
    from avd_trainer.data.preparation.worker import DECODING, arrays_path

    sizes = {path: _size(videos / path) for path in every}
    sampled, total = sum(sizes[path] for path in paths), sum(sizes.values())
    times = total / max(1, sampled)
    files = {file.sha256 for name in paths if (file := journal.file(name)) is not None and file.sha256 is not None}
    starts = {sha256[:16] for sha256 in files}
    seconds, stored = 0.0, 0
    for name, digest in [(DECODING, ""), *((name, chosen.digest) for name, chosen in recipe.stages.items())]:
        for row, _, took in journal.outcomes(name, digest):
            if row[:16] in starts:
                seconds += took
                path = arrays_path(journal.folder, name, digest, row)
                stored += _size(path) if name in recipe.stages and recipe.stages[name].stage.makes_arrays else 0
    return Forecast((len(paths), len(every)), (sampled, total), seconds * times / 3600, stored * times / 1e9)


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0


def default_processes(recipe: Recipe, gpus: int, cores: int) -> int:
    """One for each core at hand; a single one if it runs models that want a GPU and there is none,
    since each process loads them."""
    on_cores = [chosen for chosen in recipe.stages.values() if chosen.wants_gpu and not gpus]
    return 1 if any(getattr(chosen.settings, "model", TINY) != TINY for chosen in on_cores) else cores


def count_gpus(recipe: Recipe) -> int:
    """GPUs at hand, if a stage of the recipe wants one; only then PyTorch is asked."""
    if not any(chosen.wants_gpu for chosen in recipe.stages.values()):
        return 0
    import torch

    return torch.cuda.device_count()
