"""VBench and VBench-2.0 themselves: they find our videos by our names, and we read what they write."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import tiny_pipeline
from avd_trainer.commands.vbench import check, collect, generate, prompts
from avd_trainer.evaluation.vbench.collecting import Count, read_results
from avd_trainer.evaluation.vbench.folder import Record, claim, record_videos
from avd_trainer.evaluation.vbench.suites import read_augmented, read_suite
from avd_trainer.runtime.files import write_json

pytestmark = pytest.mark.hosts

RunInHost = Callable[..., dict[str, Any]]
JUDGED = ("dynamic_degree", "temporal_flickering")


def test_vbench(checkout: Callable[[str], Path], run_in_host: RunInHost, tmp_path: Path) -> None:
    package = checkout("VBench")
    prompts(suite=package, output=tmp_path / "list.json")
    # A prompt of each of two dimensions, to be made and judged in seconds; RAFT needs more than 64 pixels.
    entries = json.loads((package / "vbench" / "VBench_full_info.json").read_text())
    few = [next(entry for entry in entries if dimension in entry["dimension"]) for dimension in JUDGED]
    info = tmp_path / "VBench_full_info.json"
    write_json(info, few)
    student = tiny_pipeline.build(tmp_path / "student", few_steps=(1000,))
    folder = tmp_path / "avd"
    generate(student, suite=info, output=folder, dimension=list(JUDGED), samples=2, size="128x128x5")
    check(folder)
    report = run_in_host(
        "VBench", "vbench_judges.py", *map(str, (info, tmp_path / "list.json", folder / "videos", folder / "results"))
    )
    assert report == {"dimensions": 16, "videos": 6220}
    collect([folder], output=tmp_path / "table")
    scores = read_results(folder).scores
    assert list(scores) == ["temporal_flickering", "dynamic_degree"]
    assert 0 < scores["temporal_flickering"].mean < 1
    assert (scores["temporal_flickering"].judged, scores["dynamic_degree"].wanted) == (2, 2)
    assert scores["dynamic_degree"].count is not None
    assert scores["dynamic_degree"].count.videos == 2
    written = (tmp_path / "table" / "vbench.md").read_text()
    assert "| dynamic_degree |" in written
    assert "308/360" in written


def test_vbench_2(checkout: Callable[[str], Path], run_in_host: RunInHost, tmp_path: Path) -> None:
    repository = checkout("VBench-2.0") / "VBench-2.0"
    suite = read_suite(repository)
    lists = repository / "prompts"
    shown = read_augmented(lists / "VBench2_full_text.txt", lists / "prompt_aug" / "Wanx_full_text_aug.txt")
    videos = record_videos(suite.videos(list(suite.prompts)), shown, seed=0)
    folder = tmp_path / "avd"
    folder.mkdir()
    record = Record(suite.rules, "tiny", {"frames": 81, "fps": 16.0, "samples": None}, videos)
    claim(folder, record)
    for each in videos:
        (folder / each.video.file).parent.mkdir(exist_ok=True)
        (folder / each.video.file).touch()
    counts = run_in_host("VBench-2.0", "vbench_2_finds.py", str(folder), str(folder / "results"))
    assert counts == {dimension: len(record.of(dimension)) for dimension in suite.rules.dimensions}
    assert (counts["Instance_Preservation"], counts["Diversity"], sum(counts.values())) == (171, 200, 3860)
    assert read_results(folder).scores["Instance_Preservation"].count == Count(114, 171)
