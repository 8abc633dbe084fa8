"""From videos to shards: nothing lost, nothing done twice, the same bytes whatever happened on the way."""

from __future__ import annotations

import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from avd_trainer.data.inspection import find_rows, inspect
from avd_trainer.data.preparation import recipe
from avd_trainer.data.preparation.journal import FileState, Journal
from avd_trainer.data.preparation.left_out import why_left_out
from avd_trainer.data.preparation.prepare import Prepared, Workers, select_again
from avd_trainer.data.preparation.selection import Dropped
from avd_trainer.data.preparation.stage import Done, Row, Span
from avd_trainer.data.preparation.worker import Found, RowTask, Task, Worker
from avd_trainer.data.shard_reading import ShardDataset
from avd_trainer.data.shard_writing import ShardWriter
from avd_trainer.runtime.errors import UserError
from disks import disk_with_room_for
from toy_runs import ToyRun, files_of, toy_recipe
from toy_stages import TOYS, ToyReader

NAMES = tuple(f"{letter}.mp4" for letter in "abcdef")
SQUARE = {"sizes": [[8, 8], [8, 8]]}


def kinds(begun: Counter[str]) -> dict[str, int]:
    """How often each kind of work was begun."""
    counts: Counter[str] = Counter()
    for line, times in begun.items():
        counts[line.split()[0]] += times
    return dict(counts)


def test_the_story_of_a_folder(toy: ToyRun) -> None:
    toy.add(*NAMES, "copy-of-a.mp4")
    (toy.videos / "copy-of-a.mp4").write_bytes((toy.videos / "a.mp4").read_bytes())
    chosen = toy_recipe(framing=SQUARE, brightness={"keep": 0.5})
    done = toy.prepare(chosen)
    assert (done.selection.files, len(done.selection.clips), len(done.selection.kept)) == (7, 18, 9)
    assert done.selection.dropped_files == {
        "copy-of-a.mp4": Dropped("reading", "it has the same bytes as another file (a.mp4)")
    }
    assert done.data == {toy.output / "data": 9}
    # Captions and latents are made for what is kept alone.
    everything = {
        "span": 6,
        "decoding": 18 + 9,
        "brightness": 18,
        "contrast": 18,
        "caption": 9,
        "latents": 9,
        "text": 9,
    }
    assert kinds(toy.begun()) == everything
    dataset = ShardDataset(toy.output / "data")
    assert dataset.latent_shape == (16, 2, 2, 2)
    assert next(dataset.column("source")).endswith(" s")
    first = json.loads(next(dataset.column("provenance")))
    clip = done.selection.kept[0]
    assert (first["file"], first["sha256"], tuple(first["span"])) == (clip.path, clip.sha256, clip.span)
    assert first["stages"]["brightness"]["settings"]["keep"] == 0.5
    assert first["stages"]["brightness"]["score"] == dataset[0].latent[0, 0, 0, 0]  # type: ignore[index]
    assert first["clip"] == {"frames": 5, "fps": 10.0}
    assert find_rows(toy.output / "data", clip.id) == [{"id": clip.id, **first, "caption": dataset[0].caption}]
    assert len(find_rows(toy.output / "data", clip.path)) == sum(row.path == clip.path for row in done.selection.kept)
    with pytest.raises(
        UserError, match=r"has no clip none\.mp4. Pass a video's path .* such as .*\.mp4.* left out: report"
    ):
        find_rows(toy.output / "data", "none.mp4")
    with pytest.raises(UserError, match=f"is no data set: the data set is {toy.output}/data"):
        inspect(toy.output)
    again = toy.prepare(chosen)
    assert again.unchanged
    assert again.data == done.data
    assert toy.begun() == {}


def test_a_changed_threshold_decodes_nothing_again(toy: ToyRun) -> None:
    toy.add(*NAMES)
    toy.prepare(toy_recipe(framing=SQUARE, brightness={"keep": 0.5}))
    before = files_of(toy.output / "data")
    toy.begun()
    less = toy.prepare(toy_recipe(framing=SQUARE, brightness={"keep": 0.25}))
    assert toy.begun() == {}
    assert less.data == {toy.output / "data": 5}
    more = toy.prepare(toy_recipe(framing=SQUARE, brightness={"keep": 1.0}))
    assert more.data == {toy.output / "data": 18}
    # Of clips that were not kept before, what only kept ones have.
    assert kinds(toy.begun()) == {"caption": 9, "text": 9, "latents": 9, "decoding": 9}
    toy.prepare(toy_recipe(framing=SQUARE, brightness={"keep": 0.5}))
    assert files_of(toy.output / "data") == before


def test_a_changed_setting_runs_that_stage_and_what_reads_it_again(toy: ToyRun) -> None:
    toy.add("a.mp4")
    toy.prepare()
    toy.begun()
    toy.prepare(toy_recipe(contrast={"gain": 2.0}))
    assert kinds(toy.begun()) == {"contrast": 3}
    toy.prepare(toy_recipe(brightness={"at": [1]}))
    assert kinds(toy.begun()) == {"decoding": 3, "brightness": 3, "contrast": 3}
    toy.prepare(toy_recipe(framing={"sizes": [[16, 16], [8, 8]]}))
    assert kinds(toy.begun()) == {"decoding": 3, "latents": 3}


def test_clips_of_several_sizes_are_data_sets_of_their_own(toy: ToyRun) -> None:
    toy.add("a.mp4", "wide.mp4")
    done = toy.prepare()
    assert done.data == {toy.output / "data" / "8x16": 3, toy.output / "data" / "8x8": 3}
    assert ShardDataset(toy.output / "data" / "8x16").latent_shape == (16, 2, 2, 4)
    for folder, named in ((toy.output, "data/8x16, data/8x8"), (toy.output / "data", "8x16, 8x8")):
        with pytest.raises(UserError, match=f"holds {named}; .* avd data inspect {toy.output}/data/8x16"):
            inspect(folder)


def test_the_shards_of_parts_that_are_merged_are_those_of_one_run(toy: ToyRun) -> None:
    toy.add(*NAMES)
    chosen = toy_recipe(framing=SQUARE, brightness={"keep": 0.5})
    for index in (2, 0, 1):
        done = toy.prepare(chosen, part=(index, 3))
        assert done.data == {}
    assert kinds(toy.begun()) == {"span": 6, "decoding": 18, "brightness": 18, "contrast": 18}
    toy.prepare(chosen)
    assert kinds(toy.begun()) == {"decoding": 9, "caption": 9, "text": 9, "latents": 9}
    whole = toy._replace(output=toy.output.with_name("whole"))
    whole.prepare(chosen, workers=2)
    assert files_of(toy.output / "data") == files_of(whole.output / "data")


def test_a_sample_is_always_the_same_and_its_work_is_not_done_again(toy: ToyRun) -> None:
    toy.add(*NAMES)
    done = toy.prepare(sample=0.3)
    assert done.data == {}
    assert done.forecast is not None
    assert done.forecast.files == (2, 6)
    assert done.forecast.bytes == (2 * 15, 6 * 15)
    assert done.forecast.core_hours > 0
    assert done.forecast.gigabytes > 0
    first = {line.split()[1] for line in toy.begun()}
    assert len(first) == 2
    toy.prepare(sample=0.5)
    second = {line.split()[1] for line in toy.begun()}
    assert len(second) == 1
    assert not first & second
    toy.prepare()
    assert {line.split()[1] for line in toy.begun()} == set(NAMES) - first - second


def test_what_failed_for_now_is_tried_again_by_the_next_run_alone(toy: ToyRun) -> None:
    toy.add("a.mp4", "silent.mp4")
    done = toy.prepare(toy_recipe(framing=SQUARE))
    assert done.data == {toy.output / "data": 3}
    assert set(done.selection.dropped.values()) == {Dropped("caption", "the server does not answer")}
    toy.begun()
    (toy.videos / "speak").touch()
    done = toy.prepare(toy_recipe(framing=SQUARE))
    assert done.data == {toy.output / "data": 6}
    assert kinds(toy.begun()) == {"caption": 3, "text": 3}


def provenance_of(toy: ToyRun) -> list[dict[str, Any]]:
    return [json.loads(text) for text in ShardDataset(toy.output / "data").column("provenance")]


def test_a_part_does_not_do_again_what_a_sample_did(toy: ToyRun) -> None:
    toy.add(*NAMES)
    toy.prepare(sample=0.5)
    sampled = {line.split()[1] for line in toy.begun() if line.startswith("brightness")}
    assert sampled
    for index in range(2):
        toy.prepare(part=(index, 2))
    scored = {line.split()[1] for line in toy.begun() if line.startswith("brightness")}
    assert scored == set(NAMES) - sampled
    files = []
    for index in range(2):
        with Journal(toy.output, part=(index, 2), write=False) as journal:
            files += [file.path for file in journal.files()]
    assert sorted(files) == list(NAMES)


def test_what_lies_beside_a_video_is_read_again_and_nothing_else_is_done(toy: ToyRun) -> None:
    toy.add("a.mp4", "b.mp4")
    chosen = toy_recipe(framing=SQUARE)
    toy.prepare(chosen)
    before = files_of(toy.output / "data")
    toy.begun()
    (toy.videos / "a.txt").write_text("Another caption.")
    assert not toy.prepare(chosen).unchanged
    assert kinds(toy.begun()) == {"caption": 3, "text": 3}
    assert Counter(ShardDataset(toy.output / "data").column("caption")) == {"Another caption.": 3, "b": 3}
    (toy.videos / "b.json").write_text('{"license": "CC0"}')
    assert not toy.prepare(chosen).unchanged
    assert {row["file"]: row["licence"] for row in provenance_of(toy)} == {"a.mp4": None, "b.mp4": "CC0"}
    (toy.videos / "a.txt").unlink()
    (toy.videos / "b.json").unlink()
    toy.prepare(chosen)
    assert files_of(toy.output / "data") == before
    assert toy.begun() == {}


def test_the_same_bytes_under_two_licences(toy: ToyRun) -> None:
    toy.add("a.mp4", "b.mp4", "c.mp4")
    for name in ("b.mp4", "c.mp4"):
        (toy.videos / name).write_bytes((toy.videos / "a.mp4").read_bytes())
    (toy.videos / "b.json").write_text('{"license": "CC0"}')
    (toy.videos / "c.json").write_text('{"license": "MIT"}')
    done = toy.prepare(toy_recipe(framing=SQUARE))
    assert {(row["file"], row["licence"]) for row in provenance_of(toy)} == {("b.mp4", "CC0")}
    reason = "it has the same bytes as another file (b.mp4), whose licence is CC0"
    assert done.selection.dropped_files == dict.fromkeys(["a.mp4", "c.mp4"], Dropped("reading", reason))


def test_arrays_are_on_the_disk_before_the_journal_says_so(toy: ToyRun, monkeypatch: pytest.MonkeyPatch) -> None:
    toy.add("a.mp4")
    told: list[object] = []
    monkeypatch.setattr(os, "fsync", lambda file: told.append("synced"))
    path = toy.videos / "a.mp4"
    row = Row("0" * 16, path, "0" * 64, Span(0, 500), {"framing": {"height": 8, "width": 8}})
    worker = Worker(toy_recipe(), toy.output, told.append, ToyReader)
    worker.work(Task(path, FileState.at(path), (RowTask(row, ("latents",)),)))
    found = next(place for place, each in enumerate(told) if isinstance(each, Found) and each.stage == "latents")
    assert told[found - 2 : found] == ["synced", "synced"]  # the file, and its name
    assert isinstance(told[found].outcome, Done)  # type: ignore[attr-defined]


def test_files_that_are_gone_give_no_clips_and_are_counted(toy: ToyRun, caplog: pytest.LogCaptureFixture) -> None:
    toy.add("a.mp4", "b.mp4")
    toy.prepare()
    assert "no longer" not in caplog.text
    (toy.videos / "a.mp4").unlink()
    done = toy.prepare()
    assert {clip.path for clip in done.selection.kept} == {"b.mp4"}
    assert f"1 files that were prepared before are no longer in {toy.videos} (a.mp4)" in caplog.text


def test_other_videos_do_not_replace_what_a_folder_holds(toy: ToyRun) -> None:
    toy.add("a.mp4")
    toy.prepare()
    before = files_of(toy.output / "data")
    other = toy._replace(videos=toy.videos.with_name("other"))
    other.add("b.mp4")
    with pytest.raises(
        UserError, match=r"was prepared from .*, not from .*other.*Choose another --output; if .* moved"
    ):
        other.prepare()
    assert files_of(toy.output / "data") == before
    assert toy._replace(videos=other.videos / ".." / toy.videos.name).prepare().unchanged


def test_arrays_that_are_gone_are_made_again(toy: ToyRun) -> None:
    toy.add("a.mp4")
    toy.prepare()
    before = files_of(toy.output / "data")
    for path in (toy.output / "arrays").rglob("*.safetensors"):
        path.unlink()
    toy.begun()
    toy.prepare(toy_recipe(brightness={"min": 0}))
    assert kinds(toy.begun()) == {"decoding": 3, "latents": 3, "text": 3}
    assert files_of(toy.output / "data").keys() == before.keys()


KILLED = """
import sys
from pathlib import Path
from toy_runs import ToyRun, toy_recipe
if __name__ == "__main__":
    toy = ToyRun(Path(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3]))
    toy.prepare(toy_recipe(framing={"sizes": [[8, 8], [8, 8]]}, brightness={"keep": 0.5}), workers=2)
"""


def run_until(command: list[str], environment: dict[str, str], toy: ToyRun, more: int) -> int | None:
    """Run a command until so many more things were begun, and kill it; its status if it ended before."""
    before = toy.lines()
    with subprocess.Popen(command, env=environment) as process:
        while process.poll() is None:
            if toy.lines() >= before + more:
                process.send_signal(signal.SIGKILL)
                return None
            time.sleep(0.002)
        return process.returncode


def test_kill_at_any_moment_and_the_same_command_again(toy: ToyRun) -> None:
    toy.add(*(f"{number}-slow.mp4" for number in range(6)))
    script = toy.runs.with_name("killed.py")
    script.write_text(KILLED)
    command = [sys.executable, str(script), *map(str, toy)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    draw = random.Random(0)
    kills = 0
    while (ended := run_until(command, environment, toy, draw.randint(8, 50))) is None:
        kills += 1
    assert ended == 0
    assert kills > 0
    # Two workers: a kill costs at most the clips that both had in work, each with up to four things to do.
    begun = toy.begun()
    assert set(kinds(begun)) == {"span", "decoding", "brightness", "contrast", "caption", "latents", "text"}
    needed = 6 * (1 + 3 * 3) + 9 * 4
    assert needed <= sum(begun.values()) <= needed + kills * 2 * 4
    whole = toy._replace(output=toy.output.with_name("whole"))
    whole.prepare(toy_recipe(framing=SQUARE, brightness={"keep": 0.5}))
    assert files_of(toy.output / "data") == files_of(whole.output / "data")


def test_two_runs_on_one_folder(toy: ToyRun) -> None:
    toy.add("a.mp4")
    with Journal(toy.output), pytest.raises(UserError, match="worked on by process"):
        toy.prepare()


def test_a_folder_without_videos(toy: ToyRun) -> None:
    with pytest.raises(UserError, match="holds no video files"):
        toy.prepare()
    with pytest.raises(UserError, match="is not a folder"):
        toy._replace(videos=Path("nowhere")).prepare()
    assert not toy.output.exists()


def test_no_clip_is_left(toy: ToyRun) -> None:
    toy.add("a.mp4")
    with pytest.raises(
        UserError,
        match=r"No clip is left of 1 files and 3 clips:\n  3 x brightness: 15 to 25 is below 256 .*a.mp4 at 0 s",
    ):
        toy.prepare(toy_recipe(brightness={"min": 256}))


def test_a_size_that_the_codec_cannot_take_is_told_before_anything_runs(toy: ToyRun) -> None:
    toy.add("a.mp4")
    with pytest.raises(UserError, match="multiples of 8"):
        toy.prepare(toy_recipe(framing={"sizes": [[9, 8], [8, 8]]}))
    assert toy.begun() == {}


def select(toy: ToyRun, *overrides: str) -> Prepared:
    return select_again(toy.output, toy.output.with_name("again"), overrides, Workers(1, open_reader=ToyReader))


@pytest.fixture
def by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    """The registry knows the toys, as recipes on disk want it."""
    monkeypatch.setattr(recipe, "list_stages", lambda: tuple(TOYS))
    monkeypatch.setattr(recipe, "load_stage", TOYS.__getitem__)


@pytest.mark.usefixtures("by_name")
def test_selecting_again_needs_no_videos_for_clips_that_were_kept_before(toy: ToyRun) -> None:
    toy.add(*NAMES)
    toy.prepare(toy_recipe(framing=SQUARE, brightness={"keep": 0.5}))
    toy.begun()
    toy.videos.rename(toy.videos.with_name("elsewhere"))
    done = select(toy, "brightness.keep=0.25")
    assert toy.begun() == {}
    assert done.data == {toy.output.with_name("again"): 5}
    assert len(ShardDataset(toy.output.with_name("again"))) == 5
    assert "keep: 0.25" in (toy.output.with_name("again") / "recipe.yaml").read_text()
    assert len(ShardDataset(toy.output / "data")) == 9  # as it was
    with pytest.raises(UserError, match="holds shards already"):
        select(toy, "brightness.keep=0.2")


@pytest.mark.usefixtures("by_name")
def test_selecting_again_into_shards_of_several_sizes_is_refused_before_any_work(toy: ToyRun) -> None:
    toy.add("a.mp4", "wide.mp4")
    toy.prepare()
    assert set(select(toy).data) == {toy.output.with_name("again") / size for size in ("8x16", "8x8")}
    toy.begun()
    with pytest.raises(UserError, match=r"8x\d+ holds shards already"):
        select(toy, "contrast.gain=2.0")
    assert toy.begun() == {}


@pytest.mark.usefixtures("by_name")
def test_selecting_into_several_sizes_can_be_killed_and_run_again(toy: ToyRun, monkeypatch: pytest.MonkeyPatch) -> None:
    toy.add("a.mp4", "wide.mp4")
    toy.prepare()
    output, sizes = toy.output.with_name("again"), []
    begin = ShardWriter.set_unconditional

    def stop_at_the_second(writer: ShardWriter, *given: Any) -> None:
        sizes.append(given)
        if len(sizes) == 2:
            raise KeyboardInterrupt
        begin(writer, *given)

    with monkeypatch.context() as patch:
        patch.setattr(ShardWriter, "set_unconditional", stop_at_the_second)
        with pytest.raises(KeyboardInterrupt):
            select(toy)
    assert not output.exists()
    output.mkdir()  # by hand
    assert set(select(toy).data) == {output / size for size in ("8x16", "8x8")}
    written = {name: files_of(toy.output / "data")[name] for name in files_of(output) if name.endswith(".parquet")}
    assert len(written) == 2
    assert written.items() <= files_of(output).items()
    assert sorted(path.name for path in output.parent.iterdir() if "again" in path.name) == ["again"]


@pytest.mark.usefixtures("by_name")
def test_selecting_into_a_folder_of_other_things_is_refused(toy: ToyRun) -> None:
    toy.add("a.mp4")
    toy.prepare()
    notes = toy.output.with_name("again") / "notes.txt"
    notes.parent.mkdir()
    notes.touch()
    with pytest.raises(UserError, match=r"holds something else already\. Choose a folder that is empty or not there"):
        select(toy)
    assert notes.is_file()


@pytest.mark.usefixtures("by_name")
def test_a_clip_that_was_left_out_is_told_with_its_stage_and_reason(toy: ToyRun) -> None:
    toy.add(*NAMES, "copy.mp4")
    (toy.videos / "copy.mp4").write_bytes((toy.videos / "a.mp4").read_bytes())
    data, again = toy.output / "data", toy.output.with_name("again")
    selection = toy.prepare(toy_recipe(framing=SQUARE, brightness={"keep": 0.5})).selection
    select(toy, "brightness.keep=0.25")
    id_, why = next((id_, why) for id_, why in selection.dropped.items() if why.stage == "brightness")
    clip = selection.clips[id_]
    said = f"{clip.path} at {clip.span.start / 1000:g} s was left out by brightness: {why.reason}"
    assert why_left_out(data, id_) == [said]
    assert said in why_left_out(data, clip.path)
    with pytest.raises(UserError, match=re.escape(f"has no clip {id_}:\n  {said}")):
        find_rows(data, id_)
    assert why_left_out(data, "copy.mp4") == [
        "copy.mp4 was left out by reading: it has the same bytes as another file (a.mp4)"
    ]
    assert why_left_out(data, "none.mp4") == why_left_out(data, selection.kept[0].id) == []
    # The other selection kept less.
    lost = [clip.id for clip in selection.kept if why_left_out(again, clip.id)]
    assert len(lost) == 4
    toy.output.rename(toy.output.with_name("moved"))
    assert why_left_out(toy.output.with_name("moved") / "data", id_) == [said]
    assert why_left_out(again, id_) == []  # nobody knows


def test_what_encoding_left_out_is_told_by_its_list(tmp_path: Path) -> None:
    said = {"files": {"b.mp4": "probe: it has no video stream"}, "clips": {"a.mp4 at 0 s": "still: 0 is below 0.001"}}
    (tmp_path / "left_out.json").write_text(json.dumps(said))
    assert why_left_out(tmp_path, "a.mp4") == ["a.mp4 at 0 s was left out by still: 0 is below 0.001"]
    assert why_left_out(tmp_path, "b.mp4") == ["b.mp4 was left out by probe: it has no video stream"]
    assert why_left_out(tmp_path, "c.mp4") == []


@pytest.mark.usefixtures("by_name")
def test_clips_that_are_newly_kept_and_whose_videos_are_gone_are_left_out(
    toy: ToyRun, caplog: pytest.LogCaptureFixture
) -> None:
    toy.add(*NAMES)
    toy.prepare(toy_recipe(framing=SQUARE, brightness={"keep": 0.5}))
    (toy.videos / "a.mp4").unlink()
    done = select(toy, "brightness.keep=1.0")
    lost = [clip for clip in done.selection.clips.values() if clip.id in done.selection.dropped]
    assert {clip.path for clip in lost} <= {"a.mp4"}
    assert len(done.selection.kept) == 18 - len(lost)
    assert ("a.mp4: it is not the file that was prepared" in caplog.text) == bool(lost)


@pytest.mark.usefixtures("by_name")
def test_selecting_from_nothing(toy: ToyRun) -> None:
    with pytest.raises(UserError, match=r"holds no prepared videos\. Run `avd data prepare`"):
        select(toy)
    assert not toy.output.exists()


def test_a_full_disk_stops_the_run_and_the_next_one_goes_on(toy: ToyRun) -> None:
    toy.add(*NAMES)
    with disk_with_room_for(40_000), pytest.raises(UserError, match="ree some space"):
        toy.prepare(toy_recipe(span={"clips": 60}, framing=SQUARE))
    done = toy.prepare(toy_recipe(span={"clips": 60}, framing=SQUARE))
    assert done.data == {toy.output / "data": 360}
